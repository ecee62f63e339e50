"""One token of Mamba-1's scan with softplus, decays, skip and gate, on a state that it overwrites: read, written once.

A program goes through some rows with the decay rates of its channels in registers.

Shapes: B rows, E channels, N state.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from longspan.ops.triton.device import on_its_device
from longspan.ops.triton.softplus import softplus

CHANNELS, WARPS = 128, 4
ROWS = 8
"""To a program, where there are many."""
MANY_ROWS = 512


@triton.jit
def _scan(
    x_ptr, dt_ptr, BC_ptr, z_ptr, dt_bias_ptr, A_log_ptr, D_ptr, state_ptr, y_ptr, rows,
    x_row: tl.constexpr, dt_row: tl.constexpr, BC_row: tl.constexpr, z_row: tl.constexpr,
    E: tl.constexpr, N: tl.constexpr, STATES: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0) * ROWS
    e, n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK), tl.arange(0, STATES)
    mine, seen = e < E, n < N
    there = seen[:, None] & mine[None, :]
    rates = -tl.exp(tl.load(A_log_ptr + e[None, :] * N + n[:, None], mask=there, other=0.0).to(tl.float32))
    bias = tl.load(dt_bias_ptr + e, mask=mine, other=0.0).to(tl.float32)
    skip = tl.load(D_ptr + e, mask=mine, other=0.0).to(tl.float32)
    for number in range(tl.minimum(ROWS, rows - first)):
        row = first.to(tl.int64) + number
        x = tl.load(x_ptr + row * x_row + e, mask=mine, other=0.0).to(tl.float32)
        rate = tl.load(dt_ptr + row * dt_row + e, mask=mine, other=0.0).to(tl.float32) + bias
        dt = softplus(rate)
        B = tl.load(BC_ptr + row * BC_row + n, mask=seen, other=0.0).to(tl.float32)
        C = tl.load(BC_ptr + row * BC_row + N + n, mask=seen, other=0.0).to(tl.float32)
        at = (row * N + n[:, None]) * E + e[None, :]
        state = tl.load(state_ptr + at, mask=there, other=0.0)
        state = state * tl.exp(dt[None, :] * rates) + (dt * x)[None, :] * B[:, None]
        tl.store(state_ptr + at, state, mask=there)
        z = tl.load(z_ptr + row * z_row + e, mask=mine, other=0.0).to(tl.float32)
        y = (tl.sum(state * C[:, None], 0) + skip * x) * z * tl.sigmoid(z)
        tl.store(y_ptr + row * E + e, y.to(y_ptr.dtype.element_ty), mask=mine)


@on_its_device
def run_step(
    x_BE: Tensor,
    dt_BE: Tensor,
    BC_B2N: Tensor,
    z_BE: Tensor,
    dt_bias_E: Tensor,
    A_log_EN: Tensor,
    D_E: Tensor,
    state_BNE: Tensor,
) -> Tensor:
    """See `ops.mamba1_step.mamba1_step`."""
    rows, size, channels = state_BNE.shape
    y = x_BE.new_empty(rows, channels)
    each = ROWS if rows >= MANY_ROWS else 1
    _scan[(triton.cdiv(rows, each), triton.cdiv(channels, CHANNELS))](
        x_BE, dt_BE, BC_B2N, z_BE, dt_bias_E, A_log_EN, D_E, state_BNE, y, rows,
        x_row=x_BE.stride(0), dt_row=dt_BE.stride(0), BC_row=BC_B2N.stride(0), z_row=z_BE.stride(0),
        E=channels, N=size, STATES=triton.next_power_of_2(size), BLOCK=CHANNELS, ROWS=each, num_warps=WARPS,
    )  # fmt: skip
    return y
