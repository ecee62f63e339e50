"""The kernels of Mamba-1's selective scan: segments from nothing, states between them, outputs and gradients.

A program is one warp with the states of a few channels in registers; see `selective_scan` for how they follow each
other.

Shapes: B rows, T tokens, E channels, N state, J chunks of Q tokens, S segments of whole chunks, I blocks of channels.
"""

import triton
import triton.language as tl

from longspan.ops.triton.tiles import LOG2_E, exp2

ENDLESS = tl.constexpr(1e30)


@triton.jit
def _numbers(start, at, there):
    return tl.load(start + at, mask=there, other=0.0).to(tl.float32)


@triton.jit
def _place(BLOCK_E: tl.constexpr, BLOCK_N: tl.constexpr):
    """Channels, states, segment and row of this program."""
    e, n = tl.program_id(0) * BLOCK_E + tl.arange(0, BLOCK_E), tl.arange(0, BLOCK_N)
    return e, n, tl.program_id(1), tl.program_id(2).to(tl.int64)


@triton.jit
def _rates(A_ptr, e, n, E: tl.constexpr, N: tl.constexpr):
    """A for powers of 2, and never quite 0, so that an endless step forgets everything; where there is any of it."""
    inside = (e < E)[:, None] & (n < N)[None, :]
    return tl.minimum(_numbers(A_ptr, e[:, None] * N + n[None, :], inside) * LOG2_E, -1e-27), inside


@triton.jit
def _decaying(dt, starts_ptr, at, there, DOCS: tl.constexpr):
    """The step sizes for the decay: endless at the first token of a document."""
    if DOCS:
        dt = tl.where(tl.load(starts_ptr + at, mask=there, other=0) != 0, ENDLESS, dt)
    return dt


