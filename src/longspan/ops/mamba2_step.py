"""One token of a Mamba-2 layer between its projections, on states in fixed memory that the step overwrites.

Shapes: B rows, E channels of the convolution (x, B, C), K taps, H heads, P head dim, N state.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from longspan.ops import kernels
from longspan.ops.conv_step import conv_step
from longspan.ops.ssd import ssd_step

LARGEST_STATE = 1024


def mamba2_step(
    xBC_BE: Tensor,
    dt_BH: Tensor,
    conv_weight_EK: Tensor,
    conv_bias_E: Tensor,
    dt_bias_H: Tensor,
    A_log_H: Tensor,
    D_H: Tensor,
    tail_BKE: Tensor,
    state_BHPN: Tensor,
) -> Tensor:
    """Convolution, SiLU, softplus of the step sizes, scan and skip of one token; one B/C group.

    Args:
        xBC_BE: what enters the convolution.
        dt_BH: step sizes before bias and softplus, in the dtype of `xBC_BE`.
        conv_weight_EK, conv_bias_E: of the convolution.
        dt_bias_H, A_log_H, D_H: of the scan.
        tail_BKE: the K-1 inputs before it, contiguous; overwritten.
        state_BHPN: fp32 (fp64 where all is), contiguous; overwritten.

    Returns:
        y (B, H, P) in the dtype of `xBC_BE`.
    """
    heads, head_dim, size = state_BHPN.shape[1:]
    compute = state_BHPN.dtype
    # Read by the scan alone, which computes in fp32.
    convolved_BE = conv_step(xBC_BE, conv_weight_EK, conv_bias_E, tail_BKE, compute)
    if kernels.serve_eagerly(xBC_BE) and size <= LARGEST_STATE:
        from longspan.ops.triton.mamba2_step import run_step

        return run_step(convolved_BE, dt_BH, dt_bias_H, A_log_H, D_H, state_BHPN)
    x, B, C = convolved_BE.split_with_sizes([heads * head_dim, size, size], dim=-1)
    y_BHP, state = ssd_step(
        x.view(-1, heads, head_dim),
        F.softplus(dt_BH.to(compute) + dt_bias_H.to(compute)),
        torch.exp(A_log_H.to(compute)).neg_(),
        B.unsqueeze(1),
        C.unsqueeze(1),
        D_H.to(compute),
        state_BHPN,
    )
    state_BHPN.copy_(state)
    return y_BHP.to(xBC_BE.dtype)
