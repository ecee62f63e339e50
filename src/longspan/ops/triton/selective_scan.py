"""The selective scan of Mamba-1: every program carries the states of a few channels through a row.

Decays differ per channel and state, so no product spans tokens: the work is a few operations per token, channel and
state, and a program is one warp, whose sums need no barrier. Kept for the backward is one state per chunk; the states
inside a chunk are computed again into a scratch that stays in cache. The gradients of B and C are summed per program
and then in one order: the same bits in every run.

Shapes: B rows, T tokens, E channels, N state, J chunks of Q tokens, I blocks of channels.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from longspan.ops.triton.device import on_its_device

CHUNK = 16
CHANNELS = 32


@triton.jit
def _starts(starts_ptr, at, there, DOCS: tl.constexpr):
    """Whether a token is the first of a document."""
    if DOCS:
        return tl.load(starts_ptr + at, mask=there, other=0) != 0
    return False


@triton.jit
def _forward(
    x_ptr, dt_ptr, A_ptr, B_ptr, C_ptr, D_ptr, starts_ptr, initial_ptr, y_ptr, final_ptr, states_ptr, time, chunks,
    x_row, dt_row, B_row, C_row,
    x_token: tl.constexpr, dt_token: tl.constexpr, B_token: tl.constexpr, C_token: tl.constexpr,
    E: tl.constexpr, N: tl.constexpr, Q: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_N: tl.constexpr,
    DOCS: tl.constexpr, INITIAL: tl.constexpr,
):  # fmt: skip
    e, n = tl.program_id(0) * BLOCK_E + tl.arange(0, BLOCK_E), tl.arange(0, BLOCK_N)
    row = tl.program_id(1).to(tl.int64)
    inside = (e < E)[:, None] & (n < N)[None, :]
    A = tl.load(A_ptr + e[:, None] * N + n[None, :], mask=inside, other=0.0).to(tl.float32)
    D = tl.load(D_ptr + e, mask=e < E, other=0.0).to(tl.float32)
    state = tl.zeros((BLOCK_E, BLOCK_N), tl.float32)
    if INITIAL:
        state += tl.load(initial_ptr + (row * N + n[None, :]) * E + e[:, None], mask=inside, other=0.0).to(tl.float32)
    for chunk in range(chunks):
        tl.store(states_ptr + ((row * chunks + chunk) * E + e[:, None]) * N + n[None, :], state, mask=inside)
        for step in range(Q):
            t = chunk * Q + step
            here, there = (e < E) & (t < time), (n < N) & (t < time)
            x = tl.load(x_ptr + row * x_row + t * x_token + e, mask=here, other=0.0).to(tl.float32)
            dt = tl.load(dt_ptr + row * dt_row + t * dt_token + e, mask=here, other=0.0).to(tl.float32)
            B = tl.load(B_ptr + row * B_row + t * B_token + n, mask=there, other=0.0).to(tl.float32)
            C = tl.load(C_ptr + row * C_row + t * C_token + n, mask=there, other=0.0).to(tl.float32)
            kept = state * tl.exp(dt[:, None] * A)
            if DOCS:
                kept = tl.where(_starts(starts_ptr, row * time + t, t < time, DOCS), 0.0, kept)
            state = kept + (dt * x)[:, None] * B[None, :]
            y = tl.sum(state * C[None, :], 1) + D * x
            tl.store(y_ptr + (row * time + t) * E + e, y.to(y_ptr.dtype.element_ty), mask=here)
    tl.store(final_ptr + (row * N + n[None, :]) * E + e[:, None], state, mask=inside)


@triton.jit
def _backward(
    x_ptr, dt_ptr, A_ptr, B_ptr, C_ptr, D_ptr, starts_ptr, states_ptr, dy_ptr, dfinal_ptr, scratch_ptr,
    dx_ptr, ddt_ptr, dA_ptr, dB_ptr, dC_ptr, dD_ptr, dinitial_ptr, rows, time, chunks,
    x_row, dt_row, B_row, C_row, dy_row,
    x_token: tl.constexpr, dt_token: tl.constexpr, B_token: tl.constexpr, C_token: tl.constexpr, dy_token: tl.constexpr,
    E: tl.constexpr, N: tl.constexpr, Q: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_N: tl.constexpr,
    DOCS: tl.constexpr, FINAL: tl.constexpr,
):  # fmt: skip
    e, n = tl.program_id(0) * BLOCK_E + tl.arange(0, BLOCK_E), tl.arange(0, BLOCK_N)
    row = tl.program_id(1).to(tl.int64)
    inside = (e < E)[:, None] & (n < N)[None, :]
    A = tl.load(A_ptr + e[:, None] * N + n[None, :], mask=inside, other=0.0).to(tl.float32)
    D = tl.load(D_ptr + e, mask=e < E, other=0.0).to(tl.float32)
    dstate = tl.zeros((BLOCK_E, BLOCK_N), tl.float32)
    if FINAL:
        dstate += tl.load(dfinal_ptr + (row * N + n[None, :]) * E + e[:, None], mask=inside, other=0.0)
    dA, dD = tl.zeros((BLOCK_E, BLOCK_N), tl.float32), tl.zeros((BLOCK_E,), tl.float32)
    tile = tl.arange(0, BLOCK_E)[:, None] * BLOCK_N + n[None, :]
    scratch = scratch_ptr + (row * tl.num_programs(0) + tl.program_id(0)) * Q * BLOCK_E * BLOCK_N
    for back in range(chunks):
        chunk = chunks - 1 - back
        state = tl.load(states_ptr + ((row * chunks + chunk) * E + e[:, None]) * N + n[None, :], mask=inside, other=0.0)
        for step in range(Q):
            t = chunk * Q + step
            here, there = (e < E) & (t < time), (n < N) & (t < time)
            x = tl.load(x_ptr + row * x_row + t * x_token + e, mask=here, other=0.0).to(tl.float32)
            dt = tl.load(dt_ptr + row * dt_row + t * dt_token + e, mask=here, other=0.0).to(tl.float32)
            B = tl.load(B_ptr + row * B_row + t * B_token + n, mask=there, other=0.0).to(tl.float32)
            kept = state * tl.exp(dt[:, None] * A)
            if DOCS:
                kept = tl.where(_starts(starts_ptr, row * time + t, t < time, DOCS), 0.0, kept)
            # What is kept of the state before is what both gradients of the decay need.
            tl.store(scratch + step * BLOCK_E * BLOCK_N + tile, kept)
            state = kept + (dt * x)[:, None] * B[None, :]
        tl.debug_barrier()
        for later in range(Q):
            step = Q - 1 - later
            t = chunk * Q + step
            here, there = (e < E) & (t < time), (n < N) & (t < time)
            x = tl.load(x_ptr + row * x_row + t * x_token + e, mask=here, other=0.0).to(tl.float32)
            dt = tl.load(dt_ptr + row * dt_row + t * dt_token + e, mask=here, other=0.0).to(tl.float32)
            dy = tl.load(dy_ptr + row * dy_row + t * dy_token + e, mask=here, other=0.0).to(tl.float32)
            B = tl.load(B_ptr + row * B_row + t * B_token + n, mask=there, other=0.0).to(tl.float32)
            C = tl.load(C_ptr + row * C_row + t * C_token + n, mask=there, other=0.0).to(tl.float32)
            kept = tl.load(scratch + step * BLOCK_E * BLOCK_N + tile)
            driving = dt * x
            dstate += dy[:, None] * C[None, :]
            dC = tl.sum(dy[:, None] * (kept + driving[:, None] * B[None, :]), 0)
            dB = tl.sum(dstate * driving[:, None], 0)
            ddriving = tl.sum(dstate * B[None, :], 1)
            dlog = dstate * kept
            dA += dlog * dt[:, None]
            dD += dy * x
            ddt = ddriving * x + tl.sum(dlog * A, 1)
            dx = ddriving * dt + D * dy
            dstate = dstate * tl.exp(dt[:, None] * A)
            if DOCS:
                dstate = tl.where(_starts(starts_ptr, row * time + t, t < time, DOCS), 0.0, dstate)
            tl.store(dx_ptr + (row * time + t) * E + e, dx.to(dx_ptr.dtype.element_ty), mask=here)
            tl.store(ddt_ptr + (row * time + t) * E + e, ddt.to(ddt_ptr.dtype.element_ty), mask=here)
            part = ((tl.program_id(0) * rows + row) * time + t) * N + n
            tl.store(dB_ptr + part, dB, mask=there)
            tl.store(dC_ptr + part, dC, mask=there)
        tl.debug_barrier()
    tl.store(dA_ptr + (row * E + e[:, None]) * N + n[None, :], dA, mask=inside)
    tl.store(dD_ptr + row * E + e, dD, mask=e < E)
    tl.store(dinitial_ptr + (row * N + n[None, :]) * E + e[:, None], dstate, mask=inside)


def _laid_out(values: Tensor) -> Tensor:
    return values if values.stride(-1) == 1 else values.contiguous()


def _blocks(state: int, channels: int) -> tuple[int, int]:
    """Channels of a program and its width of the state."""
    block = int(triton.next_power_of_2(state))
    return min(max(CHANNELS * 16 // block, 1), int(triton.next_power_of_2(channels))), block


@torch.library.custom_op("longspan::selective_scan", mutates_args=())
def selective_scan(
    x_BTE: Tensor,
    dt_BTE: Tensor,
    A_EN: Tensor,
    B_BTN: Tensor,
    C_BTN: Tensor,
    D_E: Tensor,
    starts_BT: Tensor | None,
    initial_BNE: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`ops.selective_scan.selective_scan` with the first tokens of documents marked; the third result is kept."""
    return _run_forward(x_BTE, dt_BTE, A_EN, B_BTN, C_BTN, D_E, starts_BT, initial_BNE)


