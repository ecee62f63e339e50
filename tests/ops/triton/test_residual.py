"""The residual stream in two numbers a value: sums, norms and gradients as in fp64, nothing lost on the way."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from longspan.models.norms import RMSNorm

FP32, BF16 = torch.float32, torch.bfloat16
WIDTH = 24


@pytest.fixture(autouse=True)
def few_programs(monkeypatch):
    from longspan.ops.triton import rms_norm

    monkeypatch.setattr(rms_norm, "PROGRAMS", 3)


class Left(torch.autograd.Function):
    """The stream as fp32; its gradient goes back in two, as layers hand it on."""

    @staticmethod
    def forward(ctx, near: Tensor, rest: Tensor) -> Tensor:
        ctx.in_two = rest.numel() > 0
        return near.float() + rest.float() if ctx.in_two else near.clone()

    @staticmethod
    def backward(ctx, d: Tensor) -> tuple[Tensor, Tensor]:
        if not ctx.in_two:
            return d, d.new_empty(0)
        near = d.to(BF16)
        return near, (d - near.float()).to(BF16)


def weighted(weight: Tensor) -> RMSNorm:
    module = RMSNorm(WIDTH, 1e-5)
    del module.weight
    module.weight = weight
    return module


def layers(x: Tensor, one: Tensor, other: Tensor, *weights: Tensor) -> list[Tensor]:
    """The stream after two branches, and the norms on the way, in the dtype of the branches."""
    with torch.autocast(x.device.type, BF16, enabled=one.dtype == BF16):
        stream, first = weighted(weights[0]).begin(x)
        stream, second = weighted(weights[1]).of_sum(stream, one)
        stream, third = weighted(weights[2]).of_sum(stream, other)
    assert isinstance(stream, tuple)
    assert {z.dtype for z in (*stream, first, second, third)} == {one.dtype}
    return [Left.apply(*stream), first, second, third]


def plain(x: Tensor, one: Tensor, other: Tensor, *weights: Tensor) -> list[Tensor]:
    stream = [x, x + one, x + one + other]
    normed = [torch.nn.functional.rms_norm(s, (WIDTH,), w, 1e-5) for s, w in zip(stream, weights, strict=True)]
    return [stream[-1], *normed]


@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_matches_fp64(dtype, assert_same, normal, served):
    tensors = [normal(2, 4, WIDTH, seed=i) for i in range(3)] + [normal(WIDTH, seed=5 + i) for i in range(3)]
    assert_same(layers, plain, tensors, [FP32, dtype, dtype, FP32, FP32, FP32])


def test_many_small_branches_are_not_lost_beside_a_large_stream(device, normal, served):
    """In bf16 alone none of them would change it."""
    branches = (1e-3 * normal(64, 5, WIDTH, seed=1).abs()).to(BF16).to(device)
    x, weight = torch.full((5, WIDTH), 3.0, device=device), torch.ones(WIDTH, device=device)
    with torch.autocast(device.type, BF16), torch.no_grad():
        stream, _ = weighted(weight).begin(x)
        for branch in branches:
            stream, _ = weighted(weight).of_sum(stream, branch)
    torch.testing.assert_close(Left.apply(*stream), x + branches.float().sum(0), rtol=64 * 2**-15, atol=0)


def test_gradients_of_many_layers_keep_what_one_number_would_lose(device, normal, served):
    """The gradient of the stream passes every layer, which adds little to it."""
    x = torch.full((5, WIDTH), 3.0, device=device, requires_grad=True)
    slope = normal(5, WIDTH, seed=2).float().to(device)
    with torch.autocast(device.type, BF16):
        stream, _ = weighted(torch.ones(WIDTH, device=device)).begin(x)
        for _ in range(16):
            stream, _ = weighted(torch.ones(WIDTH, device=device)).of_sum(stream, torch.zeros(5, WIDTH, device=device))
    (dx,) = torch.autograd.grad(Left.apply(*stream), x, slope)
    torch.testing.assert_close(dx, slope, rtol=16 * 2**-15, atol=1e-6)


def test_a_stream_that_was_bf16_all_along_stays_one_tensor(device, normal, served):
    x, weight = normal(2, WIDTH).to(BF16).to(device), normal(WIDTH).float().to(device)
    stream, _ = weighted(weight).begin(x)
    stream, normed = weighted(weight).of_sum(stream, x)
    assert isinstance(stream, Tensor)
    assert torch.equal(stream, x + x)
    assert normed.dtype == BF16


def test_the_compiler_sees_through(device, normal, served):
    from longspan.ops.triton.residual import add_to_stream, begin_stream

    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    x, weight = (z.float().to(device).requires_grad_() for z in (normal(3, 8), normal(8)))
    near, rest, branch = (normal(3, 8, seed=i).to(BF16).to(device).requires_grad_() for i in range(3))
    torch.library.opcheck(add_to_stream, (near, rest, branch, weight, 1e-5), test_utils=tests)
    for dtype in (FP32, BF16):
        torch.library.opcheck(begin_stream, (x, weight, 1e-5, dtype), test_utils=tests)
    none = x.detach().new_empty(0)
    torch.library.opcheck(add_to_stream, (x, none, x, weight, 1e-5), test_utils=tests)
