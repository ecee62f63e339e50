"""The kernels of the Mamba-2 scan (SSD): states between chunks, which also carry gradients back, and outputs.

The other gradients are in `ssd_gradients`.

What passes between tokens of one chunk is a masked matrix product, what passes between chunks a state. States, and
their gradients from the end, run from chunk to chunk inside one program; everything else is one program per chunk,
which walks through heads, so that B, C and their product are loaded and made once for many of them. Dots take the dtype
of x on the tensor cores and add up in fp32; decays, states in flight and all sums are fp32.

Documents enter once, in `decays`: a token sees another where both lie in the same run of equal ids. What is not seen
has a score of exactly 0, and no exponent is above 0.

Shapes: B rows, T tokens, J chunks of a row, Q tokens of a chunk (i reads, j is read), H heads, P head dim, G groups of
heads that share B and C, N state. Decays are planes of (B, H, J * Q): see `DT` and its neighbours.
"""

import triton
import triton.language as tl

from longspan.ops.triton.decays import FROM_BEFORE, SUM, TO_END
from longspan.ops.triton.tiles import LOG2_E, dot, exp2, load, store, widened


@triton.jit
def _after_pieces(
    alone_ptr, kept_ptr, row, h, end, p, n, state,
    H: tl.constexpr, P: tl.constexpr, N: tl.constexpr, NUMBER: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """What `state` comes to after the first `end` of the NUMBER pieces of a row, each of which has gone alone."""
    MOST: tl.constexpr = triton.next_power_of_2(NUMBER)
    piece = tl.arange(0, MOST)
    kept = tl.load(kept_ptr + (row * NUMBER + piece) * H + h, mask=piece < end, other=1.0)
    # A piece that keeps nothing hides all before it.
    first = tl.max(tl.where((piece < end) & (kept == 0.0), piece, 0), 0)
    for piece in tl.range(first, end, loop_unroll_factor=2):
        there = (row * NUMBER + piece) * H + h
        state = state * tl.load(kept_ptr + there) + load(alone_ptr + there * P * N, p, N, n, P, N, WHOLE)
    return state


@triton.jit
def _chunk(step, chunks, BACK: tl.constexpr):
    """The chunk of a step, the last one for all behind it."""
    step = tl.minimum(step, chunks - 1)
    return chunks - 1 - step if BACK else step


@triton.jit
def _factors(at, plane, BACK: tl.constexpr):
    """What `_weight` makes the weights of a chunk's tokens of."""
    if BACK:
        decay = tl.load(at + FROM_BEFORE * plane)
        return decay, decay
    return tl.load(at), tl.load(at + TO_END * plane)


@triton.jit
def _weight(factor, other, BACK: tl.constexpr):
    # Of numbers that are not below 0 the maximum is no change; without one, Triton would load nothing else ahead.
    return tl.maximum(factor, 0.0) if BACK else factor * other


@triton.jit
def states(
    a_ptr, b_ptr, planes_ptr, carry_ptr, begin_ptr, states_ptr, end_ptr, alone_ptr, kept_ptr, time, chunks, plane,
    a_row, a_token: tl.constexpr, b_row, b_token: tl.constexpr,
    H: tl.constexpr, GROUP: tl.constexpr, P: tl.constexpr, N: tl.constexpr, Q: tl.constexpr, BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr, BACK: tl.constexpr, BEGIN: tl.constexpr, END: tl.constexpr, ALONE: tl.constexpr,
    SEGMENTS: tl.constexpr, PIECES: tl.constexpr, REACH: tl.constexpr, WHOLE: tl.constexpr, OPERAND: tl.constexpr,
    PRECISION: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """The state before every chunk, of x and B, and after the last; BACK: the gradient of the state after every chunk,
    of dy and C, and before the first.

    Few long rows are cut into segments: first what comes after the last document's beginning in each goes ALONE, from
    nothing, in equal PIECES, which leave the state they come to and what they keep of one before; then each segment
    begins with what the pieces before it come to. Chunks are counted as one walks, BACK from the end.
    """
    blocks_n: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    p = tl.program_id(0) // blocks_n * BLOCK_P + tl.arange(0, BLOCK_P)
    n = tl.program_id(0) % blocks_n * BLOCK_N + tl.arange(0, BLOCK_N)
    programs: tl.constexpr = SEGMENTS * PIECES if ALONE else SEGMENTS
    h, row, part = tl.program_id(1), (tl.program_id(2) // programs).to(tl.int64), tl.program_id(2) % programs
    segment = part // PIECES if ALONE else part
    i = tl.arange(0, Q)
    DTYPE: tl.constexpr = a_ptr.dtype.element_ty
    a = a_ptr + row * a_row + h * P
    b = b_ptr + row * b_row + h // GROUP * N
    by_head = planes_ptr + (row * H + h) * chunks * Q + i
    carries = carry_ptr + (row * H + h) * chunks
    length = tl.cdiv(chunks, SEGMENTS)
    first, end = segment * length, tl.minimum((segment + 1) * length, chunks)
    state = tl.zeros((BLOCK_P, BLOCK_N), tl.float32)
    if ALONE:
        step = first + tl.arange(0, REACH)
        there = step < end
        keeps = tl.load(carries + (chunks - 1 - step if BACK else step), mask=there, other=1.0)
        first = tl.max(tl.where(there & (keeps == 0.0), step, first), 0)
        each = tl.cdiv(end - first, PIECES)
        # Nothing reads what the last segment comes to.
        first = tl.where(end == chunks, end, tl.minimum(first + part % PIECES * each, end))
        end = tl.minimum(first + each, end)
    else:
        if BEGIN:
            state += load(begin_ptr + (row * H + h) * P * N, p, N, n, P, N, WHOLE).to(tl.float32)
        if SEGMENTS > 1:
            before = segment * PIECES
            state = _after_pieces(
                alone_ptr, kept_ptr, row, h, before, p, n, state, H, P, N, SEGMENTS * PIECES, WHOLE
            )  # fmt: skip
    now = _chunk(first, chunks, BACK)
    carry, kept = tl.load(carries + now), 1.0
    ahead, other = _factors(by_head + now * Q, plane, BACK)
    weight = _weight(ahead, other, BACK)
    ahead, other = _factors(by_head + _chunk(first + 1, chunks, BACK) * Q, plane, BACK)
    for step in range(first, end):
        next_carry = tl.load(carries + _chunk(step + 1, chunks, BACK))
        chunk = chunks - 1 - step if BACK else step
        if not ALONE:
            store(states_ptr + ((row * chunks + chunk) * H + h) * P * N, p, N, n, P, N, WHOLE, state)
        t = chunk * Q + i
        a_QP = load(a, t, a_token, p, time, P, WHOLE)
        b_QN = load(b, t, b_token, n, time, N, WHOLE)
        weighted = widened(a_QP, FAST) * weight[:, None]
        # Triton brings ahead what goes into products; this is brought ahead by hand, by two chunks.
        weight = _weight(ahead, other, BACK)
        ahead, other = _factors(by_head + _chunk(step + 2, chunks, BACK) * Q, plane, BACK)
        state = state * carry + dot(tl.trans(weighted.to(DTYPE)), b_QN, DTYPE, OPERAND, PRECISION)
        kept *= carry
        carry = next_carry
    if END and end == chunks:
        store(end_ptr + (row * H + h) * P * N, p, N, n, P, N, WHOLE, state)
    if ALONE:
        there = (row * programs + part) * H + h
        store(alone_ptr + there * P * N, p, N, n, P, N, WHOLE, state)
        if tl.program_id(0) == 0:
            tl.store(kept_ptr + there, kept)


@triton.jit
def outputs(
    x_ptr, B_ptr, C_ptr, D_ptr, planes_ptr, run_ptr, states_ptr, y_ptr, time, plane,
    x_row, x_token: tl.constexpr, B_row, B_token: tl.constexpr, C_row, C_token: tl.constexpr,
    H: tl.constexpr, GROUP: tl.constexpr, P: tl.constexpr, N: tl.constexpr, Q: tl.constexpr, BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr, HEADS: tl.constexpr, WHOLE: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
    FAST: tl.constexpr,
):  # fmt: skip
    """y of one chunk for HEADS heads of one group."""
    first, chunk, chunks = tl.program_id(0) * HEADS, tl.program_id(1), tl.num_programs(1)
    row = tl.program_id(2).to(tl.int64)
    p, n, i = tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_N), tl.arange(0, Q)
    t = chunk * Q + i
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    run = tl.load(run_ptr + row * chunks * Q + t)
    sees = (i[:, None] >= i[None, :]) & (run[:, None] == run[None, :])
    B_QN = load(B_ptr + row * B_row + first // GROUP * N, t, B_token, n, time, N, WHOLE)
    C_QN = load(C_ptr + row * C_row + first // GROUP * N, t, C_token, n, time, N, WHOLE)
    # Masked once: what is not seen decays by something finite, times 0.
    scores = tl.where(sees, dot(C_QN, tl.trans(B_QN), DTYPE, OPERAND, PRECISION), 0.0)
    planes = planes_ptr + row * H * chunks * Q + t
    from_before = tl.load(planes + FROM_BEFORE * plane + first * chunks * Q)
    D = tl.load(D_ptr + first).to(tl.float32)
    for h in range(first, first + HEADS):
        following = tl.minimum(h + 1, H - 1)
        next_from_before = tl.load(planes + FROM_BEFORE * plane + following * chunks * Q)
        next_D = tl.load(D_ptr + following).to(tl.float32)
        dt, sums = tl.load(planes + h * chunks * Q), tl.load(planes + SUM * plane + h * chunks * Q) * LOG2_E
        x_QP = load(x_ptr + row * x_row + h * P, t, x_token, p, time, P, WHOLE)
        before_PN = load(states_ptr + ((row * chunks + chunk) * H + h) * P * N, p, N, n, P, N, WHOLE)
        y = dot(C_QN, tl.trans(before_PN), DTYPE, OPERAND, PRECISION) * from_before[:, None]
        mixing = scores * exp2(tl.minimum(sums[:, None] - sums[None, :], 0.0), FAST)
        y += dot(mixing * dt[None, :], x_QP, DTYPE, OPERAND, PRECISION)
        y += widened(x_QP, FAST) * D
        store(y_ptr + row * time * H * P + h * P, t, H * P, p, time, P, WHOLE, y)
        from_before, D = next_from_before, next_D
