"""Rotary position embedding in NeoX pairing, so that query-key scores depend on relative position only.

Shapes: B batch, T time, H heads, P head dim, R = P/2 pairs.
"""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor
from torch.autograd.function import once_differentiable

from longspan.foundation.config import Config
from longspan.foundation.errors import UserError


class RopeScaling(Config):
    """Slower rotation for contexts beyond those of the first training, as transformers' `modeling_rope_utils.py`.

    Attributes:
        kind: `linear` divides every frequency by `factor` (position interpolation, Chen et al. 2023); `llama3` only
            those that turn less than `low_frequency` times in `original_context` tokens, leaves those that turn more
            than `high_frequency` times, and goes over smoothly between them (Llama 3.1).
        factor: what frequencies are divided by.
        low_frequency, high_frequency, original_context: of `llama3`.
    """

    kind: Literal["linear", "llama3"]
    factor: float = Field(gt=0)
    low_frequency: float | None = Field(None, gt=0)
    high_frequency: float | None = Field(None, gt=0)
    original_context: int | None = Field(None, ge=1)

    @model_validator(mode="after")
    def _complete(self) -> Self:
        bounds = (self.low_frequency, self.high_frequency, self.original_context)
        if self.kind == "linear" and any(bound is not None for bound in bounds):
            raise UserError("linear rope scaling with other settings than `factor`", "`factor` alone", "remove them")
        if self.kind == "llama3":
            if self.low_frequency is None or self.high_frequency is None or self.original_context is None:
                names = "low_frequency, high_frequency and original_context"
                raise UserError("llama3 rope scaling that is incomplete", names, "give all three")
            if self.low_frequency >= self.high_frequency:
                given = f"low_frequency = {self.low_frequency} with high_frequency = {self.high_frequency}"
                raise UserError(given, "low_frequency below high_frequency", "change one of the two")
        return self

    def scale(self, frequencies: Tensor) -> Tensor:
        """Radians per token before and after, same shape and dtype."""
        slow = frequencies / self.factor
        if self.low_frequency is None or self.high_frequency is None or self.original_context is None:
            return slow
        turns = self.original_context * frequencies / (2 * math.pi)
        share = ((turns - self.low_frequency) / (self.high_frequency - self.low_frequency)).clamp(0, 1)
        return torch.lerp(slow, frequencies, share)


class Rotation(NamedTuple):
    """Cosine and sine of every angle, (B, T, 1, R) or (1, T, 1, R), made once for all layers of a batch."""

    cos: Tensor
    sin: Tensor

    @staticmethod
    def build(
        positions_BT: Tensor,
        head_dim: int,
        base: float,
        dtype: torch.dtype = torch.float32,
        scaling: RopeScaling | None = None,
    ) -> Rotation:
        """The angles `position * base**(-2i/P)`.

        They match transformers' Llama (`modeling_llama.py`) in fp32.

        Args:
            positions_BT: integer positions, (B, T) or (1, T).
            head_dim: P, even.
            base: the angle base (theta), 10000 in most models.
            dtype: of the angles and the rotation, fp32 or fp64.
            scaling: of the frequencies.

        Raises:
            UserError: P is odd.
        """
        if head_dim % 2:
            raise UserError(f"rotary positions with head_dim {head_dim}", "an even head_dim", "change width or heads")
        exponents = torch.arange(0, head_dim, 2, dtype=dtype, device=positions_BT.device) / head_dim
        frequencies = 1.0 / base**exponents
        if scaling is not None:
            frequencies = scaling.scale(frequencies)
        angles_BTR = positions_BT.to(dtype)[..., None] * frequencies
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
    if torch.compiler.is_compiling():
        return _turn_plainly(x_BTHP, *rotation)
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


def _turn_plainly(x_BTHP: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """For a compiler, which fuses it, and which cannot follow writes into halves of a tensor."""
    first, second = x_BTHP.to(cos.dtype).chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x_BTHP.dtype)


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