@triton.jit
def segment_ends(
    x_ptr, dt_ptr, A_ptr, B_ptr, starts_ptr, kept_ptr, added_ptr, time, x_row, dt_row, B_row,
    x_token: tl.constexpr, dt_token: tl.constexpr, B_token: tl.constexpr,
    E: tl.constexpr, N: tl.constexpr, TOKENS: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_N: tl.constexpr,
    DOCS: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """What a segment keeps of the state before it, and what it adds."""
    e, n, segment, row = _place(BLOCK_E, BLOCK_N)
    A, inside = _rates(A_ptr, e, n, E, N)
    state = tl.zeros((BLOCK_E, BLOCK_N), tl.float32)
    passed = tl.zeros((BLOCK_E,), tl.float32)
    for step in range(TOKENS):
        t = segment * TOKENS + step
        here, there = (e < E) & (t < time), (n < N) & (t < time)
        x = _numbers(x_ptr + row * x_row, t * x_token + e, here)
        dt = _numbers(dt_ptr + row * dt_row, t * dt_token + e, here)
        B = _numbers(B_ptr + row * B_row, t * B_token + n, there)
        decaying = _decaying(dt, starts_ptr, row * time + t, t < time, DOCS)
        state = state * exp2(decaying[:, None] * A, FAST) + (dt * x)[:, None] * B[None, :]
        passed = tl.minimum(passed + decaying, ENDLESS)
    at = ((row * tl.num_programs(1) + segment) * E + e[:, None]) * N + n[None, :]
    tl.store(added_ptr + at, state, mask=inside)
    tl.store(kept_ptr + at, exp2(passed[:, None] * A, FAST), mask=inside)


@triton.jit
def segment_starts(
    dt_ptr, A_ptr, C_ptr, starts_ptr, dy_ptr, kept_ptr, added_ptr, time, dt_row, C_row, dy_row,
    dt_token: tl.constexpr, C_token: tl.constexpr, dy_token: tl.constexpr,
    E: tl.constexpr, N: tl.constexpr, TOKENS: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_N: tl.constexpr,
    DOCS: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """What a segment keeps of the gradient of the state after it, and what its tokens add."""
    e, n, segment, row = _place(BLOCK_E, BLOCK_N)
    A, inside = _rates(A_ptr, e, n, E, N)
    dstate = tl.zeros((BLOCK_E, BLOCK_N), tl.float32)
    passed = tl.zeros((BLOCK_E,), tl.float32)
    for later in range(TOKENS):
        t = segment * TOKENS + TOKENS - 1 - later
        here, there = (e < E) & (t < time), (n < N) & (t < time)
        dt = _numbers(dt_ptr + row * dt_row, t * dt_token + e, here)
        dy = _numbers(dy_ptr + row * dy_row, t * dy_token + e, here)
        C = _numbers(C_ptr + row * C_row, t * C_token + n, there)
        decaying = _decaying(dt, starts_ptr, row * time + t, t < time, DOCS)
        dstate = (dstate + dy[:, None] * C[None, :]) * exp2(decaying[:, None] * A, FAST)
        passed = tl.minimum(passed + decaying, ENDLESS)
    at = ((row * tl.num_programs(1) + segment) * E + e[:, None]) * N + n[None, :]
    tl.store(added_ptr + at, dstate, mask=inside)
    tl.store(kept_ptr + at, exp2(passed[:, None] * A, FAST), mask=inside)


@triton.jit
def pass_states(
    kept_ptr, added_ptr, first_ptr, segments,
    E: tl.constexpr, N: tl.constexpr, BLOCK: tl.constexpr, FIRST: tl.constexpr, BACK: tl.constexpr,
):  # fmt: skip
    """Replaces what each segment adds by the state before it (BACK: by the gradient of the state after it)."""
    at, row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), tl.program_id(1).to(tl.int64)
    inside = at < E * N
    state = tl.zeros((BLOCK,), tl.float32)
    if FIRST:
        state += tl.load(first_ptr + (row * N + at % N) * E + at // N, mask=inside, other=0.0).to(tl.float32)
    for step in range(segments):
        segment = step
        if BACK:
            segment = segments - 1 - step
        here = (row * segments + segment) * E * N + at
        kept, added = tl.load(kept_ptr + here, mask=inside), tl.load(added_ptr + here, mask=inside)
        tl.store(added_ptr + here, state, mask=inside)
        state = state * kept + added


@triton.jit
def scan_forward(
    x_ptr, dt_ptr, A_ptr, B_ptr, C_ptr, D_ptr, starts_ptr, before_ptr, y_ptr, final_ptr, states_ptr, time, chunks,
    x_row, dt_row, B_row, C_row,
    x_token: tl.constexpr, dt_token: tl.constexpr, B_token: tl.constexpr, C_token: tl.constexpr,
    E: tl.constexpr, N: tl.constexpr, Q: tl.constexpr, CHUNKS: tl.constexpr, BLOCK_E: tl.constexpr,
    BLOCK_N: tl.constexpr, DOCS: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """y of a segment, the state before each of its chunks and, from the last segment, the final state."""
    e, n, segment, row = _place(BLOCK_E, BLOCK_N)
    A, inside = _rates(A_ptr, e, n, E, N)
    D = _numbers(D_ptr, e, e < E)
    state = _numbers(before_ptr, ((row * tl.num_programs(1) + segment) * E + e[:, None]) * N + n[None, :], inside)
    for chunk in range(segment * CHUNKS, tl.minimum(segment * CHUNKS + CHUNKS, chunks)):
        tl.store(states_ptr + ((row * chunks + chunk) * E + e[:, None]) * N + n[None, :], state, mask=inside)
        for step in range(Q):
            t = chunk * Q + step
            here, there = (e < E) & (t < time), (n < N) & (t < time)
            x = _numbers(x_ptr + row * x_row, t * x_token + e, here)
            dt = _numbers(dt_ptr + row * dt_row, t * dt_token + e, here)
            B = _numbers(B_ptr + row * B_row, t * B_token + n, there)
            C = _numbers(C_ptr + row * C_row, t * C_token + n, there)
            decaying = _decaying(dt, starts_ptr, row * time + t, t < time, DOCS)
            kept = state * exp2(decaying[:, None] * A, FAST)
            state = kept + (dt * x)[:, None] * B[None, :]
            y = tl.sum(state * C[None, :], 1) + D * x
            tl.store(y_ptr + (row * time + t) * E + e, y.to(y_ptr.dtype.element_ty), mask=here)
    last = segment == tl.num_programs(1) - 1
    tl.store(final_ptr + (row * N + n[None, :]) * E + e[:, None], state, mask=inside & last)


@triton.jit
def scan_backward(
    x_ptr, dt_ptr, A_ptr, B_ptr, C_ptr, D_ptr, starts_ptr, states_ptr, dy_ptr, dafter_ptr, scratch_ptr,
    dx_ptr, ddt_ptr, dA_ptr, dB_ptr, dC_ptr, dD_ptr, dinitial_ptr, rows, time, chunks,
    x_row, dt_row, B_row, C_row, dy_row,
    x_token: tl.constexpr, dt_token: tl.constexpr, B_token: tl.constexpr, C_token: tl.constexpr, dy_token: tl.constexpr,
    E: tl.constexpr, N: tl.constexpr, Q: tl.constexpr, CHUNKS: tl.constexpr, BLOCK_E: tl.constexpr,
    BLOCK_N: tl.constexpr, DOCS: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """All gradients of a segment; those of B and C for one block of channels."""
    e, n, segment, row = _place(BLOCK_E, BLOCK_N)
    part = row * tl.num_programs(1) + segment
    A, inside = _rates(A_ptr, e, n, E, N)
    D = _numbers(D_ptr, e, e < E)
    dstate = _numbers(dafter_ptr, (part * E + e[:, None]) * N + n[None, :], inside)
    dA, dD = tl.zeros((BLOCK_E, BLOCK_N), tl.float32), tl.zeros((BLOCK_E,), tl.float32)
    tile = tl.arange(0, BLOCK_E)[:, None] * BLOCK_N + n[None, :]
    scratch = scratch_ptr + (part * tl.num_programs(0) + tl.program_id(0)) * Q * BLOCK_E * BLOCK_N
    first, stop = segment * CHUNKS, tl.minimum(segment * CHUNKS + CHUNKS, chunks)
    x_now, dt_now, dy_now = x_ptr + row * x_row, dt_ptr + row * dt_row, dy_ptr + row * dy_row
    B_now, C_now = B_ptr + row * B_row, C_ptr + row * C_row
    for back in range(stop - first):
        chunk = stop - 1 - back
        state = _numbers(states_ptr, ((row * chunks + chunk) * E + e[:, None]) * N + n[None, :], inside)
        t = chunk * Q
        x, dt = _numbers(x_now, t * x_token + e, e < E), _numbers(dt_now, t * dt_token + e, e < E)
        B = _numbers(B_now, t * B_token + n, n < N)
        for step in range(Q):
            t = chunk * Q + step
            here, there = (e < E) & (t + 1 < time), (n < N) & (t + 1 < time)
            x_next = _numbers(x_now, (t + 1) * x_token + e, here)
            dt_next = _numbers(dt_now, (t + 1) * dt_token + e, here)
            B_next = _numbers(B_now, (t + 1) * B_token + n, there)
            decaying = _decaying(dt, starts_ptr, row * time + t, t < time, DOCS)
            kept = state * exp2(decaying[:, None] * A, FAST)
            # What is kept of the state before is what both gradients of the decay need.
            tl.store(scratch + step * BLOCK_E * BLOCK_N + tile, kept.to(scratch_ptr.dtype.element_ty))
            state = kept + (dt * x)[:, None] * B[None, :]
            x, dt, B = x_next, dt_next, B_next
        tl.debug_barrier()
        t = chunk * Q + Q - 1
        here, there = (e < E) & (t < time), (n < N) & (t < time)
        x, dt = _numbers(x_now, t * x_token + e, here), _numbers(dt_now, t * dt_token + e, here)
        dy = _numbers(dy_now, t * dy_token + e, here)
        B, C = _numbers(B_now, t * B_token + n, there), _numbers(C_now, t * C_token + n, there)
        kept_next = tl.load(scratch + (Q - 1) * BLOCK_E * BLOCK_N + tile)
        for later in range(Q):
            step = Q - 1 - later
            t = chunk * Q + step
            here, there = (e < E) & (t < time), (n < N) & (t < time)
            # What the token before needs is on its way while this one is worked on.
            before_here, before_there = (e < E) & (t > 0) & (t <= time), (n < N) & (t > 0) & (t <= time)
            x_next = _numbers(x_now, (t - 1) * x_token + e, before_here)
            dt_next = _numbers(dt_now, (t - 1) * dt_token + e, before_here)
            dy_next = _numbers(dy_now, (t - 1) * dy_token + e, before_here)
            B_next = _numbers(B_now, (t - 1) * B_token + n, before_there)
            C_next = _numbers(C_now, (t - 1) * C_token + n, before_there)
            kept = kept_next.to(tl.float32)
            kept_next = tl.load(scratch + tl.maximum(step - 1, 0) * BLOCK_E * BLOCK_N + tile)
            driving = dt * x
            dstate += dy[:, None] * C[None, :]
            dC = tl.sum(dy[:, None] * (kept + driving[:, None] * B[None, :]), 0)
            dB = tl.sum(dstate * driving[:, None], 0)
            ddriving = tl.sum(dstate * B[None, :], 1)
            dlog = dstate * kept
            dA += dlog * dt[:, None]
            dD += dy * x
            ddt = ddriving * x + tl.sum(dlog * A, 1) * (1.0 / LOG2_E)
            dx = ddriving * dt + D * dy
            decaying = _decaying(dt, starts_ptr, row * time + t, t < time, DOCS)
            dstate *= exp2(decaying[:, None] * A, FAST)
            tl.store(dx_ptr + (row * time + t) * E + e, dx.to(dx_ptr.dtype.element_ty), mask=here)
            tl.store(ddt_ptr + (row * time + t) * E + e, ddt.to(ddt_ptr.dtype.element_ty), mask=here)
            at = ((tl.program_id(0) * rows + row) * time + t) * N + n
            tl.store(dB_ptr + at, dB, mask=there)
            tl.store(dC_ptr + at, dC, mask=there)
            x, dt, dy, B, C = x_next, dt_next, dy_next, B_next, C_next
        tl.debug_barrier()
    tl.store(dA_ptr + (part * E + e[:, None]) * N + n[None, :], dA, mask=inside)
    tl.store(dD_ptr + part * E + e, dD, mask=e < E)
    tl.store(dinitial_ptr + (row * N + n[None, :]) * E + e[:, None], dstate, mask=inside & (segment == 0))
