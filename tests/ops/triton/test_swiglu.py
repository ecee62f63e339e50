"""The gate of an MLP in one pass gives what plain torch gives in fp64."""

from __future__ import annotations

import pytest
import torch

from longspan.ops.swiglu import swiglu

FP32, BF16 = torch.float32, torch.bfloat16


@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("shape", [(2, 3, 10), (1, 2600)])
@torch.no_grad()
def test_gate(shape, dtype, device, normal, served):
    hidden = normal(*shape).to(device, dtype)
    exact = swiglu(hidden.double())
    found = swiglu(hidden)
    assert found.shape == (*shape[:-1], shape[-1] // 2)
    assert found.dtype == dtype
    error = (found.double() - exact).norm() / exact.norm()
    assert error < {FP32: 1e-6, BF16: 1e-2}[dtype]


def test_gradients_are_those_of_plain_torch(served):
    hidden = torch.randn(2, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    assert torch.autograd.gradcheck(swiglu, (hidden,))
