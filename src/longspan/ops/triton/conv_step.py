"""One token of a short convolution with SiLU, on the inputs before it, which it shifts: each is read and written once.

Shapes: B rows, E channels, K taps.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from longspan.ops.triton.device import on_its_device

CHANNELS = 256
"""Channels to a program."""


@triton.jit
def _convolve(
    x_ptr, weight_ptr, bias_ptr, tail_ptr, y_ptr, x_row: tl.constexpr,
    E: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    row, e = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    there = e < E
    x = tl.load(x_ptr + row * x_row + e, mask=there, other=0.0)
    total = x.to(tl.float32) * tl.load(weight_ptr + e * K + K - 1, mask=there, other=0.0).to(tl.float32)
    if BIAS:
        total += tl.load(bias_ptr + e, mask=there, other=0.0).to(tl.float32)
    tail_ptr += row * (K - 1) * E + e
    for k in tl.static_range(K - 1):
        before = tl.load(tail_ptr + k * E, mask=there, other=0.0)
        total += before.to(tl.float32) * tl.load(weight_ptr + e * K + k, mask=there, other=0.0).to(tl.float32)
        if k > 0:
            tl.store(tail_ptr + (k - 1) * E, before, mask=there)
    tl.store(tail_ptr + (K - 2) * E, x.to(tail_ptr.dtype.element_ty), mask=there)
    y = total * tl.sigmoid(total)
    tl.store(y_ptr + row * E + e, y.to(y_ptr.dtype.element_ty), mask=there)


@on_its_device
def run_conv(x_BE: Tensor, weight_EK: Tensor, bias_E: Tensor | None, tail_BKE: Tensor, dtype: torch.dtype) -> Tensor:
    """See `ops.conv_step.conv_step`."""
    rows, (channels, taps) = x_BE.shape[0], weight_EK.shape
    y = x_BE.new_empty(rows, channels, dtype=dtype)
    _convolve[(rows, triton.cdiv(channels, CHANNELS))](
        x_BE, weight_EK, weight_EK if bias_E is None else bias_E, tail_BKE, y,
        x_row=x_BE.stride(0), E=channels, K=taps, BLOCK=CHANNELS, BIAS=bias_E is not None, num_warps=2,
    )  # fmt: skip
    return y
