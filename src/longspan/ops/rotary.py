"""Rotary position embedding in NeoX pairing, so that query-key scores depend on relative position only.

Shapes: B batch, T time, H heads, P head dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

from longspan.foundation.errors import UserError


def rotary(x_BTHP: Tensor, positions_BT: Tensor, *, base: float) -> Tensor:
    """Rotates the pairs (i, i + P/2) of every head by `position * base**(-2i/P)`.

    The pairing ("rotate half") and the fp32 angles match transformers' Llama (`modeling_llama.py`); source: Su et al.,
    RoFormer, 2021, eq. 15.

    Args:
        x_BTHP: queries or keys, any float dtype, P even.
        positions_BT: integer positions, (B, T) or (1, T).
        base: the angle base (theta), 10000 in most models.

    Returns:
        The rotated tensor, (B, T, H, P), in the dtype of `x_BTHP`.

    Raises:
        UserError: P is odd.
    """
    head_dim = x_BTHP.shape[-1]
    if head_dim % 2:
        raise UserError(f"rotary positions with head_dim {head_dim}", "an even head_dim", "change width or heads")
    compute = torch.float64 if x_BTHP.dtype == torch.float64 else torch.float32
    exponents = torch.arange(0, head_dim, 2, dtype=compute, device=x_BTHP.device) / head_dim
    angles_BTP = positions_BT.to(compute)[..., None] * (1.0 / base**exponents)
    cos, sin = angles_BTP.cos()[:, :, None], angles_BTP.sin()[:, :, None]
    first, second = x_BTHP.to(compute).chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x_BTHP.dtype)
