"""A sum of two rows and its RMSNorm in one pass.

Shapes: M rows, D width.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from longspan.ops.triton.device import on_its_device


@triton.jit
def _add_norm(x_ptr, branch_ptr, weight_ptr, total_ptr, y_ptr, eps, D: tl.constexpr, BLOCK: tl.constexpr):
    row, d = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    there = d < D
    x = tl.load(x_ptr + row * D + d, mask=there, other=0.0).to(tl.float32)
    x += tl.load(branch_ptr + row * D + d, mask=there, other=0.0).to(tl.float32)
    # The norm is of the sum as it is kept.
    total = x.to(total_ptr.dtype.element_ty)
    tl.store(total_ptr + row * D + d, total, mask=there)
    x = total.to(tl.float32)
    y = x * tl.rsqrt(tl.sum(x * x, 0) / D + eps) * tl.load(weight_ptr + d, mask=there, other=0.0).to(tl.float32)
    tl.store(y_ptr + row * D + d, y.to(y_ptr.dtype.element_ty), mask=there)


@on_its_device
def run_add_norm(x: Tensor, branch: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """See `ops.add_norm.add_norm`."""
    x, branch = x.contiguous(), branch.contiguous()
    total, y = torch.empty_like(x), torch.empty_like(x)
    width = x.shape[-1]
    block = triton.next_power_of_2(width)
    warps = min(16, max(4, block // 512))
    _add_norm[(x.numel() // width,)](x, branch, weight_D, total, y, eps, D=width, BLOCK=block, num_warps=warps)
    return total, y
