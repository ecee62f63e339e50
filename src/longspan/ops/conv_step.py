"""One token of the short convolution in front of a recurrent mixer, on inputs in fixed memory that it overwrites.

Shapes: B rows, E channels, K taps.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from longspan.ops import kernels
from longspan.ops.causal_conv import causal_conv_step


def conv_step(
    x_BE: Tensor, weight_EK: Tensor, bias_E: Tensor | None, tail_BKE: Tensor, dtype: torch.dtype | None = None
) -> Tensor:
    """Convolution and SiLU of one more token.

    Args:
        x_BE: what enters it; rows may lie apart.
        weight_EK: one filter per channel; the last column multiplies `x_BE`.
        bias_E: added before the SiLU, or None.
        tail_BKE: the K-1 inputs before it, contiguous; overwritten.
        dtype: of the result; None: that of `x_BE`.

    Returns:
        (B, E).
    """
    dtype = dtype or x_BE.dtype
    if kernels.serve_eagerly(x_BE):
        from longspan.ops.triton.conv_step import run_conv

        return run_conv(x_BE, weight_EK, bias_E, tail_BKE, dtype)
    weight, bias = weight_EK.to(x_BE.dtype), None if bias_E is None else bias_E.to(x_BE.dtype)
    convolved_BE, tail = causal_conv_step(x_BE, weight, bias, tail_BKE.to(x_BE.dtype))
    tail_BKE.copy_(tail)
    return F.silu(convolved_BE).to(dtype)
