"""The norms, with a backward of their own on the CPU, where autograd's many small passes cost as much as a matmul.

Legend: D width.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class RMSNorm(nn.Module):
    """`x / rms(x) * weight`; statistics in fp32, the weight multiplies after the cast back (as transformers' Llama)."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(width))

    def forward(self, x: Tensor) -> Tensor:
        """(..., D), same shape and dtype."""
        if _own_backward(x, self.weight):
            y: Tensor = _RMSNorm.apply(x, self.weight, self.eps)  # type: ignore[no-untyped-call]
            return y
        return F.rms_norm(x.float(), x.shape[-1:], eps=self.eps).to(x.dtype) * self.weight.to(x.dtype)

    @torch.no_grad()
    def init_weights(self) -> None:
        """Ones."""
        self.weight.fill_(1.0)


class GatedRMSNorm(RMSNorm):
    """`RMSNorm(y * silu(z))`: the gate comes first (Mamba-2's `norm_before_gate=False`)."""

    def forward(self, y: Tensor, z: Tensor) -> Tensor:  # type: ignore[override]
        """Both (..., D); statistics in fp32, result in the dtype of `z`."""
        if y.dtype == z.dtype and _own_backward(y, z, self.weight):
            out: Tensor = _GatedRMSNorm.apply(y, z, self.weight, self.eps)  # type: ignore[no-untyped-call]
            return out
        gated = y.float() * F.silu(z.float())
        return F.rms_norm(gated, gated.shape[-1:], eps=self.eps).to(z.dtype) * self.weight.to(z.dtype)


class LayerNorm(nn.LayerNorm):
    """`torch.nn.LayerNorm` with weight and bias."""

    @torch.no_grad()
    def init_weights(self) -> None:
        """Weight one, bias zero."""
        self.weight.fill_(1.0)
        self.bias.zero_()


def _own_backward(*tensors: Tensor) -> bool:
    fits = all(t.dtype == torch.float32 and t.device.type == "cpu" for t in tensors)
    return fits and torch.is_grad_enabled() and any(t.requires_grad for t in tensors)


def _normalise(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x / rms(x) and 1 / rms(x)."""
    inverse = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps).rsqrt_()
    return x * inverse, inverse


def _backward(gradient: Tensor, normed: Tensor, inverse: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of what was normalised and of the weight; `normed` is used up."""
    product = gradient * normed
    d_weight = product.flatten(0, -2).sum(0)
    along = torch.mv(product.flatten(0, -2), weight).view(inverse.shape).div_(weight.shape[0])
    return (gradient * weight).sub_(normed.mul_(along)).mul_(inverse), d_weight


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        normed, inverse = _normalise(x, eps)
        ctx.save_for_backward(x, inverse, weight)
        return normed.mul_(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        x, inverse, weight = ctx.saved_tensors
        d_x, d_weight = _backward(gradient, x * inverse, inverse, weight)
        return d_x, d_weight, None


class _GatedRMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, z: Tensor, weight: Tensor, eps: float) -> Tensor:
        normed, inverse = _normalise(F.silu(z).mul_(y), eps)
        ctx.save_for_backward(y, z, inverse, weight)
        return normed.mul_(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        y, z, inverse, weight = ctx.saved_tensors
        gate = F.silu(z)
        d_gated, d_weight = _backward(gradient, (gate * y).mul_(inverse), inverse, weight)
        d_z = torch.ops.aten.silu_backward(d_gated * y, z)
        return d_gated.mul_(gate), d_z, d_weight, None
