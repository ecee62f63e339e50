"""One token of a Gated DeltaNet layer between its projections, on states in fixed memory that the step overwrites.

Shapes: B rows, E channels of the convolution (q, k, v), T taps, H heads, K key dim, V value dim of a head.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from longspan.ops import kernels
from longspan.ops.conv_step import conv_step
from longspan.ops.gated_delta import LARGEST_KERNEL_KEY, gated_delta_step

LARGEST_MEMORY = 1 << 15
"""Numbers of one head's memory, K and V at the next powers of 2: they have to fit the registers of one program."""


def delta_step(
    qkv_BE: Tensor,
    z_BHV: Tensor,
    b_BH: Tensor,
    a_BH: Tensor,
    conv_weight_ET: Tensor,
    dt_bias_H: Tensor,
    A_log_H: Tensor,
    norm_weight_V: Tensor,
    tail_BTE: Tensor,
    memory_BHKV: Tensor,
    *,
    eps: float,
    negative_eigenvalues: bool,
) -> Tensor:
    """Convolution, SiLU, gates, delta rule, norm over each head and gate of one token.

    Args:
        qkv_BE: what enters the convolution; rows may lie apart, here and below.
        z_BHV: the gate of the output before its SiLU.
        b_BH: strength of the correction before its sigmoid.
        a_BH: step sizes before bias and softplus.
        conv_weight_ET: of the convolution, which has no bias.
        dt_bias_H, A_log_H: of the decay.
        norm_weight_V: of the norm.
        tail_BTE: the inputs of the convolution before it, contiguous; overwritten.
        memory_BHKV: fp32 (fp64 where all is), contiguous; overwritten.
        eps: of the norm.
        negative_eigenvalues: corrections are twice as strong.

    Returns:
        y (B, H, V) in the dtype of `qkv_BE`.
    """
    heads, keys, values = memory_BHKV.shape[1:]
    compute = memory_BHKV.dtype
    convolved_BE = conv_step(qkv_BE, conv_weight_ET, None, tail_BTE, compute)
    if kernels.serve_eagerly(qkv_BE) and _fits(keys, values):
        from longspan.ops.triton.delta_step import run_step

        gates = (z_BHV, b_BH, a_BH, dt_bias_H, A_log_H, norm_weight_V)
        return run_step(convolved_BE, *gates, memory_BHKV, eps=eps, negative_eigenvalues=negative_eigenvalues)
    q, k, v = (
        part.view(part.shape[0], heads, -1)
        for part in convolved_BE.split_with_sizes([heads * keys, heads * keys, heads * values], dim=-1)
    )
    beta_BH = torch.sigmoid(b_BH.to(compute)) * (2.0 if negative_eigenvalues else 1.0)
    g_BH = -torch.exp(A_log_H.to(compute)) * F.softplus(a_BH.to(compute) + dt_bias_H.to(compute))
    o_BHV, _ = gated_delta_step(q, k, v, g_BH, beta_BH, memory_BHKV, overwrite=True)
    normed_BHV = F.rms_norm(o_BHV, (values,), eps=eps) * norm_weight_V.to(compute)
    return (normed_BHV * F.silu(z_BHV.to(compute))).to(qkv_BE.dtype)


def _fits(keys: int, values: int) -> bool:
    padded = 1 << (values - 1).bit_length()
    return keys <= LARGEST_KERNEL_KEY and padded << (keys - 1).bit_length() <= LARGEST_MEMORY
