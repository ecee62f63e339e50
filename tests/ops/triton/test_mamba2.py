"""A whole Mamba-2 layer on kernels gives what the layer of single ops gives in fp64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from longspan.models.mixers.mamba2 import Mamba2, Mamba2Settings
from longspan.models.segments import Segments
from longspan.ops import mamba2

FP32, BF16 = torch.float32, torch.bfloat16
pytestmark = pytest.mark.usefixtures("small_chunks")


def layer(dtype: torch.dtype, device: torch.device, width: int = 16) -> Mamba2:
    mixer = Mamba2(width, Mamba2Settings(state=16, mamba_head_dim=16))
    mixer.init_weights(torch.Generator().manual_seed(0))
    mixer.norm.weight.data.uniform_(0.5, 1.5, generator=torch.Generator().manual_seed(1))
    return mixer.to(device, dtype)


@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_between_the_projections(dtype, assert_same, device, documents, normal, served):
    width, rows, time = (64, 2, 150) if device.type == "cuda" else (32, 2, 18)
    mixer = layer(torch.float64, torch.device("cpu"), width)
    inner, heads, state = 2 * width, width // 8, 16
    # At first values y is almost D * x, and the norm takes from D's gradient all but a remainder of what its terms are.
    for seed, parameter in enumerate((mixer.dt_bias, mixer.A_log, mixer.D)):
        parameter.data.copy_(normal(heads, seed=seed))
    doc = documents(rows, time, 0.1)
    sizes = {"doc_BT": doc.to(device), "rows": rows, "state": state, "eps": 1e-5}

    def fused(*z: Tensor) -> list[Tensor]:
        between = mamba2.between_projections(z[0].flatten(0, 1), *z[1:], **sizes)
        return [between.unflatten(0, (rows, time))]

    def single(projected: Tensor, conv_weight: Tensor, conv_bias: Tensor, *others: Tensor) -> list[Tensor]:
        names = ("conv_weight", "conv_bias", "dt_bias", "A_log", "D", "norm.weight")
        parameters = dict(zip(names, (conv_weight, conv_bias, *others), strict=True))
        width = projected.shape[2]
        # The projections step aside, so that the layer is what lies between them.
        weights = {
            "in_proj.weight": torch.eye(width, dtype=torch.float64),
            "out_proj.weight": torch.eye(inner).double(),
        }
        segments = Segments.build(doc)
        return [torch.func.functional_call(mixer, parameters | weights, (projected, segments, None))[0]]

    tensors = [normal(rows, time, 2 * inner + 2 * state + heads)]
    tensors += [p.detach() for p in (mixer.conv_weight, mixer.conv_bias, mixer.dt_bias, mixer.A_log, mixer.D)]
    assert_same(fused, single, [*tensors, mixer.norm.weight.detach()], [dtype, *[FP32] * 6], roundings=2)


def test_training_takes_it_and_keeps_the_layers_results(device, documents, normal, served, monkeypatch):
    mixer = layer(FP32, device)
    x = normal(2, 18, 16).float().to(device)
    segments = Segments.build(documents(2, 18, 0.1), device=device)
    fused, _ = mixer(x, segments, None)
    stepwise, state = mixer(x, segments, mixer.initial_state())
    assert state is not None
    torch.testing.assert_close(fused, stepwise, atol=1e-4, rtol=1e-4)
    monkeypatch.setattr(mamba2, "between_projections", None)
    with pytest.raises(TypeError):
        mixer(x, segments, None)


def test_rows_may_lie_apart(device, documents, normal, served):
    """As a compiler spreads them; nothing between them is read, and the gradient's rows begin whole lines."""
    mixer = layer(FP32, device)
    parameters = (mixer.conv_weight, mixer.conv_bias, mixer.dt_bias, mixer.A_log, mixer.D, mixer.norm.weight)
    sizes = {"doc_BT": documents(2, 9, 0.1).to(device), "rows": 2, "state": 16, "eps": 1e-5}
    wide = normal(18, 120).float().to(device)
    wide[:, 98:] = torch.nan
    results = []
    for projected in (wide[:, :98].contiguous(), wide[:, :98]):
        leaf = projected.detach().requires_grad_()
        y = mamba2.between_projections(leaf, *parameters, **sizes)
        results.append((y, *torch.autograd.grad(y.square().sum(), [leaf, *parameters])))
    for one, same in zip(*results, strict=True):
        assert torch.equal(one, same)
    assert results[1][1].stride() == (128, 1)


def test_the_compiler_sees_through(device, documents, normal, served):
    from longspan.ops.triton.mamba2 import mamba2 as kernel

    mixer = layer(FP32, device)
    projected = normal(17, 98).float().to(device).requires_grad_()
    parameters = (mixer.conv_weight, mixer.conv_bias, mixer.dt_bias, -mixer.A_log.exp().detach(), mixer.D)
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    arguments = (projected, *parameters, mixer.norm.weight, documents(1, 17, 0.1).to(device), 1, 16, 1e-5)
    torch.library.opcheck(kernel, arguments, test_utils=tests)


@pytest.mark.slow
def test_a_compiled_layer_is_one_graph(device, documents, normal, served):
    """The compiler finds ops where kernels are: no break, the same values and gradients."""
    mixer = layer(FP32, device)
    segments = Segments.build(documents(1, 18, 0.1), device=device)
    results = []
    torch._dynamo.reset()
    for call in (mixer, torch.compile(mixer, backend="aot_eager", fullgraph=True)):
        x = normal(1, 18, 16).float().to(device).requires_grad_()
        y, _ = call(x, segments, None)
        results.append((y, *torch.autograd.grad(y.square().sum(), [x, *mixer.parameters()])))
    torch.testing.assert_close(results[0], results[1], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("documents_too", [False, True])
@torch.no_grad()
def test_the_beginning_of_a_prompt_without_gradients(documents_too, device, documents, normal, served, monkeypatch):
    mixer = layer(FP32, device)
    x = normal(2, 21, 16).float().to(device)
    segments = Segments.build(documents(2, 21, 0.1) if documents_too else None, shape=(2, 21), device=device)
    found, state = mixer(x, segments, mixer.initial_state())
    monkeypatch.setattr(mamba2, "serves", lambda *sizes: False)
    expected, other = mixer(x, segments, mixer.initial_state())
    for one, same in zip((found, state.tail, state.scan), (expected, other.tail, other.scan), strict=True):
        torch.testing.assert_close(one, same, atol=1e-5, rtol=1e-4)
    assert (state.tail_doc is None) == (other.tail_doc is None)
    assert state.tail_doc is None or torch.equal(state.tail_doc, other.tail_doc)
    assert state.tail.is_contiguous()
