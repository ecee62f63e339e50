"""What programs leave is added up: all of it, once."""

from __future__ import annotations

import pytest
import torch


@pytest.mark.parametrize("shape", [(1, 3, 5), (3, 130, 24), (1, 64, 40)])
def test_matches_fp64(shape, device, normal):
    from longspan.ops.triton.sums import add_up

    values = normal(*shape).float().to(device)
    sums = add_up(values)
    assert torch.equal(sums, add_up(values))
    torch.testing.assert_close(sums.double(), values.double().sum(1), rtol=1e-5, atol=1e-5)