@on_its_device
def _run_forward(
    x_BTE: Tensor,
    dt_BTE: Tensor,
    A_EN: Tensor,
    B_BTN: Tensor,
    C_BTN: Tensor,
    D_E: Tensor,
    starts_BT: Tensor | None,
    initial_BNE: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    x, dt, B, C = (_laid_out(z) for z in (x_BTE, dt_BTE, B_BTN, C_BTN))
    rows, time, channels = x.shape
    state, chunks = A_EN.shape[1], triton.cdiv(time, CHUNK)
    y, final, states = _like(x, state)
    block_e, block_n = _blocks(state, channels)
    _forward[(triton.cdiv(channels, block_e), rows)](
        x, dt, A_EN.contiguous(), B, C, D_E.contiguous(), x if starts_BT is None else starts_BT.to(torch.uint8),
        x if initial_BNE is None else initial_BNE.contiguous(), y, final, states, time, chunks,
        *(z.stride(0) for z in (x, dt, B, C)), *(z.stride(1) for z in (x, dt, B, C)),
        E=channels, N=state, Q=CHUNK, BLOCK_E=block_e, BLOCK_N=block_n, DOCS=starts_BT is not None,
        INITIAL=initial_BNE is not None, num_warps=1,
    )  # fmt: skip
    return y, final, states


def _like(x_BTE: Tensor, state: int) -> tuple[Tensor, Tensor, Tensor]:
    rows, time, channels = x_BTE.shape
    final = x_BTE.new_empty(rows, state, channels, dtype=torch.float32)
    states = x_BTE.new_empty(rows, (time + CHUNK - 1) // CHUNK, channels, state, dtype=torch.float32)
    return torch.empty_like(x_BTE, memory_format=torch.contiguous_format), final, states


@selective_scan.register_fake
def _(
    x_BTE: Tensor,
    dt_BTE: Tensor,
    A_EN: Tensor,
    B_BTN: Tensor,
    C_BTN: Tensor,
    D_E: Tensor,
    starts_BT: Tensor | None,
    initial_BNE: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    return _like(x_BTE, A_EN.shape[1])


@torch.library.custom_op("longspan::selective_scan_backward", mutates_args=())
def selective_scan_backward(
    dy_BTE: Tensor,
    dfinal_BNE: Tensor | None,
    states: Tensor,
    x_BTE: Tensor,
    dt_BTE: Tensor,
    A_EN: Tensor,
    B_BTN: Tensor,
    C_BTN: Tensor,
    D_E: Tensor,
    starts_BT: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of x, dt, A, B, C, D and the initial state."""
    return _run_backward(dy_BTE, dfinal_BNE, states, x_BTE, dt_BTE, A_EN, B_BTN, C_BTN, D_E, starts_BT)


@on_its_device
def _run_backward(
    dy_BTE: Tensor,
    dfinal_BNE: Tensor | None,
    states: Tensor,
    x_BTE: Tensor,
    dt_BTE: Tensor,
    A_EN: Tensor,
    B_BTN: Tensor,
    C_BTN: Tensor,
    D_E: Tensor,
    starts_BT: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    x, dt, B, C, dy = (_laid_out(z) for z in (x_BTE, dt_BTE, B_BTN, C_BTN, dy_BTE))
    rows, time, channels = x.shape
    state, chunks = A_EN.shape[1], states.shape[1]
    block_e, block_n = _blocks(state, channels)
    blocks = triton.cdiv(channels, block_e)
    scratch = x.new_empty(blocks * rows, CHUNK, block_e, block_n, dtype=torch.float32)
    dx, ddt = (torch.empty_like(z, memory_format=torch.contiguous_format) for z in (x, dt))
    dA = x.new_empty(rows, channels, state, dtype=torch.float32)
    dD = x.new_empty(rows, channels, dtype=torch.float32)
    dB, dC = (x.new_empty(blocks, rows, time, state, dtype=torch.float32) for _ in range(2))
    dinitial = x.new_empty(rows, state, channels, dtype=torch.float32)
    _backward[(blocks, rows)](
        x, dt, A_EN.contiguous(), B, C, D_E.contiguous(), x if starts_BT is None else starts_BT.to(torch.uint8),
        states, dy, x if dfinal_BNE is None else dfinal_BNE.contiguous(), scratch,
        dx, ddt, dA, dB, dC, dD, dinitial, rows, time, chunks,
        *(z.stride(0) for z in (x, dt, B, C, dy)), *(z.stride(1) for z in (x, dt, B, C, dy)),
        E=channels, N=state, Q=CHUNK, BLOCK_E=block_e, BLOCK_N=block_n, DOCS=starts_BT is not None,
        FINAL=dfinal_BNE is not None, num_warps=1,
    )  # fmt: skip
    return dx, ddt, dA.sum(0), dB.sum(0).to(B.dtype), dC.sum(0).to(C.dtype), dD.sum(0), dinitial


@selective_scan_backward.register_fake
def _(
    dy_BTE: Tensor,
    dfinal_BNE: Tensor | None,
    states: Tensor,
    x_BTE: Tensor,
    dt_BTE: Tensor,
    A_EN: Tensor,
    B_BTN: Tensor,
    C_BTN: Tensor,
    D_E: Tensor,
    starts_BT: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    dx, ddt, dB, dC = (
        torch.empty_like(z, memory_format=torch.contiguous_format) for z in (x_BTE, dt_BTE, B_BTN, C_BTN)
    )
    dA, dD = (z.new_empty(z.shape, dtype=torch.float32) for z in (A_EN, D_E))
    return dx, ddt, dA, dB, dC, dD, x_BTE.new_empty(x_BTE.shape[0], A_EN.shape[1], x_BTE.shape[2], dtype=torch.float32)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    ctx.set_materialize_grads(False)
    ctx.initial = inputs[7] is not None
    ctx.save_for_backward(output[2], *inputs[:7])


def _differentiate(ctx: Any, dy: Tensor | None, dfinal: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    states, *inputs = ctx.saved_tensors
    dy = torch.zeros_like(inputs[0], memory_format=torch.contiguous_format) if dy is None else dy
    *gradients, dinitial = selective_scan_backward(dy, dfinal, states, *inputs)
    gradients = [gradient.to(z.dtype) for gradient, z in zip(gradients, inputs[:6], strict=True)]
    return *gradients, None, dinitial if ctx.initial else None


selective_scan.register_autograd(_differentiate, setup_context=_save)
