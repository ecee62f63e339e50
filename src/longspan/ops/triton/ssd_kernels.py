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
def _put(
    known, states, chunk, p, n, state, H: tl.constexpr, P: tl.constexpr, N: tl.constexpr, WHOLE: tl.constexpr
):  # fmt: skip
    """Stores the state before a chunk, where it is known."""
    at = states + tl.cast(chunk, tl.int64) * H * P * N + p[:, None] * N + n[None, :]
    mask = known if WHOLE else (p < P)[:, None] & (n < N)[None, :] & known
    tl.store(at, state.to(states.dtype.element_ty), mask=mask)


@triton.jit
def _walk(
    state, first, end, known, a, b, by_head, carries, states, time, chunks, plane, p, n, i,
    a_token: tl.constexpr, b_token: tl.constexpr, H: tl.constexpr, P: tl.constexpr, N: tl.constexpr, Q: tl.constexpr,
    BACK: tl.constexpr, SEGMENTS: tl.constexpr, WHOLE: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
    FAST: tl.constexpr,
):  # fmt: skip
    """What `state` comes to from one chunk to another, and what is kept of it on the way. Stores the state before every
    chunk from `known` on; of one segment all are."""
    DTYPE: tl.constexpr = a.dtype.element_ty
    kept = 1.0
    now = _chunk(first, chunks, BACK)
    carry = tl.load(carries + now)
    ahead, other = _factors(by_head + now * Q, plane, BACK)
    weight = _weight(ahead, other, BACK)
    ahead, other = _factors(by_head + _chunk(first + 1, chunks, BACK) * Q, plane, BACK)
    for step in range(first, end):
        next_carry = tl.load(carries + _chunk(step + 1, chunks, BACK))
        chunk = chunks - 1 - step if BACK else step
        if SEGMENTS == 1:
            store(states + tl.cast(chunk, tl.int64) * H * P * N, p, N, n, P, N, WHOLE, state)
        else:
            _put(step >= known, states, chunk, p, n, state, H, P, N, WHOLE)
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
    return state, kept


@triton.jit
def _hiding(carries, begin, end, chunks, REACH: tl.constexpr, BACK: tl.constexpr):
    """The first chunk of a segment that hides all before it, else `end`, and the last, else `begin`."""
    step = begin + tl.arange(0, REACH)
    carry = tl.load(carries + (chunks - 1 - step if BACK else step), mask=step < end, other=1.0)
    return tl.min(tl.where(carry == 0.0, step, end), 0), tl.max(tl.where(carry == 0.0, step, begin), 0)


