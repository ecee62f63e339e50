"""The gradients of the Mamba-2 scan (SSD), from the states and their gradients that `ssd_kernels.states` leaves.

One launch has two programs for the tokens of a chunk and its heads, and two for B and C; the next adds up over heads.
Shapes and dtypes are those of `ssd_kernels`.
"""

import triton
import triton.language as tl

from longspan.ops.triton.decays import FROM_BEFORE, SUM, TO_END
from longspan.ops.triton.tiles import LOG2_E, dot, exp2, load, store, widened

# Planes of what one token of one head gives to the gradients of step sizes, A and D: through what drives the state;
# through the skip D; through what it keeps until the end of its chunk; what it reads less what others read of it, in
# its chunk; and, a plane for each tile of the state, what it reads of the state before.
DRIVING, SKIPPED, KEPT, MOVED, READ = (tl.constexpr(plane) for plane in range(5))


@triton.jit
def _token_gradients(
    x_ptr, B_ptr, C_ptr, D_ptr, dy_ptr, planes_ptr, run_ptr, dstates_ptr, dx_ptr, dscores_ptr, sums_ptr, time, plane,
    x_row, x_token: tl.constexpr, B_row, B_token: tl.constexpr, C_row, C_token: tl.constexpr,
    dy_row, dy_token: tl.constexpr, dx_row, dx_token: tl.constexpr, part, chunk, chunks, row,
    H: tl.constexpr, GROUP: tl.constexpr, P: tl.constexpr, N: tl.constexpr, Q: tl.constexpr, BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr, HEADS: tl.constexpr, WHOLE: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
    FAST: tl.constexpr,
):  # fmt: skip
    """The gradient of x of one chunk, for HEADS heads of one group, what they give to the scores B C^T, and planes of
    sums over a token's channels: see `DRIVING` and its neighbours.

    Squares are written with the token that is read first, (j, i), so that the large product needs no transpose.
    """
    first = part * HEADS
    p, n, i = tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_N), tl.arange(0, Q)
    t = chunk * Q + i
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    run = tl.load(run_ptr + row * chunks * Q + t)
    seen = (i[:, None] < i[None, :]) & (run[:, None] == run[None, :])
    B_QN = load(B_ptr + row * B_row + first // GROUP * N, t, B_token, n, time, N, WHOLE)
    C_QN = load(C_ptr + row * C_row + first // GROUP * N, t, C_token, n, time, N, WHOLE)
    scores = dot(B_QN, tl.trans(C_QN), DTYPE, OPERAND, PRECISION)
    # A token with itself stands apart, with the skip D: no decay lies between, and what it would add to `moved` on one
    # side and take on the other is larger than all else where scores are small. What others see of it is masked once,
    # as in `outputs`; what the heads give to scores is masked where it is read.
    own = tl.sum(tl.where(i[:, None] == i[None, :], scores, 0.0), 1)
    scores = tl.where(seen, scores, 0.0).to(DTYPE)
    dscores = tl.zeros((Q, Q), tl.float32)
    planes = planes_ptr + row * H * chunks * Q + t
    dt, to_end = tl.load(planes + first * chunks * Q), tl.load(planes + TO_END * plane + first * chunks * Q)
    D = tl.load(D_ptr + first).to(tl.float32)
    for h in range(first, first + HEADS):
        following = tl.minimum(h + 1, H - 1)
        next_dt = tl.load(planes + following * chunks * Q)
        next_to_end = tl.load(planes + TO_END * plane + following * chunks * Q)
        next_D = tl.load(D_ptr + following).to(tl.float32)
        sums = tl.load(planes + SUM * plane + h * chunks * Q) * LOG2_E
        x_QP = load(x_ptr + row * x_row + h * P, t, x_token, p, time, P, WHOLE)
        dy_QP = load(dy_ptr + row * dy_row + h * P, t, dy_token, p, time, P, WHOLE)
        dafter_PN = load(dstates_ptr + ((row * chunks + chunk) * H + h) * P * N, p, N, n, P, N, WHOLE)
        products = dot(x_QP, tl.trans(dy_QP), DTYPE, OPERAND, PRECISION)
        decay = exp2(tl.minimum(sums[None, :] - sums[:, None], 0.0), FAST)
        products *= decay
        dscores += products * dt[:, None]
        seen_scores = widened(scores, FAST)
        # The same rounded numbers for what is read and for what is written: their sums cancel where they should.
        mixing = (seen_scores * (decay * dt[:, None])).to(DTYPE)
        x, dy = widened(x_QP, FAST), widened(dy_QP, FAST)
        skipped = tl.sum(x * dy, 1)
        ddriving = tl.sum(products * seen_scores, 1) + skipped * own
        moved = tl.sum(dot(tl.trans(mixing), x_QP, DTYPE, OPERAND, PRECISION) * dy, 1)
        dx = dot(mixing, dy_QP, DTYPE, OPERAND, PRECISION)
        moved -= tl.sum(dx * x, 1)
        dx += dy * (D + own * dt)[:, None]
        dkept = dot(B_QN, tl.trans(dafter_PN), DTYPE, OPERAND, PRECISION)
        kept = tl.sum(dkept * x, 1) * to_end
        dx += dkept * (dt * to_end)[:, None]
        store(dx_ptr + row * dx_row + h * P, t, dx_token, p, time, P, WHOLE, dx)
        at = sums_ptr + (row * H + h) * chunks * Q + t
        tl.store(at + DRIVING * plane, ddriving + kept)
        kept *= dt
        tl.store(at + KEPT * plane, kept)
        tl.store(at + MOVED * plane, moved - kept)
        tl.store(at + SKIPPED * plane, skipped)
        dt, to_end, D = next_dt, next_to_end, next_D
    square = dscores_ptr + ((row * (H // HEADS) + part) * chunks + chunk) * Q * Q
    store(square, i, Q, i, Q, Q, True, dscores)


@triton.jit
def _in_turn(head, first, GROUP: tl.constexpr, HEADS: tl.constexpr):
    """The head of a group that comes in the place of `head` where one of each HEADS is taken in turn."""
    parts: tl.constexpr = GROUP // HEADS
    if parts == 1:
        return head
    step = head - first
    return first + step % parts * HEADS + step // parts


@triton.jit
def _group_gradients(
    x_ptr, C_ptr, dy_ptr, planes_ptr, states_ptr, dstates_ptr, dB_ptr, dC_ptr, sums_ptr, passed_ptr, time, plane,
    x_row, x_token: tl.constexpr, C_row, C_token: tl.constexpr, dy_row, dy_token: tl.constexpr,
    dB_row, dB_token: tl.constexpr, dC_row, dC_token: tl.constexpr, group, tile, chunk, chunks, row,
    H: tl.constexpr, GROUP: tl.constexpr, P: tl.constexpr, N: tl.constexpr, Q: tl.constexpr, BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr, HEADS: tl.constexpr, WHOLE: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The gradients of some columns of B and C of one chunk, over the heads of a group, and what reading that part of a
    state and passing it on gives to the sums of log decays; without what goes through scores."""
    tiles: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    p, n, i = tl.arange(0, BLOCK_P), tile * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, Q)
    t = chunk * Q + i
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    C_QN = load(C_ptr + row * C_row + group * N, t, C_token, n, time, N, WHOLE).to(tl.float32)
    dB, dC = tl.zeros((Q, BLOCK_N), tl.float32), tl.zeros((Q, BLOCK_N), tl.float32)
    planes = planes_ptr + row * H * chunks * Q + t
    first = group * GROUP
    head = first * chunks
    dt, to_end = tl.load(planes + head * Q), tl.load(planes + TO_END * plane + head * Q)
    from_before = tl.load(planes + FROM_BEFORE * plane + head * Q)
    for place in range(first, first + GROUP):
        # In the order in which the programs of tokens take them, HEADS each, so that one finds what the other has read.
        h = _in_turn(place, first, GROUP, HEADS)
        following = _in_turn(tl.minimum(place + 1, H - 1), first, GROUP, HEADS) * chunks
        next_dt, next_to_end = tl.load(planes + following * Q), tl.load(planes + TO_END * plane + following * Q)
        next_from_before = tl.load(planes + FROM_BEFORE * plane + following * Q)
        state = ((row * chunks + chunk) * H + h) * P * N
        x_QP = load(x_ptr + row * x_row + h * P, t, x_token, p, time, P, WHOLE)
        dy_QP = load(dy_ptr + row * dy_row + h * P, t, dy_token, p, time, P, WHOLE)
        dafter_PN = load(dstates_ptr + state, p, N, n, P, N, WHOLE)
        before_PN = load(states_ptr + state, p, N, n, P, N, WHOLE)
        dB += dot(x_QP, dafter_PN, DTYPE, OPERAND, PRECISION) * (dt * to_end)[:, None]
        dread = dot(dy_QP, before_PN, DTYPE, OPERAND, PRECISION) * from_before[:, None]
        dC += dread
        dsums = tl.sum(dread * C_QN, 1)
        # Of the two states' product the diagonal alone is wanted, but the tensor cores have time.
        both = dot(before_PN, tl.trans(dafter_PN), DTYPE, OPERAND, PRECISION)
        passed = tl.sum(tl.where(p[:, None] == p[None, :], both, 0.0), 1)
        tl.store(passed_ptr + (((row * tiles + tile) * H + h) * chunks + chunk) * BLOCK_P + p, passed)
        at = sums_ptr + (READ + tile) * plane + (row * H + h) * chunks * Q + t
        tl.store(at, dsums)
        dt, to_end, from_before = next_dt, next_to_end, next_from_before
    store(dB_ptr + row * dB_row + group * N, t, dB_token, n, time, N, WHOLE, dB)
    store(dC_ptr + row * dC_row + group * N, t, dC_token, n, time, N, WHOLE, dC)


@triton.jit
def gradients(
    x_ptr, B_ptr, C_ptr, D_ptr, dy_ptr, planes_ptr, run_ptr, states_ptr, dstates_ptr, dx_ptr, dscores_ptr, dB_ptr,
    dC_ptr, sums_ptr, passed_ptr, time, plane,
    x_row, x_token: tl.constexpr, B_row, B_token: tl.constexpr, C_row, C_token: tl.constexpr,
    dy_row, dy_token: tl.constexpr, dx_row, dx_token: tl.constexpr, dB_row, dB_token: tl.constexpr,
    dC_row, dC_token: tl.constexpr,
    H: tl.constexpr, GROUP: tl.constexpr, P: tl.constexpr, N: tl.constexpr, Q: tl.constexpr, BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr, COLUMNS: tl.constexpr, HEADS: tl.constexpr, WHOLE: tl.constexpr,
    OPERAND: tl.constexpr, PRECISION: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """The gradients of tokens and of groups of one chunk, side by side: both read x, dy and the gradients of states,
    which so come from memory once."""
    kind, chunk, chunks = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    row = tl.program_id(2).to(tl.int64)
    if kind < H // HEADS:
        _token_gradients(
            x_ptr, B_ptr, C_ptr, D_ptr, dy_ptr, planes_ptr, run_ptr, dstates_ptr, dx_ptr, dscores_ptr, sums_ptr, time,
            plane, x_row, x_token, B_row, B_token, C_row, C_token, dy_row, dy_token, dx_row, dx_token, kind, chunk,
            chunks, row, H, GROUP, P, N, Q, BLOCK_P, BLOCK_N, HEADS, WHOLE, OPERAND, PRECISION, FAST,
        )  # fmt: skip
    else:
        kind -= H // HEADS
        tiles: tl.constexpr = (N + COLUMNS - 1) // COLUMNS
        _group_gradients(
            x_ptr, C_ptr, dy_ptr, planes_ptr, states_ptr, dstates_ptr, dB_ptr, dC_ptr, sums_ptr, passed_ptr, time,
            plane, x_row, x_token, C_row, C_token, dy_row, dy_token, dB_row, dB_token, dC_row, dC_token,
            kind // tiles, kind % tiles, chunk, chunks, row, H, GROUP, P, N, Q, BLOCK_P, COLUMNS, HEADS, WHOLE,
            OPERAND, PRECISION,
        )  # fmt: skip


@triton.jit
def _score_gradients(
    B_ptr, C_ptr, run_ptr, dscores_ptr, dB_ptr, dC_ptr, time,
    B_row, B_token: tl.constexpr, C_row, C_token: tl.constexpr, dB_row, dB_token: tl.constexpr,
    dC_row, dC_token: tl.constexpr, group, groups, chunk, chunks, row,
    N: tl.constexpr, Q: tl.constexpr, BLOCK_N: tl.constexpr, PARTS: tl.constexpr, WHOLE: tl.constexpr,
    OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Adds to the gradients of B and C what goes through the scores of one chunk and group."""
    n, i = tl.arange(0, BLOCK_N), tl.arange(0, Q)
    t = chunk * Q + i
    DTYPE: tl.constexpr = B_ptr.dtype.element_ty
    run = tl.load(run_ptr + row * chunks * Q + t)
    seen = (i[:, None] <= i[None, :]) & (run[:, None] == run[None, :])
    squares = dscores_ptr + ((row * groups + group) * PARTS * chunks + chunk) * Q * Q
    dscores = tl.zeros((Q, Q), tl.float32)
    for part in tl.static_range(PARTS):
        dscores += tl.load(squares + part * chunks * Q * Q + i[:, None] * Q + i[None, :]).to(tl.float32)
    dscores = tl.where(seen, dscores, 0.0).to(DTYPE)
    C_QN = load(C_ptr + row * C_row + group * N, t, C_token, n, time, N, WHOLE)
    dB_at = dB_ptr + row * dB_row + group * N
    dB = load(dB_at, t, dB_token, n, time, N, WHOLE) + dot(dscores, C_QN, DTYPE, OPERAND, PRECISION)
    store(dB_at, t, dB_token, n, time, N, WHOLE, dB)
    B_QN = load(B_ptr + row * B_row + group * N, t, B_token, n, time, N, WHOLE)
    dC_at = dC_ptr + row * dC_row + group * N
    dC = load(dC_at, t, dC_token, n, time, N, WHOLE) + dot(tl.trans(dscores), B_QN, DTYPE, OPERAND, PRECISION)
    store(dC_at, t, dC_token, n, time, N, WHOLE, dC)


@triton.jit
def _step_gradients(
    dt_ptr, bias_ptr, A_ptr, planes_ptr, carry_ptr, run_ptr, sums_ptr, passed_ptr, ddt_ptr, dA_ptr, dD_ptr, dbias_ptr,
    time, plane, dt_row, dt_token, ddt_row, ddt_token, chunk, chunks, row,
    H: tl.constexpr, Q: tl.constexpr, HEADS: tl.constexpr, TILES: tl.constexpr, BLOCK_P: tl.constexpr,
    SOFTPLUS: tl.constexpr,
):  # fmt: skip
    """From the sums of every token back to the step sizes, and to A and D."""
    i = tl.arange(0, Q)
    t = chunk * Q + i
    run = tl.load(run_ptr + row * chunks * Q + t)
    sees = ((i[:, None] >= i[None, :]) & (run[:, None] == run[None, :])).to(tl.float32)
    for start in range(0, H, HEADS):
        h = start + tl.arange(0, HEADS)
        heads = (h < H)[:, None] & (i >= 0)[None, :]
        at = (row * H + h[:, None]) * chunks * Q + t[None, :]
        dt = tl.load(planes_ptr + at, mask=heads, other=0.0)
        # All that is kept, or passes through, is kept until the chunk's last token.
        to_end = tl.sum(tl.load(sums_ptr + KEPT * plane + at, mask=heads, other=0.0), 1)
        dsums = tl.load(sums_ptr + MOVED * plane + at, mask=heads, other=0.0)
        carry = tl.load(carry_ptr + (row * H + h) * chunks + chunk, mask=h < H, other=0.0)
        p = tl.arange(0, BLOCK_P)
        for tile in tl.static_range(TILES):
            dsums += tl.load(sums_ptr + (READ + tile) * plane + at, mask=heads, other=0.0)
            through = passed_ptr + (((row * TILES + tile) * H + h[:, None]) * chunks + chunk) * BLOCK_P + p[None, :]
            to_end += carry * tl.sum(tl.load(through, mask=(h < H)[:, None] & (p >= 0)[None, :], other=0.0), 1)
        dsums += tl.where((i == Q - 1)[None, :], to_end[:, None], 0.0)
        dlog = tl.dot(dsums, sees, input_precision="tf32x3")
        A = tl.load(A_ptr + h, mask=h < H, other=0.0).to(tl.float32)
        # Tokens first from here on, as dt lies in memory.
        ddt = tl.trans(tl.load(sums_ptr + DRIVING * plane + at, mask=heads, other=0.0) + dlog * A[:, None])
        there = (t < time)[:, None] & (h < H)[None, :]
        totals = (row * chunks + chunk) * H + h
        if SOFTPLUS:
            bias = tl.load(bias_ptr + h, mask=h < H, other=0.0).to(tl.float32)
            raw = tl.load(dt_ptr + row * dt_row + t[:, None] * dt_token + h[None, :], mask=there, other=0.0)
            ddt = tl.where(there, ddt * tl.sigmoid(raw.to(tl.float32) + bias[None, :]), 0.0)
            tl.store(dbias_ptr + totals, tl.sum(ddt, 0), mask=h < H)
        target = ddt_ptr + row * ddt_row + t[:, None] * ddt_token + h[None, :]
        tl.store(target, ddt.to(ddt_ptr.dtype.element_ty), mask=there)
        tl.store(dA_ptr + totals, tl.sum(dlog * dt, 1), mask=h < H)
        skipped = tl.load(sums_ptr + SKIPPED * plane + at, mask=heads, other=0.0)
        tl.store(dD_ptr + totals, tl.sum(skipped, 1), mask=h < H)


@triton.jit
def last_gradients(
    dt_ptr, bias_ptr, A_ptr, B_ptr, C_ptr, planes_ptr, carry_ptr, run_ptr, sums_ptr, passed_ptr, dscores_ptr, ddt_ptr,
    dA_ptr, dD_ptr, dbias_ptr, dB_ptr, dC_ptr, time, plane, dt_row, dt_token, ddt_row, ddt_token,
    B_row, B_token: tl.constexpr, C_row, C_token: tl.constexpr, dB_row, dB_token: tl.constexpr,
    dC_row, dC_token: tl.constexpr,
    H: tl.constexpr, GROUPS: tl.constexpr, N: tl.constexpr, Q: tl.constexpr, BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr, HEADS: tl.constexpr, PARTS: tl.constexpr, TILES: tl.constexpr, SOFTPLUS: tl.constexpr,
    WHOLE: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What waits for all heads of a chunk: the gradients of step sizes, A and D, beside those of B and C by scores."""
    kind, chunk, chunks = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    row = tl.program_id(2).to(tl.int64)
    if kind < GROUPS:
        _score_gradients(
            B_ptr, C_ptr, run_ptr, dscores_ptr, dB_ptr, dC_ptr, time, B_row, B_token, C_row, C_token, dB_row, dB_token,
            dC_row, dC_token, kind, GROUPS, chunk, chunks, row, N, Q, BLOCK_N, PARTS, WHOLE, OPERAND, PRECISION,
        )  # fmt: skip
    else:
        _step_gradients(
            dt_ptr, bias_ptr, A_ptr, planes_ptr, carry_ptr, run_ptr, sums_ptr, passed_ptr, ddt_ptr, dA_ptr, dD_ptr,
            dbias_ptr, time, plane, dt_row, dt_token, ddt_row, ddt_token, chunk, chunks, row, H, Q, HEADS, TILES,
            BLOCK_P, SOFTPLUS,
        )  # fmt: skip
