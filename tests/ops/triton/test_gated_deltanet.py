"""A whole Gated DeltaNet layer on kernels gives what the layer of single ops gives in fp64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from longspan.models.mixers.gated_deltanet import GatedDeltaNet, GatedDeltaNetSettings
from longspan.models.segments import Segments
from longspan.ops import gated_deltanet

FP32, BF16 = torch.float32, torch.bfloat16
EPS = 1e-5
pytestmark = pytest.mark.usefixtures("small_chunks")


@pytest.fixture(autouse=True)
def small_tiles(device, monkeypatch):
    """Several tiles a program, the last of them not full; on a GPU those that are used."""
    from longspan.ops.triton import delta_gates, head_norm

    if device.type == "cpu":
        for module, sizes in ((head_norm, {"FORWARD": 128, "BACKWARD": 64}), (delta_gates, {"NUMBERS": 8})):
            for name, size in ({"PROGRAMS": 3} | sizes).items():
                monkeypatch.setattr(module, name, size)


def layer(dtype: torch.dtype, device: torch.device, heads: int = 2, key_dim: int = 12, **settings) -> GatedDeltaNet:
    mixer = GatedDeltaNet(16, GatedDeltaNetSettings(delta_head_dim=key_dim, delta_heads=heads, **settings))
    mixer.init_weights(torch.Generator().manual_seed(0))
    mixer.norm.weight.data.uniform_(0.5, 1.5, generator=torch.Generator().manual_seed(1))
    return mixer.to(device, dtype)


def parameters(mixer: GatedDeltaNet) -> list[Tensor]:
    return [mixer.conv_weight, mixer.dt_bias, mixer.A_log, mixer.norm.weight]


@pytest.mark.parametrize(("dtype", "rest", "negative"), [(FP32, 5, False), (BF16, 0, True)])
def test_between_the_projections(dtype, rest, negative, assert_same, device, documents, normal, served):
    """On a GPU of many heads and tokens: of few, the sums that make the gradients of the decays cancel to nothing."""
    heads, key_dim, rows, time = (6, 64, 2, 300) if device.type == "cuda" else (2, 12, 2, 19)
    mixer = layer(torch.float64, torch.device("cpu"), heads, key_dim, negative_eigenvalues=negative)
    doc = documents(rows, time, 0.1)

    def fused(*z: Tensor) -> list[Tensor]:
        sizes = {"doc_BT": doc.to(device), "rows": rows, "eps": EPS, "negative_eigenvalues": negative}
        return [gated_deltanet.between_projections(z[0].flatten(0, 1), *z[1:], **sizes).unflatten(0, (rows, time))]

    def single(projected: Tensor, *others: Tensor) -> list[Tensor]:
        given = dict(zip(("conv_weight", "dt_bias", "A_log", "norm.weight"), others, strict=True))
        # The projections step aside, so that the layer is what lies between them.
        weights = {
            "in_proj.weight": torch.eye(mixer.in_proj.out_features, projected.shape[2], dtype=torch.float64),
            "out_proj.weight": torch.eye(mixer.values, dtype=torch.float64),
        }
        return [torch.func.functional_call(mixer, given | weights, (projected, Segments.build(doc), None))[0]]

    tensors = [normal(rows, time, mixer.in_proj.out_features + rest), *(p.detach() for p in parameters(mixer))]
    assert_same(fused, single, tensors, [dtype, *[FP32] * 4], roundings=4)


def test_training_takes_it_and_keeps_the_layers_results(device, documents, normal, served, monkeypatch):
    mixer = layer(FP32, device)
    x = normal(2, 18, 16).float().to(device)
    segments = Segments.build(documents(2, 18, 0.1), device=device)
    fused, _ = mixer(x, segments, None)
    stepwise, state = mixer(x, segments, mixer.initial_state())
    assert state is not None
    torch.testing.assert_close(fused, stepwise, atol=1e-4, rtol=1e-4)
    monkeypatch.setattr(gated_deltanet, "between_projections", None)
    with pytest.raises(TypeError):
        mixer(x, segments, None)


def test_rows_may_lie_apart(device, documents, normal, served):
    """As a compiler spreads them; nothing between them is read, and the gradient's rows begin whole lines."""
    mixer = layer(FP32, device)
    width, rest = mixer.in_proj.out_features, 2
    sizes = {"doc_BT": documents(2, 9, 0.1).to(device), "rows": 2, "eps": EPS, "negative_eigenvalues": False}
    wide = normal(18, width + 40).float().to(device)
    wide[:, width:] = torch.nan
    results = []
    for projected in (wide[:, : width + rest].contiguous(), wide[:, : width + rest]):
        leaf = projected.detach().requires_grad_()
        y = gated_deltanet.between_projections(leaf, *parameters(mixer), **sizes)
        results.append((y, *torch.autograd.grad(y.square().sum(), [leaf, *parameters(mixer)])))
    for one, same in zip(*results, strict=True):
        assert torch.equal(one, same)
    gradient = results[1][1]
    assert gradient.stride() == (-(-(width + rest) // 32) * 32, 1)
    assert not gradient[:, width:].any()


def test_the_compiler_sees_through(device, documents, normal, served):
    from longspan.ops.triton.gated_deltanet import gated_deltanet as kernel

    mixer = layer(FP32, device)
    projected = normal(17, mixer.in_proj.out_features + 1).float().to(device).requires_grad_()
    others = (mixer.conv_weight, mixer.dt_bias, -mixer.A_log.exp().detach(), mixer.norm.weight)
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    arguments = (projected, *others, documents(1, 17, 0.1).to(device), 1, 1.0, EPS)
    torch.library.opcheck(kernel, arguments, test_utils=tests)