@triton.jit
def _start(
    begin_ptr, here, segment, p, n, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, P: tl.constexpr, N: tl.constexpr,
    BEGIN: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """What a row begins with; nothing in later segments."""
    state = tl.zeros((BLOCK_P, BLOCK_N), tl.float32)
    if BEGIN and segment == 0:
        state += load(begin_ptr + here, p, N, n, P, N, WHOLE).to(tl.float32)
    return state


@triton.jit
def _publish(
    state, kept, alones, kepts, flags, p, n, P: tl.constexpr, N: tl.constexpr, WHOLE: tl.constexpr
):  # fmt: skip
    """What a segment comes to alone, and what it keeps of a state before, for programs of later segments."""
    store(alones, p, N, n, P, N, WHOLE, state)
    tl.store(kepts, kept)
    tl.debug_barrier()
    tl.atomic_xchg(flags, 1)


@triton.jit
def _handed_over(
    state, segment, alones, kepts, flags, of_all, p, n,
    H: tl.constexpr, P: tl.constexpr, N: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """What `state` comes to before a segment, as soon as those before it have told what they come to."""
    # What the first segment tells has the beginning of the row in it.
    first, hidden = segment, segment == 0
    while hidden == 0:
        first -= 1
        while tl.atomic_cas(flags + first * of_all, 1, 1) != 1:
            pass
        hidden = (tl.load(kepts + first * of_all) == 0.0) | (first == 0)
    for earlier in range(first, segment):
        alone = load(alones + earlier * H * P * N, p, N, n, P, N, WHOLE)
        state = state * tl.load(kepts + earlier * of_all) + alone
    return state


@triton.jit
def states(
    a_ptr, b_ptr, planes_ptr, carry_ptr, begin_ptr, states_ptr, end_ptr, alone_ptr, kept_ptr, flag_ptr, time, chunks,
    plane, a_row, a_token: tl.constexpr, b_row, b_token: tl.constexpr,
    H: tl.constexpr, GROUP: tl.constexpr, P: tl.constexpr, N: tl.constexpr, Q: tl.constexpr, BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr, BACK: tl.constexpr, BEGIN: tl.constexpr, END: tl.constexpr, SEGMENTS: tl.constexpr,
    REACH: tl.constexpr, WHOLE: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """The state before every chunk, of x and B, and after the last; BACK: the gradient of the state after every chunk,
    of dy and C, and before the first. Chunks are counted as one walks, BACK from the end.

    Few long rows are cut into segments, whose programs run side by side. A chunk in which a document begins hides all
    before it, so behind one a state is known without those before. A program walks from the last such chunk to the end
    of its segment and tells what it comes to, from there to the first such chunk; then it takes what the segments
    before have told by now and walks from its beginning to the first. Where no chunk hides, it tells what the segment
    comes to from nothing and what is kept of a state before, and walks over it again.

    A program waits only for what programs with smaller numbers, which have begun before it, tell without waiting.
    """
    blocks_n: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    p = tl.program_id(0) // blocks_n * BLOCK_P + tl.arange(0, BLOCK_P)
    n = tl.program_id(0) % blocks_n * BLOCK_N + tl.arange(0, BLOCK_N)
    h, row = tl.program_id(1), (tl.program_id(2) // SEGMENTS).to(tl.int64)
    segment = tl.program_id(2) % SEGMENTS
    i = tl.arange(0, Q)
    a = a_ptr + row * a_row + h * P
    b = b_ptr + row * b_row + h // GROUP * N
    by_head = planes_ptr + (row * H + h) * chunks * Q + i
    carries = carry_ptr + (row * H + h) * chunks
    states = states_ptr + (row * chunks * H + h) * P * N
    length = tl.cdiv(chunks, SEGMENTS)
    begin, end = segment * length, tl.minimum((segment + 1) * length, chunks)
    here = (row * H + h) * P * N
    ended, last = end == chunks, end
    state = _start(begin_ptr, here, segment, p, n, BLOCK_P, BLOCK_N, P, N, BEGIN, WHOLE)
    if SEGMENTS > 1:
        head, tail = _hiding(carries, begin, end, chunks, REACH, BACK)
        # What the first segment begins with is known: it is walked over once, from its beginning to its end.
        head, tail = tl.where(segment == 0, begin, head), tl.where(segment == 0, begin, tail)
        hides = head < end
        alones = alone_ptr + (row * SEGMENTS * H + h) * P * N
        of_all = H * tl.num_programs(0)
        own = (row * SEGMENTS * H + h) * tl.num_programs(0) + tl.program_id(0)
        known = tl.where(segment == 0, begin, tl.where(hides, tail + 1, end))
        # Nothing reads what the last segment comes to alone.
        state, kept = _walk(
            state, tl.where(ended & (head == end), end, tail), end, known, a, b, by_head, carries, states, time, chunks,
            plane, p, n, i, a_token, b_token, H, P, N, Q, BACK, SEGMENTS, WHOLE, OPERAND, PRECISION, FAST,
        )  # fmt: skip
        _publish(
            state, kept, alones + segment * H * P * N, kept_ptr + own + segment * of_all,
            flag_ptr + own + segment * of_all, p, n, P, N, WHOLE,
        )  # fmt: skip
        if END and ended & hides:
            store(end_ptr + here, p, N, n, P, N, WHOLE, state)
        state, _ = _walk(
            tl.zeros((BLOCK_P, BLOCK_N), tl.float32), head, tail, head + 1, a, b, by_head, carries, states, time,
            chunks, plane, p, n, i, a_token, b_token, H, P, N, Q, BACK, SEGMENTS, WHOLE, OPERAND, PRECISION, FAST,
        )  # fmt: skip
        _put(head < tail, states, _chunk(tail, chunks, BACK), p, n, state, H, P, N, WHOLE)
        ended, last = ended & (head == end), head
        state = _start(begin_ptr, here, segment, p, n, BLOCK_P, BLOCK_N, P, N, BEGIN, WHOLE)
        state = _handed_over(
            state, segment, alones, kept_ptr + own, flag_ptr + own, of_all, p, n, H, P, N, WHOLE
        )  # fmt: skip
    state, _ = _walk(
        state, begin, last, begin, a, b, by_head, carries, states, time, chunks, plane, p, n, i, a_token, b_token,
        H, P, N, Q, BACK, SEGMENTS, WHOLE, OPERAND, PRECISION, FAST,
    )  # fmt: skip
    if SEGMENTS > 1:
        _put(hides, states, _chunk(head, chunks, BACK), p, n, state, H, P, N, WHOLE)
    if END and ended:
        store(end_ptr + here, p, N, n, P, N, WHOLE, state)


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
