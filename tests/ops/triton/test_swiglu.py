"""SwiGLU's product by a kernel says what plain ops say in fp64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from longspan.ops.swiglu import swiglu

FP32, BF16 = torch.float32, torch.bfloat16


def plain(hidden: torch.Tensor) -> list[torch.Tensor]:
    gate, up = hidden.chunk(2, dim=-1)
    return [F.silu(gate) * up]


@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("width", [16, 21])
def test_matches_fp64(dtype, width, assert_same, normal, served):
    assert_same(lambda hidden: [swiglu(hidden)], plain, [3 * normal(2, 5, 2 * width)], [dtype])


@torch.no_grad()
def test_without_gradients(normal, served):
    hidden = normal(2, 3, 10)
    torch.testing.assert_close(swiglu(hidden.float()).double(), plain(hidden)[0], rtol=1e-5, atol=1e-6)


def test_rows_of_a_wider_tensor_need_no_copy(device, normal, served):
    wide = normal(3, 20).float().to(device).requires_grad_()
    part, whole = wide[:, 4:], wide[:, 4:].contiguous()
    assert torch.equal(swiglu(part), swiglu(whole))
    slope = normal(3, 24, seed=1).float().to(device)[:, 8:16]
    found, same = (torch.autograd.grad(swiglu(z), wide, slope)[0] for z in (wide[:, 4:], wide[:, 4:].contiguous()))
    assert torch.equal(found, same)


def test_the_compiler_sees_through(device, normal, served):
    from longspan.ops.triton.swiglu import swiglu as kernel

    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(kernel, (normal(3, 8).float().to(device).requires_grad_(),), test_utils=tests)
