"""The selective scan of Mamba-1: every program carries the states of a few channels through a segment of a row.

Decays differ per channel and state, so no product spans tokens: the work is a few operations per token, channel and
state, and a program is one warp, whose sums need no barrier. Longer rows are cut into segments that run side by side: a
first pass finds what each adds to a state and keeps of it, a second runs over the segments, and the third begins each
with its state. The backward does the same from the end. Kept for the backward is one state per chunk; the states inside
a chunk are computed again into a scratch that stays in cache. The gradients of A, B, C and D are summed per program and
then in one order: the same bits in every run.

Shapes: B rows, T tokens, E channels, N state, J chunks of Q tokens, S segments of whole chunks, I blocks of channels.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from longspan.ops.triton.device import on_its_device
from longspan.ops.triton.tiles import LOG2_E, exp2, has_fast_exp2

CHUNK = 16
CHANNELS = 32
# Chunks of a segment: rows of no more are not cut.
SEGMENT = 16
PASSED = 256
# Of the states inside a chunk; None: that of x.
SCRATCH: torch.dtype | None = None
ENDLESS = tl.constexpr(1e30)


@triton.jit
def _numbers(start, at, there):
    return tl.load(start + at, mask=there, other=0.0).to(tl.float32)


@triton.jit
def _rates(A_ptr, at, inside):
    """A for powers of 2, and never quite 0, so that an endless step forgets everything."""
    return tl.minimum(_numbers(A_ptr, at, inside) * LOG2_E, -1e-27)


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
    e, n = tl.program_id(0) * BLOCK_E + tl.arange(0, BLOCK_E), tl.arange(0, BLOCK_N)
    segment, row = tl.program_id(1), tl.program_id(2).to(tl.int64)
    inside = (e < E)[:, None] & (n < N)[None, :]
    A = _rates(A_ptr, e[:, None] * N + n[None, :], inside)
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
    e, n = tl.program_id(0) * BLOCK_E + tl.arange(0, BLOCK_E), tl.arange(0, BLOCK_N)
    segment, row = tl.program_id(1), tl.program_id(2).to(tl.int64)
    inside = (e < E)[:, None] & (n < N)[None, :]
    A = _rates(A_ptr, e[:, None] * N + n[None, :], inside)
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
    e, n = tl.program_id(0) * BLOCK_E + tl.arange(0, BLOCK_E), tl.arange(0, BLOCK_N)
    segment, row = tl.program_id(1), tl.program_id(2).to(tl.int64)
    inside = (e < E)[:, None] & (n < N)[None, :]
    A = _rates(A_ptr, e[:, None] * N + n[None, :], inside)
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
    e, n = tl.program_id(0) * BLOCK_E + tl.arange(0, BLOCK_E), tl.arange(0, BLOCK_N)
    segment, row = tl.program_id(1), tl.program_id(2).to(tl.int64)
    part = row * tl.num_programs(1) + segment
    inside = (e < E)[:, None] & (n < N)[None, :]
    A = _rates(A_ptr, e[:, None] * N + n[None, :], inside)
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


class Given(NamedTuple):
    """What both directions need, in a form that kernels can walk through."""

    x: Tensor
    dt: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor
    starts: Tensor | None

    @staticmethod
    def of(
        x_BTE: Tensor,
        dt_BTE: Tensor,
        A_EN: Tensor,
        B_BTN: Tensor,
        C_BTN: Tensor,
        D_E: Tensor,
        starts_BT: Tensor | None,
    ) -> Given:
        """Copies what is laid out otherwise; slices of wider rows need none."""
        x, dt, B, C = (_laid_out(z) for z in (x_BTE, dt_BTE, B_BTN, C_BTN))
        starts = None if starts_BT is None else starts_BT.to(torch.uint8)
        return Given(x, dt, A_EN.contiguous(), B, C, D_E.contiguous(), starts)

    @property
    def flags(self) -> Tensor:
        """Where documents start; some pointer where nobody asks."""
        return self.x if self.starts is None else self.starts

    @property
    def sizes(self) -> dict[str, Any]:
        """What all kernels share."""
        channels, state = self.A.shape
        block = int(triton.next_power_of_2(state))
        block_e = min(max(CHANNELS * 16 // block, 1), int(triton.next_power_of_2(channels)))
        shared: dict[str, Any] = {"E": channels, "N": state, "BLOCK_E": block_e, "BLOCK_N": block, "num_warps": 1}
        return shared | {"DOCS": self.starts is not None, "FAST": has_fast_exp2(self.x)}

    @property
    def blocks(self) -> int:
        """Blocks of channels."""
        return int(triton.cdiv(self.A.shape[0], self.sizes["BLOCK_E"]))

    @property
    def segments(self) -> int:
        """Segments of a row."""
        return int(triton.cdiv(self.x.shape[1], CHUNK * SEGMENT))

    def before(self, initial_BNE: Tensor | None) -> Tensor:
        """(B, S, E, N) in fp32: the state before every segment."""
        if self.segments == 1:
            return self._alone(initial_BNE)
        x, dt, B = self.x, self.dt, self.B
        kept, added = self._kept_and_added()
        segment_ends[(self.blocks, self.segments, x.shape[0])](
            x, dt, self.A, B, self.flags, kept, added, x.shape[1], *(z.stride(0) for z in (x, dt, B)),
            *(z.stride(1) for z in (x, dt, B)), TOKENS=CHUNK * SEGMENT, **self.sizes,
        )  # fmt: skip
        return self._passed(kept, added, initial_BNE, back=False)

    def dafter(self, dy: Tensor, dfinal_BNE: Tensor | None) -> Tensor:
        """(B, S, E, N) in fp32: the gradient of the state after every segment."""
        if self.segments == 1:
            return self._alone(dfinal_BNE)
        dt, C = self.dt, self.C
        kept, added = self._kept_and_added()
        segment_starts[(self.blocks, self.segments, dy.shape[0])](
            dt, self.A, C, self.flags, dy, kept, added, dy.shape[1], *(z.stride(0) for z in (dt, C, dy)),
            *(z.stride(1) for z in (dt, C, dy)), TOKENS=CHUNK * SEGMENT, **self.sizes,
        )  # fmt: skip
        return self._passed(kept, added, dfinal_BNE, back=True)

    def _kept_and_added(self) -> tuple[Tensor, Tensor]:
        shape = (self.x.shape[0], self.segments, *self.A.shape)
        return self.x.new_empty(shape, dtype=torch.float32), self.x.new_empty(shape, dtype=torch.float32)

    def _passed(self, kept: Tensor, added: Tensor, first_BNE: Tensor | None, back: bool) -> Tensor:
        channels, state = self.A.shape
        pass_states[(triton.cdiv(channels * state, PASSED), self.x.shape[0])](
            kept, added, added if first_BNE is None else first_BNE.contiguous(), self.segments,
            E=channels, N=state, BLOCK=PASSED, FIRST=first_BNE is not None, BACK=back, num_warps=PASSED // 64,
        )  # fmt: skip
        return added

    def _alone(self, first_BNE: Tensor | None) -> Tensor:
        """(B, 1, E, N): what a single segment begins with."""
        if first_BNE is None:
            return self.x.new_zeros(self.x.shape[0], 1, *self.A.shape, dtype=torch.float32)
        return first_BNE.float().mT.contiguous().unsqueeze(1)


def _laid_out(values: Tensor) -> Tensor:
    return values if values.stride(-1) == 1 else values.contiguous()


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
    given = Given.of(x_BTE, dt_BTE, A_EN, B_BTN, C_BTN, D_E, starts_BT)
    x, dt, A, B, C, D, _ = given
    rows, time, _ = x.shape
    y, final, states = _like(x, A.shape[1])
    before = given.before(initial_BNE)
    scan_forward[(given.blocks, given.segments, rows)](
        x, dt, A, B, C, D, given.flags, before, y, final, states, time, states.shape[1],
        *(z.stride(0) for z in (x, dt, B, C)), *(z.stride(1) for z in (x, dt, B, C)),
        Q=CHUNK, CHUNKS=SEGMENT, **given.sizes,
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
    given = Given.of(x_BTE, dt_BTE, A_EN, B_BTN, C_BTN, D_E, starts_BT)
    x, dt, A, B, C, D, _ = given
    dy = _laid_out(dy_BTE)
    rows, time, channels = x.shape
    state, sizes = A.shape[1], given.sizes
    dafter = given.dafter(dy, dfinal_BNE)
    parts = rows * given.segments
    scratch = x.new_empty(parts * given.blocks, CHUNK, sizes["BLOCK_E"], sizes["BLOCK_N"], dtype=SCRATCH)
    dx, ddt = (torch.empty_like(z, memory_format=torch.contiguous_format) for z in (x, dt))
    dA, dD = (x.new_empty(parts, *z.shape, dtype=torch.float32) for z in (A, D))
    dB, dC = (x.new_empty(given.blocks, rows, time, state, dtype=torch.float32) for _ in range(2))
    dinitial = x.new_empty(rows, state, channels, dtype=torch.float32)
    scan_backward[(given.blocks, given.segments, rows)](
        x, dt, A, B, C, D, given.flags, states, dy, dafter, scratch, dx, ddt, dA, dB, dC, dD, dinitial,
        rows, time, states.shape[1],
        *(z.stride(0) for z in (x, dt, B, C, dy)), *(z.stride(1) for z in (x, dt, B, C, dy)),
        Q=CHUNK, CHUNKS=SEGMENT, **sizes,
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
