"""The norms, with a backward of their own on the CPU, where autograd's many small passes cost as much as a matmul.

Legend: D width.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from longspan.ops import kernels

Stream = Tensor | tuple[Tensor, Tensor]
"""The residual stream (..., D) between compiled layers: a tensor, or the pair that `ops.triton.residual` has."""


class RMSNorm(nn.Module):
    """`x / rms(x) * weight`; statistics in fp32, the weight multiplies after the cast back (as transformers' Llama)."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        # Python numbers become tensors at every use, which shows in decoding; beside the parameters, never on `meta`.
        self._eps = torch.tensor(eps, dtype=torch.float32, device="cpu")
        self.weight = nn.Parameter(torch.empty(width))

    def forward(self, x: Tensor) -> Tensor:
        """(..., D), same shape and dtype."""
        weight = self.weight
        if _has_kernel(x):
            return _kernel(x, None, weight, self.eps, _computed_in(x))
        if not (_plain(x) and _plain(weight)):
            return F.rms_norm(x.float(), x.shape[-1:], eps=self.eps).to(x.dtype) * weight.to(x.dtype)
        if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
            y: Tensor = _RMSNorm.apply(x, weight, self._eps)  # type: ignore[no-untyped-call]
            return y
        return _normalise(x, self._eps)[0].mul_(weight)

    def begin(self, x: Tensor) -> tuple[Stream, Tensor]:
        """The stream that begins with `x`, and its norm in the dtype that what reads it computes in."""
        dtype = _computed_in(x)
        if x.dtype == torch.float32 and dtype in kernels.SERVED and _has_kernel(x):
            from longspan.ops.triton.residual import begin_stream

            near, rest, normed = begin_stream(x, self.weight, self.eps, dtype)
            return (near, rest), normed
        return x, self(x)

    def of_sum(self, stream: Stream, branch: Tensor) -> tuple[Stream, Tensor]:
        """The stream and a branch added up, and the norm of that as `begin` gives it."""
        if isinstance(stream, tuple):
            from longspan.ops.triton.residual import add_to_stream

            near, rest, normed = add_to_stream(*stream, branch.to(stream[0].dtype), self.weight, self.eps)
            return (near, rest), normed
        total = stream + branch
        return total, self(total).to(_computed_in(total))

    @torch.no_grad()
    def init_weights(self) -> None:
        """Ones."""
        self.weight.fill_(1.0)


class GatedRMSNorm(RMSNorm):
    """`RMSNorm(y * silu(z))`: the gate comes first (Mamba-2's `norm_before_gate=False`)."""

    def forward(self, y: Tensor, z: Tensor) -> Tensor:  # type: ignore[override]
        """Both (..., D); statistics in fp32, result in the dtype of `z`."""
        weight = self.weight
        if _has_kernel(z) and _has_kernel(y):
            return _kernel(y, z, weight, self.eps, z.dtype)
        if not (_plain(y) and _plain(z) and _plain(weight)):
            gated = y.float() * F.silu(z.float())
            return F.rms_norm(gated, gated.shape[-1:], eps=self.eps).to(z.dtype) * weight.to(z.dtype)
        if torch.is_grad_enabled() and (y.requires_grad or z.requires_grad or weight.requires_grad):
            out: Tensor = _GatedRMSNorm.apply(y, z, weight, self._eps)  # type: ignore[no-untyped-call]
            return out
        return _normalise(F.silu(z).mul_(y), self._eps)[0].mul_(weight)


class LayerNorm(nn.LayerNorm):
    """`torch.nn.LayerNorm` with weight and bias."""

    @torch.no_grad()
    def init_weights(self) -> None:
        """Weight one, bias zero."""
        self.weight.fill_(1.0)
        self.bias.zero_()


def _has_kernel(x: Tensor) -> bool:
    """A compiler fuses the plain norm with what stands before and after it, so it gets that one."""
    if torch.compiler.is_compiling():
        return False
    return x.shape[-1] <= kernels.WIDEST_ROW and kernels.serve(x)


def _kernel(x: Tensor, gate: Tensor | None, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    from longspan.ops.triton.rms_norm import rms_norm

    y: Tensor = kernels.called(rms_norm)(x, gate, weight, eps, dtype)
    return y


def _computed_in(x: Tensor) -> torch.dtype:
    """Under autocast the matmuls that read a norm would round it next: the kernel rounds it to the same dtype."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def _plain(tensor: Tensor) -> bool:
    return tensor.dtype == torch.float32 and tensor.is_cpu


def _normalise(x: Tensor, eps: Tensor) -> tuple[Tensor, Tensor]:
    """x / rms(x) and 1 / rms(x)."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    inverse = torch.addcmul(eps, norm, norm, value=1.0 / x.shape[-1]).rsqrt_()
    return x * inverse, inverse


def _backward(gradient: Tensor, normed: Tensor, inverse: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of what was normalised and of the weight; `normed` is used up."""
    product = gradient * normed
    d_weight = product.flatten(0, -2).sum(0)
    along = torch.mv(product.flatten(0, -2), weight).view(inverse.shape).div_(weight.shape[0])
    return (gradient * weight).sub_(normed.mul_(along)).mul_(inverse), d_weight


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: Tensor) -> Tensor:
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
    def forward(ctx: Any, y: Tensor, z: Tensor, weight: Tensor, eps: Tensor) -> Tensor:
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
