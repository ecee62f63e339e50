"""One token of a Mamba-2 layer between its projections, on states that are overwritten: each is read and written once.

Two kernels: the convolution with its SiLU, which shifts its inputs, and the scan with softplus, decay and skip.

Shapes: B rows, E channels of the convolution, K taps, H heads, P head dim, N state.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from longspan.ops.triton.device import on_its_device

CHANNELS = 256
"""Channels of the convolution to a program."""
STATE_ROWS, WARPS = 32, 4
"""Rows of P of one head's state to a program, and its warps."""


@triton.jit
def _convolve(
    x_ptr, weight_ptr, bias_ptr, tail_ptr, y_ptr, x_row: tl.constexpr,
    E: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, e = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    there = e < E
    x = tl.load(x_ptr + row * x_row + e, mask=there, other=0.0)
    total = tl.load(bias_ptr + e, mask=there, other=0.0).to(tl.float32)
    total += x.to(tl.float32) * tl.load(weight_ptr + e * K + K - 1, mask=there, other=0.0).to(tl.float32)
    tail_ptr += row * (K - 1) * E + e
    for k in tl.static_range(K - 1):
        before = tl.load(tail_ptr + k * E, mask=there, other=0.0)
        total += before.to(tl.float32) * tl.load(weight_ptr + e * K + k, mask=there, other=0.0).to(tl.float32)
        if k > 0:
            tl.store(tail_ptr + (k - 1) * E, before, mask=there)
    tl.store(tail_ptr + (K - 2) * E, x.to(tail_ptr.dtype.element_ty), mask=there)
    y = total * tl.sigmoid(total)
    tl.store(y_ptr + row * E + e, y.to(y_ptr.dtype.element_ty), mask=there)


@triton.jit
def _scan(
    xBC_ptr, dt_ptr, dt_bias_ptr, A_log_ptr, D_ptr, state_ptr, y_ptr,
    xBC_row: tl.constexpr, dt_row: tl.constexpr,
    H: tl.constexpr, P: tl.constexpr, N: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    p, n = tl.program_id(2) * ROWS + tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    rate = tl.load(dt_ptr + row * dt_row + head).to(tl.float32) + tl.load(dt_bias_ptr + head).to(tl.float32)
    dt = tl.where(rate > 20.0, rate, tl.log(1.0 + tl.exp(tl.minimum(rate, 20.0))))
    decay = tl.exp(-dt * tl.exp(tl.load(A_log_ptr + head).to(tl.float32)))
    xBC_ptr += row * xBC_row
    x = tl.load(xBC_ptr + head * P + p, mask=p < P, other=0.0).to(tl.float32)
    B = tl.load(xBC_ptr + H * P + n, mask=n < N, other=0.0).to(tl.float32)
    C = tl.load(xBC_ptr + H * P + N + n, mask=n < N, other=0.0).to(tl.float32)
    at = ((row * H + head) * P + p[:, None]) * N + n[None, :]
    there = (p < P)[:, None] & (n < N)[None, :]
    state = tl.load(state_ptr + at, mask=there, other=0.0) * decay + (x * dt)[:, None] * B[None, :]
    tl.store(state_ptr + at, state, mask=there)
    y = tl.sum(state * C[None, :], 1) + x * tl.load(D_ptr + head).to(tl.float32)
    tl.store(y_ptr + (row * H + head) * P + p, y.to(y_ptr.dtype.element_ty), mask=p < P)


@on_its_device
def run_step(
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
    """See `ops.mamba2_step.mamba2_step`."""
    rows, heads, head_dim, size = state_BHPN.shape
    channels, taps = conv_weight_EK.shape
    # Read by the scan alone, which computes in fp32.
    convolved = xBC_BE.new_empty(rows, channels, dtype=torch.float32)
    _convolve[(rows, triton.cdiv(channels, CHANNELS))](
        xBC_BE, conv_weight_EK, conv_bias_E, tail_BKE, convolved,
        x_row=xBC_BE.stride(0), E=channels, K=taps, BLOCK=CHANNELS, num_warps=2,
    )  # fmt: skip
    y = xBC_BE.new_empty(rows, heads, head_dim)
    tile = min(STATE_ROWS, triton.next_power_of_2(head_dim))
    _scan[(rows, heads, triton.cdiv(head_dim, tile))](
        convolved, dt_BH, dt_bias_H, A_log_H, D_H, state_BHPN, y,
        xBC_row=channels, dt_row=dt_BH.stride(0),
        H=heads, P=head_dim, N=size, ROWS=tile, COLUMNS=triton.next_power_of_2(size), num_warps=WARPS,
    )  # fmt: skip
    return y
