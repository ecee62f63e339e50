"""One token of Mamba-2's scan with softplus, decay and skip, on a state that it overwrites: read and written once.

Shapes: B rows, E channels (x, B, C), H heads, P head dim, N state.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from longspan.ops.triton.device import on_its_device
from longspan.ops.triton.softplus import softplus

STATE_ROWS, WARPS = 32, 4
"""Rows of P of one head's state to a program, and its warps."""


@triton.jit
def _scan(
    xBC_ptr, dt_ptr, dt_bias_ptr, A_log_ptr, D_ptr, state_ptr, y_ptr,
    xBC_row: tl.constexpr, dt_row: tl.constexpr,
    H: tl.constexpr, P: tl.constexpr, N: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    p, n = tl.program_id(2) * ROWS + tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    rate = tl.load(dt_ptr + row * dt_row + head).to(tl.float32) + tl.load(dt_bias_ptr + head).to(tl.float32)
    dt = softplus(rate)
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
    xBC_BE: Tensor, dt_BH: Tensor, dt_bias_H: Tensor, A_log_H: Tensor, D_H: Tensor, state_BHPN: Tensor
) -> Tensor:
    """See `ops.mamba2_step.mamba2_step`; xBC (contiguous) is convolved, the result has the dtype of dt."""
    rows, heads, head_dim, size = state_BHPN.shape
    y = dt_BH.new_empty(rows, heads, head_dim)
    tile = min(STATE_ROWS, triton.next_power_of_2(head_dim))
    _scan[(rows, heads, triton.cdiv(head_dim, tile))](
        xBC_BE, dt_BH, dt_bias_H, A_log_H, D_H, state_BHPN, y,
        xBC_row=xBC_BE.shape[1], dt_row=dt_BH.stride(0),
        H=heads, P=head_dim, N=size, ROWS=tile, COLUMNS=triton.next_power_of_2(size), num_warps=WARPS,
    )  # fmt: skip
    return y
