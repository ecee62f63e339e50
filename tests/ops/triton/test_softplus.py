"""Step sizes are right relative to themselves, however small."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def test_step_sizes_of_any_size(device):
    """A layer begins with steps of 0.001, where log(1 + e^x) in fp32 keeps four digits."""
    from longspan.ops.triton.decays import Decays

    x = torch.linspace(-20.0, 22.0, 170).view(1, -1, 1)
    decays = Decays.of(x.to(device), None, torch.zeros(1, device=device), None, None, 16)
    found, exact = decays.planes[0, 0, 0, : x.numel()].cpu().double(), F.softplus(x.double().flatten())
    # A chip takes e^x as 2 to a rounded product, which costs |x| units, beside a few for all else.
    assert ((found / exact - 1).abs() < (8 + x.flatten().abs()) * 2**-24).all()
