"""Rotary position embedding in NeoX pairing, so that query-key scores depend on relative position only.

Shapes: B batch, T time, H heads, P head dim, R = P/2 pairs.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from longspan.foundation.errors import UserError


class Rotation(NamedTuple):
    """Cosine and sine of every angle, (B, T, 1, R) or (1, T, 1, R), made once for all layers of a batch."""

    cos: Tensor
    sin: Tensor

    @staticmethod
    def build(positions_BT: Tensor, head_dim: int, base: float, dtype: torch.dtype = torch.float32) -> Rotation:
        """The angles `position * base**(-2i/P)`.

        They match transformers' Llama (`modeling_llama.py`) in fp32.

        Args:
            positions_BT: integer positions, (B, T) or (1, T).
            head_dim: P, even.
            base: the angle base (theta), 10000 in most models.
            dtype: of the angles and the rotation, fp32 or fp64.

        Raises:
            UserError: P is odd.
        """
        if head_dim % 2:
            raise UserError(f"rotary positions with head_dim {head_dim}", "an even head_dim", "change width or heads")
        exponents = torch.arange(0, head_dim, 2, dtype=dtype, device=positions_BT.device) / head_dim
        angles_BTR = positions_BT.to(dtype)[..., None] * (1.0 / base**exponents)
        return Rotation(angles_BTR.cos()[:, :, None], angles_BTR.sin()[:, :, None])


def rotary(x_BTHP: Tensor, rotation: Rotation) -> Tensor:
    """Rotates the pairs (i, i + P/2) of every head.

    The pairing ("rotate half") is that of transformers' Llama; source: Su et al., RoFormer, 2021, eq. 15.

    Args:
        x_BTHP: queries or keys, any float dtype.
        rotation: of their positions.

    Returns:
        The rotated tensor, (B, T, H, P), in the dtype of `x_BTHP`.
    """
    if not (torch.is_grad_enabled() and x_BTHP.requires_grad):
        return _turn(x_BTHP, *rotation, 1.0)
    y: Tensor = _Rotary.apply(x_BTHP, *rotation)  # type: ignore[no-untyped-call]
    return y


def _turn(x_BTHP: Tensor, cos: Tensor, sin: Tensor, direction: float) -> Tensor:
    x = x_BTHP.to(cos.dtype)
    pairs = cos.shape[-1]
    first, second = x[..., :pairs], x[..., pairs:]
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    torch.mul(first, cos, out=y[..., :pairs]).addcmul_(second, sin, value=-direction)
    torch.mul(second, cos, out=y[..., pairs:]).addcmul_(first, sin, value=direction)
    return y.to(x_BTHP.dtype)


class _Rotary(torch.autograd.Function):
    """Keeps nothing but the angles: the gradient turns back."""

    @staticmethod
    def forward(ctx: Any, x_BTHP: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turn(x_BTHP, cos, sin, 1.0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_BTHP: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _turn(dy_BTHP, cos, sin, -1.0), None, None
