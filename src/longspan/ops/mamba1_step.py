"""One token of Mamba-1's scan with its gates, on a state in fixed memory that the step overwrites.

Shapes: B rows, E channels, N state.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from longspan.ops import kernels
from longspan.ops.selective_scan import LARGEST_KERNEL_STATE, selective_scan_step


def mamba1_step(
    x_BE: Tensor,
    dt_BE: Tensor,
    BC_B2N: Tensor,
    z_BE: Tensor,
    dt_bias_E: Tensor,
    A_log_EN: Tensor,
    D_E: Tensor,
    state_BNE: Tensor,
) -> Tensor:
    """Softplus of the step sizes, scan, skip and output gate of one token.

    Args:
        x_BE: what the convolution gave, in the dtype of the other activations; rows may lie apart, here and below.
        dt_BE: step sizes before bias and softplus.
        BC_B2N: the projections B and C, side by side.
        z_BE: the output gate before its SiLU.
        dt_bias_E, A_log_EN, D_E: of the scan, contiguous.
        state_BNE: fp32 (fp64 where all is), contiguous; overwritten.

    Returns:
        y (B, E) in the dtype of `x_BE`.
    """
    size = state_BNE.shape[1]
    if kernels.serve_eagerly(x_BE) and size <= LARGEST_KERNEL_STATE:
        from longspan.ops.triton.mamba1_step import run_step

        return run_step(x_BE, dt_BE, BC_B2N, z_BE, dt_bias_E, A_log_EN, D_E, state_BNE)
    compute = state_BNE.dtype
    B, C = BC_B2N.to(compute).chunk(2, dim=-1)
    y_BE, state = selective_scan_step(
        x_BE.to(compute),
        F.softplus(dt_BE.to(compute) + dt_bias_E.to(compute)),
        torch.exp(A_log_EN.to(compute).T.contiguous()).neg_(),
        B,
        C,
        D_E.to(compute),
        state_BNE,
    )
    state_BNE.copy_(state)
    return (y_BE * F.silu(z_BE.to(compute))).to(x_BE.dtype)
