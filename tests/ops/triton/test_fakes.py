"""What the compiler is told about every op is what the op returns: shapes, dtypes and strides."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from longspan.models.mixers.gated_deltanet import GatedDeltaNet, GatedDeltaNetSettings
from longspan.models.mixers.mamba2 import Mamba2, Mamba2Settings
from longspan.models.norms import GatedRMSNorm, RMSNorm
from longspan.models.segments import Segments
from longspan.ops import embedding
from longspan.ops.causal_conv import causal_conv
from longspan.ops.gated_delta import gated_delta
from longspan.ops.selective_scan import selective_scan
from longspan.ops.ssd import ssd
from longspan.ops.swiglu import swiglu

pytestmark = pytest.mark.usefixtures("small_chunks")


class FakesAgree(TorchDispatchMode):
    """Runs the fake of every op of this package beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.met: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = func(*args, **(kwargs or {}))
        if func.namespace == "longspan":
            with FakeTensorMode() as mode:
                fakes = func(*(mode.from_tensor(z) if isinstance(z, Tensor) else z for z in args), **(kwargs or {}))
            name = func.name()
            self.met.add(name)
            both = zip(*((z,) if isinstance(z, Tensor) else z for z in (results, fakes)), strict=True)
            for i, (real, fake) in enumerate(both):
                said, done = ((z.shape, z.stride(), z.dtype) for z in (fake, real))
                assert said == done, f"result {i} of {name} is {done}, and its fake says {said}"
        return results


def leaf(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).requires_grad_()


def check(outputs: list[Tensor]) -> None:
    torch.autograd.backward(outputs, [torch.ones_like(y) for y in outputs], retain_graph=True)


def test_convolution(device, served):
    with FakesAgree() as mode:
        x, weight = leaf(2, 5, 12).to(device), leaf(12, 4).to(device)
        check([causal_conv(x[..., :8], weight[:8], leaf(8).to(device))[0]])
    assert mode.met == {"longspan::causal_conv", "longspan::causal_conv_backward"}


def test_swiglu(device, served):
    with FakesAgree() as mode:
        check([swiglu(leaf(2, 3, 24).to(device)[..., 4:20])])
    assert mode.met == {"longspan::swiglu", "longspan::swiglu_backward"}


def test_embedding(device, monkeypatch, served):
    monkeypatch.setattr(embedding, "FEWEST_PLACES", 1)
    with FakesAgree() as mode:
        check([embedding.embedding(torch.tensor([[3, 0, 3]], device=device), leaf(5, 8).to(device))])
    assert mode.met == {"longspan::embedding", "longspan::embedding_backward"}


@pytest.mark.parametrize("goes_on", [True, False])
def test_scans(device, documents, goes_on, served):
    doc = documents(1, 6, 0.2).to(device)
    x, wide, step = (
        leaf(1, 6, 2, 16).to(device),
        leaf(1, 6, 32).to(device),
        leaf(1, 6, 2).to(device).detach().exp().requires_grad_(),
    )
    state, rate = leaf(1, 2, 16, 16).to(device), -torch.ones(2, device=device)
    B, C = wide[..., None, :16], wide[..., None, 16:]
    past = {"initial_doc_B": doc[:, 0]} if goes_on else {}
    states = {"initial_state_BHPN": state} if goes_on else {}
    with FakesAgree() as mode:
        check([*ssd(x, step, rate, B, C, torch.ones(2, device=device), doc_BT=doc, **states, **past)])
        states = {"initial_state_BHKV": state} if goes_on else {}
        check([*gated_delta(x, x, x, -step, step, doc_BT=doc, **states, **past)])
        A, step = -torch.ones(16, 4, device=device), leaf(1, 6, 16).to(device).detach().exp().requires_grad_()
        states = {"initial_state_BNE": leaf(1, 4, 16).to(device)} if goes_on else {}
        inputs = (x[:, :, 0], step, A, wide[..., :4], wide[..., 4:8], torch.ones(16, device=device))
        check([*selective_scan(*inputs, doc_BT=doc, **states, **past)])
    names = ("ssd", "gated_delta", "selective_scan")
    assert mode.met == {f"longspan::{name}{way}" for name in names for way in ("", "_backward")}


def test_norms(device, served):
    with FakesAgree() as mode:
        for kind, inputs in ((RMSNorm, 1), (GatedRMSNorm, 2)):
            norm = kind(8, 1e-5).to(device)
            norm.init_weights()
            check([norm(*(leaf(2, 3, 24).to(device)[..., 8 * i : 8 * i + 8] for i in range(inputs)))])
        for bf16 in (True, False):
            with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                norm = RMSNorm(8, 1e-5).to(device)
                stream, first = norm.begin(leaf(2, 3, 8).to(device))
                stream, second = norm.of_sum(stream, leaf(2, 3, 24).to(device)[..., 8:16])
            check([*stream, first, second])
    names = ("rms_norm", "begin_stream", "add_to_stream")
    assert mode.met == {f"longspan::{name}{way}" for name in names for way in ("", "_backward")}


def test_a_mamba2_layer(device, documents, served):
    mixer = Mamba2(16, Mamba2Settings(state=16, mamba_head_dim=16))
    mixer.init_weights(torch.Generator().manual_seed(0))
    mixer.to(device)
    segments = Segments.build(documents(2, 5, 0.2), device=device)
    with FakesAgree() as mode:
        check([mixer(leaf(2, 5, 16).to(device), segments, None)[0]])
    assert mode.met == {"longspan::mamba2", "longspan::mamba2_backward"}


def test_a_gated_deltanet_layer(device, documents, served):
    mixer = GatedDeltaNet(16, GatedDeltaNetSettings(delta_head_dim=12, delta_heads=1))
    mixer.init_weights(torch.Generator().manual_seed(0))
    mixer.to(device)
    segments = Segments.build(documents(2, 5, 0.2), device=device)
    with FakesAgree() as mode:
        check([mixer(leaf(2, 5, 16).to(device), segments, None)[0]])
    assert mode.met == {"longspan::gated_deltanet", "longspan::gated_deltanet_backward"}
