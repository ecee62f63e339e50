"""A residual sum and its norm in one pass give what plain torch gives in fp64."""

from __future__ import annotations

import pytest
import torch

from longspan.ops.add_norm import add_norm


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("shape", [(2, 3, 10), (1, 700)])
@torch.no_grad()
def test_sum_and_norm(shape, dtype, tolerance, device, normal, served):
    x, branch = (normal(*shape, seed=seed).to(device, dtype) for seed in (0, 1))
    weight = normal(shape[-1], seed=2).to(device, dtype)
    exact = add_norm(x.double(), branch.double(), weight.double(), 1e-5)
    found = add_norm(x, branch, weight, 1e-5)
    assert torch.equal(found[0], x + branch) or dtype == torch.bfloat16
    for one, other in zip(found, exact, strict=True):
        assert one.dtype == dtype
        assert (one.double() - other).norm() / other.norm() < tolerance
