"""A residual sum and the norm that reads it, in one pass where no gradient is recorded.

Shapes: D width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from longspan.ops import kernels


def add_norm(x: Tensor, branch: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """`x + branch` and `sum / rms(sum) * weight`, both (..., D) in the dtype of `x`; no gradients.

    Statistics are fp32, as in `RMSNorm`.
    """
    if x.shape[-1] <= kernels.WIDEST_ROW and x.dtype == branch.dtype and kernels.serve(x):
        from longspan.ops.triton.add_norm import run_add_norm

        return run_add_norm(x, branch, weight_D, eps)
    total = x + branch
    wide = total if total.dtype == torch.float64 else total.float()
    return total, F.rms_norm(wide, x.shape[-1:], eps=eps).to(x.dtype) * weight_D.to(x.dtype)
