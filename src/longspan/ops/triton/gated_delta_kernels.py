"""The kernels of the gated delta rule: the system of each chunk, states between chunks, outputs, and their gradients.

Inside a chunk the corrections u depend on each other through a unit lower triangular system, whose inverse turns the
chunk into products (the UT transform of the WY representation; Yang, Kautz & Hatamizadeh 2024). States run from chunk
to chunk of a segment inside one program (`states`, and `state_gradients` from the end); `joined` is one per row and
head, everything else one per chunk and head. Queries and keys count as vectors of one length: what they are multiplied
by for that is kept beside the decays.

Shapes: B rows, T tokens, J chunks of a row, Q tokens of a chunk (i reads, j is read), H heads, K key dim, V value dim.
Squares are (H of a chunk, Q, Q), states (B, J, H, K, V), all per-token scratch (B, J, H, Q, K or V).
"""

import triton
import triton.language as tl

from longspan.ops.triton.decays import FROM_BEFORE, SUM, TO_END
from longspan.ops.triton.tiles import dot, load, store

# As in the plain form.
NORM_EPS = tl.constexpr(1e-6)
# Planes of the norms: what a query (with its 1 / sqrt(K)) and a key are multiplied by.
QUERY, KEY = tl.constexpr(0), tl.constexpr(1)


@triton.jit
def _decay(sums, run, i):
    """(i, j): the decay from token j to token i, 0 where i does not see j."""
    sees = (i[:, None] >= i[None, :]) & (run[:, None] == run[None, :])
    return tl.exp(tl.where(sees, sums[:, None] - sums[None, :], float("-inf")))


@triton.jit
def _inverse(system, i, LEVELS: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr):
    """(I + system)^-1 of a strictly lower triangular system, from blocks of 1 to blocks of 2^LEVELS.

    Two inverted blocks make one of twice the size: their inverses, and below, minus inverse times system times inverse.
    """
    apart = i[:, None] ^ i[None, :]
    inverse = tl.where(apart == 0, 1.0, 0.0) - tl.where(apart == 1, system, 0.0)
    for level in tl.static_range(1, LEVELS):
        below = tl.where((apart >> level) == 1, system, 0.0)
        solved = dot(below, inverse, DTYPE, DTYPE, PRECISION)
        inverse -= dot(inverse, solved, DTYPE, DTYPE, PRECISION)
    return inverse


@triton.jit
def _place(h, chunk, chunks, row, H: tl.constexpr, Q: tl.constexpr, BLOCK_K: tl.constexpr):
    """Tokens of the chunk, key dims, tokens of the row; where the chunk lies in what goes by head, and by chunk."""
    i, c = tl.arange(0, Q), tl.arange(0, BLOCK_K)
    return i, c, chunk * Q + i, (row * H + h) * chunks * Q + chunk * Q, (row * chunks + chunk) * H + h


@triton.jit
def systems(
    q_ptr, k_ptr, beta_ptr, planes_ptr, norms_ptr, run_ptr, inverses_ptr, time, plane,
    q_row, q_token: tl.constexpr, k_row, k_token: tl.constexpr, beta_row, beta_token,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
    LEVELS: tl.constexpr, WHOLE: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr, SOLVE: tl.constexpr,
):  # fmt: skip
    """What queries and keys are multiplied by, and the inverse of a chunk's system."""
    h, chunk, chunks, row = tl.program_id(0), tl.program_id(1), tl.num_programs(1), tl.program_id(2).to(tl.int64)
    i, c, t, by_head, here = _place(h, chunk, chunks, row, H, Q, BLOCK_K)
    DTYPE: tl.constexpr = k_ptr.dtype.element_ty
    q = load(q_ptr + row * q_row + h * K, t, q_token, c, time, K, WHOLE).to(tl.float32)
    tl.store(norms_ptr + QUERY * plane + by_head + i, tl.rsqrt(tl.sum(q * q, 1) + NORM_EPS) * K**-0.5)
    k = load(k_ptr + row * k_row + h * K, t, k_token, c, time, K, WHOLE).to(tl.float32)
    inverse_length = tl.rsqrt(tl.sum(k * k, 1) + NORM_EPS)
    tl.store(norms_ptr + KEY * plane + by_head + i, inverse_length)
    k *= inverse_length[:, None]

    beta = tl.load(beta_ptr + row * beta_row + t * beta_token + h, mask=t < time, other=0.0).to(tl.float32)
    run, sums = tl.load(run_ptr + row * chunks * Q + t), tl.load(planes_ptr + SUM * plane + by_head + i)
    overlap = dot(k, tl.trans(k), DTYPE, OPERAND, PRECISION) * _decay(sums, run, i)
    system = tl.where(i[:, None] > i[None, :], overlap * beta[:, None], 0.0)
    inverse = _inverse(system, i, LEVELS, SOLVE, PRECISION)
    store(inverses_ptr + here * Q * Q, i, Q, i, Q, Q, True, inverse)


@triton.jit
def _segment(segments, length, chunks):
    """Row and number of this program's segment, its first chunk and the one after its last."""
    row, segment = (tl.program_id(2) // segments).to(tl.int64), tl.program_id(2) % segments
    return row, segment, segment * length, tl.minimum((segment + 1) * length, chunks)


@triton.jit
def states(
    k_ptr, v_ptr, beta_ptr, planes_ptr, norms_ptr, carry_ptr, initial_ptr, inverses_ptr, u_ptr, states_ptr, final_ptr,
    maps_ptr, time, chunks, plane, segments, length,
    k_row, k_token: tl.constexpr, v_row, v_token: tl.constexpr, beta_row, beta_token,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
    INITIAL: tl.constexpr, ENDS: tl.constexpr, SPAN: tl.constexpr,
    WHOLE: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The corrections u of all chunks of a segment, the state before every chunk and after the last of the row.

    What the norms, gates and decays of tokens multiply are rows of results, so that keys and inverses reach the tensor
    cores as they come from memory. ENDS: nothing but the state after every segment that begins with none, and, in more
    tiles, what a segment without values makes of the unit matrix: the map of any state over the segment. What lies
    before the last chunk over which nothing is kept, where a document ends, need not be walked through for that.
    """
    h, tile = tl.program_id(1), tl.program_id(0)
    # Maps are in the tiles after those of values; what they load as values counts as nothing.
    unit = tile >= (V + BLOCK_V - 1) // BLOCK_V
    v = tile * BLOCK_V + tl.arange(0, BLOCK_V)
    column = tl.where(unit, 0, tile) * BLOCK_V + tl.arange(0, BLOCK_V) if ENDS else v
    row, segment, first, last = _segment(segments, length, chunks)
    i, c = tl.arange(0, Q), tl.arange(0, BLOCK_K)
    DTYPE: tl.constexpr = k_ptr.dtype.element_ty
    by_head, by_segment = (row * H + h) * chunks * Q, (row * segments + segment) * H + h
    state = tl.zeros((BLOCK_K, BLOCK_V), tl.float32)
    if INITIAL:
        state += load(initial_ptr + by_segment * K * V, c, V, v, K, V, WHOLE).to(tl.float32)
    if ENDS:
        v -= tl.where(unit, (V + BLOCK_V - 1) // BLOCK_V * BLOCK_V, 0)
        j = first + tl.arange(0, SPAN)
        carries = tl.load(carry_ptr + (row * H + h) * chunks + j, mask=j < last, other=1.0)
        forgetful = tl.max(tl.where(carries == 0.0, j, -1), 0)
        state += tl.where(unit & (forgetful < 0) & (c[:, None] == v[None, :]), 1.0, 0.0)
        first = tl.where(forgetful < 0, first, tl.where(unit, last, forgetful))
    for chunk in range(first, last):
        here = (row * chunks + chunk) * H + h
        if not ENDS:
            store(states_ptr + here * K * V, c, V, v, K, V, WHOLE, state)
        t = chunk * Q + i
        at = by_head + t
        k = load(k_ptr + row * k_row + h * K, t, k_token, c, time, K, WHOLE)
        values = load(v_ptr + row * v_row + h * V, t, v_token, column, time, V, WHOLE).to(tl.float32)
        if ENDS:
            values *= tl.where(unit, 0.0, 1.0)
        inverse = load(inverses_ptr + here * Q * Q, i, Q, i, Q, Q, True)
        beta = tl.load(beta_ptr + row * beta_row + t * beta_token + h, mask=t < time, other=0.0).to(tl.float32)
        norm = tl.load(norms_ptr + KEY * plane + at)
        read = norm * tl.load(planes_ptr + FROM_BEFORE * plane + at)
        written = norm * tl.load(planes_ptr + TO_END * plane + at)
        error = values - dot(k, state, DTYPE, OPERAND, PRECISION) * read[:, None]
        u = dot(inverse, error * beta[:, None], DTYPE, OPERAND, PRECISION)
        if not ENDS:
            store(u_ptr + here * Q * V, i, V, v, Q, V, WHOLE, u)
        carry = tl.load(carry_ptr + (row * H + h) * chunks + chunk)
        state = state * carry + dot(tl.trans(k), u * written[:, None], DTYPE, OPERAND, PRECISION)
    if ENDS:
        if unit:
            store(maps_ptr + by_segment * K * K, c, K, v, K, K, False, state)
        else:
            store(final_ptr + by_segment * K * V, c, V, v, K, V, WHOLE, state)
    elif segment == segments - 1:
        store(final_ptr + (row * H + h) * K * V, c, V, v, K, V, WHOLE, state)


@triton.jit
def joined(
    maps_ptr, ends_ptr, initial_ptr, begins_ptr, segments,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
    INITIAL: tl.constexpr, BACK: tl.constexpr,
):  # fmt: skip
    """The state that every segment begins with, from what each makes of none; BACK: the gradient that it ends with."""
    v = tl.program_id(0) * BLOCK_V + tl.arange(0, BLOCK_V)
    h, row = tl.program_id(1), tl.program_id(2).to(tl.int64)
    c = tl.arange(0, BLOCK_K)
    state = tl.zeros((BLOCK_K, BLOCK_V), tl.float32)
    if INITIAL:
        state += load(initial_ptr + (row * H + h) * K * V, c, V, v, K, V, False).to(tl.float32)
    for step in range(segments):
        segment = segments - 1 - step if BACK else step
        here = (row * segments + segment) * H + h
        store(begins_ptr + here * K * V, c, V, v, K, V, False, state)
        over = load(maps_ptr + here * K * K, c, K, c, K, K, False)
        state = tl.dot(tl.trans(over) if BACK else over, state, input_precision="tf32x3")
        state += load(ends_ptr + here * K * V, c, V, v, K, V, False)


@triton.jit
def outputs(
    q_ptr, k_ptr, planes_ptr, norms_ptr, run_ptr, u_ptr, states_ptr, o_ptr, time, plane,
    q_row, q_token: tl.constexpr, k_row, k_token: tl.constexpr,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
    WHOLE: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """o of one chunk and head."""
    h, chunk, chunks, row = tl.program_id(0), tl.program_id(1), tl.num_programs(1), tl.program_id(2).to(tl.int64)
    i, c, t, by_head, here = _place(h, chunk, chunks, row, H, Q, BLOCK_K)
    DTYPE: tl.constexpr = q_ptr.dtype.element_ty
    run, sums = tl.load(run_ptr + row * chunks * Q + t), tl.load(planes_ptr + SUM * plane + by_head + i)
    q = load(q_ptr + row * q_row + h * K, t, q_token, c, time, K, WHOLE)
    k = load(k_ptr + row * k_row + h * K, t, k_token, c, time, K, WHOLE)
    queries, keys = tl.load(norms_ptr + QUERY * plane + by_head + i), tl.load(norms_ptr + KEY * plane + by_head + i)
    from_before = tl.load(planes_ptr + FROM_BEFORE * plane + by_head + i) * queries
    scores = dot(q, tl.trans(k), DTYPE, OPERAND, PRECISION) * _decay(sums, run, i)
    scores = (scores * queries[:, None] * keys[None, :]).to(DTYPE)
    for first in range(0, V, BLOCK_V):
        v = first + tl.arange(0, BLOCK_V)
        before = load(states_ptr + here * K * V, c, V, v, K, V, WHOLE)
        u = load(u_ptr + here * Q * V, i, V, v, Q, V, WHOLE)
        o = dot(q, before, DTYPE, OPERAND, PRECISION) * from_before[:, None]
        o += dot(scores, u, DTYPE, OPERAND, PRECISION)
        store(o_ptr + row * time * H * V + h * V, t, H * V, v, time, V, WHOLE, o)


@triton.jit
def correction_gradients(
    q_ptr, k_ptr, do_ptr, planes_ptr, norms_ptr, run_ptr, du_ptr, time, plane,
    q_row, q_token: tl.constexpr, k_row, k_token: tl.constexpr, do_row, do_token: tl.constexpr,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
    WHOLE: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What the outputs of a chunk give to its corrections."""
    h, chunk, chunks, row = tl.program_id(0), tl.program_id(1), tl.num_programs(1), tl.program_id(2).to(tl.int64)
    i, c, t, by_head, here = _place(h, chunk, chunks, row, H, Q, BLOCK_K)
    DTYPE: tl.constexpr = q_ptr.dtype.element_ty
    run, sums = tl.load(run_ptr + row * chunks * Q + t), tl.load(planes_ptr + SUM * plane + by_head + i)
    q = load(q_ptr + row * q_row + h * K, t, q_token, c, time, K, WHOLE)
    k = load(k_ptr + row * k_row + h * K, t, k_token, c, time, K, WHOLE)
    queries, keys = tl.load(norms_ptr + QUERY * plane + by_head + i), tl.load(norms_ptr + KEY * plane + by_head + i)
    # With the token that is read first, (j, i), so that no product needs a transpose.
    seen = (i[:, None] <= i[None, :]) & (run[:, None] == run[None, :])
    decay = tl.exp(tl.where(seen, sums[None, :] - sums[:, None], float("-inf")))
    scores = dot(k, tl.trans(q), DTYPE, OPERAND, PRECISION) * decay
    scores = (scores * keys[:, None] * queries[None, :]).to(DTYPE)
    for first in range(0, V, BLOCK_V):
        v = first + tl.arange(0, BLOCK_V)
        do = load(do_ptr + row * do_row + h * V, t, do_token, v, time, V, WHOLE)
        store(du_ptr + here * Q * V, i, V, v, Q, V, WHOLE, dot(scores, do, DTYPE, OPERAND, PRECISION))


@triton.jit
def state_gradients(
    q_ptr, k_ptr, beta_ptr, do_ptr, planes_ptr, norms_ptr, carry_ptr, inverses_ptr, dfinal_ptr, du_ptr, dstates_ptr,
    dinitial_ptr, time, chunks, plane, segments, length, q_row, q_token: tl.constexpr, k_row, k_token: tl.constexpr,
    beta_row, beta_token, do_row, do_token: tl.constexpr,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
    FINAL: tl.constexpr, INITIAL: tl.constexpr, ENDS: tl.constexpr, SPAN: tl.constexpr,
    WHOLE: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The gradient of the state after every chunk of a segment and of the one before the row; in the place of what the
    outputs give to u, the gradient of what the inverse multiplies. Rows of results are scaled as in `states`.

    ENDS: nothing but the gradient of the state before every segment after which nothing is read, from the first chunk
    on that forgets it.
    """
    v = tl.program_id(0) * BLOCK_V + tl.arange(0, BLOCK_V)
    h = tl.program_id(1)
    row, segment, first, last = _segment(segments, length, chunks)
    i, c = tl.arange(0, Q), tl.arange(0, BLOCK_K)
    DTYPE: tl.constexpr = k_ptr.dtype.element_ty
    by_head, by_segment = (row * H + h) * chunks * Q, (row * segments + segment) * H + h
    dstate = tl.zeros((BLOCK_K, BLOCK_V), tl.float32)
    if FINAL:
        dstate += load(dfinal_ptr + by_segment * K * V, c, V, v, K, V, WHOLE).to(tl.float32)
    if ENDS:
        j = first + tl.arange(0, SPAN)
        carries = tl.load(carry_ptr + (row * H + h) * chunks + j, mask=j < last, other=1.0)
        last = tl.min(tl.where(carries == 0.0, j + 1, last), 0)
    for back in range(last - first):
        chunk = last - 1 - back
        here = (row * chunks + chunk) * H + h
        if not ENDS:
            store(dstates_ptr + here * K * V, c, V, v, K, V, WHOLE, dstate)
        t = chunk * Q + i
        at = by_head + t
        q = load(q_ptr + row * q_row + h * K, t, q_token, c, time, K, WHOLE)
        k = load(k_ptr + row * k_row + h * K, t, k_token, c, time, K, WHOLE)
        do = load(do_ptr + row * do_row + h * V, t, do_token, v, time, V, WHOLE)
        inverse = load(inverses_ptr + here * Q * Q, i, Q, i, Q, Q, True)
        du = load(du_ptr + here * Q * V, i, V, v, Q, V, WHOLE).to(tl.float32)
        beta = tl.load(beta_ptr + row * beta_row + t * beta_token + h, mask=t < time, other=0.0).to(tl.float32)
        norm, from_before = tl.load(norms_ptr + KEY * plane + at), tl.load(planes_ptr + FROM_BEFORE * plane + at)
        written = norm * tl.load(planes_ptr + TO_END * plane + at)
        queried = from_before * tl.load(norms_ptr + QUERY * plane + at)
        du += dot(k, dstate, DTYPE, OPERAND, PRECISION) * written[:, None]
        dsolved = dot(tl.trans(inverse), du, DTYPE, OPERAND, PRECISION)
        if not ENDS:
            store(du_ptr + here * Q * V, i, V, v, Q, V, WHOLE, dsolved)
        dstate = dstate * tl.load(carry_ptr + (row * H + h) * chunks + chunk)
        dstate += dot(tl.trans(q), do.to(tl.float32) * queried[:, None], DTYPE, OPERAND, PRECISION)
        dstate += dot(tl.trans(k), dsolved * (-norm * beta * from_before)[:, None], DTYPE, OPERAND, PRECISION)
    if ENDS:
        store(dinitial_ptr + by_segment * K * V, c, V, v, K, V, WHOLE, dstate)
    elif INITIAL and segment == 0:
        store(dinitial_ptr + (row * H + h) * K * V, c, V, v, K, V, WHOLE, dstate)


@triton.jit
def mixing_gradients(
    q_ptr, k_ptr, do_ptr, planes_ptr, norms_ptr, carry_ptr, run_ptr, u_ptr, states_ptr, dstates_ptr,
    dq_ptr, dk_ptr, dsums_ptr, time, plane, q_row, q_token: tl.constexpr, k_row, k_token: tl.constexpr,
    do_row, do_token: tl.constexpr, dq_row, dq_token: tl.constexpr,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
    WHOLE: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The gradient of q, and what outputs and states give to keys, without the norm's part, and to sums of log decays.

    What normalises queries and keys multiplies results here too: gradients through the norm of a key k of weight n are
    P - k n^2 (P k), where P is the gradient of the normalised key times n.
    """
    h, chunk, chunks, row = tl.program_id(0), tl.program_id(1), tl.num_programs(1), tl.program_id(2).to(tl.int64)
    i, c, t, by_head, here = _place(h, chunk, chunks, row, H, Q, BLOCK_K)
    DTYPE: tl.constexpr = q_ptr.dtype.element_ty
    # On their way before the products begin; rows and columns of weights would take too many registers.
    q = load(q_ptr + row * q_row + h * K, t, q_token, c, time, K, WHOLE)
    k = load(k_ptr + row * k_row + h * K, t, k_token, c, time, K, WHOLE)
    dmixing = tl.zeros((Q, Q), tl.float32)
    reads, writes = tl.zeros((Q, BLOCK_K), tl.float32), tl.zeros((Q, BLOCK_K), tl.float32)
    carried = tl.zeros((BLOCK_K,), tl.float32)
    for first in range(0, V, BLOCK_V):
        v = first + tl.arange(0, BLOCK_V)
        do = load(do_ptr + row * do_row + h * V, t, do_token, v, time, V, WHOLE)
        u = load(u_ptr + here * Q * V, i, V, v, Q, V, WHOLE)
        before = load(states_ptr + here * K * V, c, V, v, K, V, WHOLE)
        dafter = load(dstates_ptr + here * K * V, c, V, v, K, V, WHOLE)
        dmixing += dot(do, tl.trans(u), DTYPE, OPERAND, PRECISION)
        reads += dot(do, tl.trans(before), DTYPE, OPERAND, PRECISION)
        writes += dot(u, tl.trans(dafter), DTYPE, OPERAND, PRECISION)
        carried += tl.sum(before.to(tl.float32) * dafter.to(tl.float32), 1)
    run, sums = tl.load(run_ptr + row * chunks * Q + t), tl.load(planes_ptr + SUM * plane + by_head + i)
    queries, keys = tl.load(norms_ptr + QUERY * plane + by_head + i), tl.load(norms_ptr + KEY * plane + by_head + i)
    dmixing *= _decay(sums, run, i) * queries[:, None] * keys[None, :]
    reads *= (queries * tl.load(planes_ptr + FROM_BEFORE * plane + by_head + i))[:, None]
    writes *= (keys * tl.load(planes_ptr + TO_END * plane + by_head + i))[:, None]
    dlog = dmixing * dot(q, tl.trans(k), DTYPE, OPERAND, PRECISION)
    kept = tl.sum(writes * k.to(tl.float32), 1)
    dend = tl.sum(kept, 0) + tl.sum(carried, 0) * tl.load(carry_ptr + (row * H + h) * chunks + chunk)
    read = tl.sum(reads * q.to(tl.float32), 1)
    dsums = tl.sum(dlog, 1) - tl.sum(dlog, 0) + read - kept + tl.where(i == Q - 1, dend, 0.0)
    tl.store(dsums_ptr + by_head + i, dsums)
    dmixing = dmixing.to(DTYPE)
    writes += dot(tl.trans(dmixing), q, DTYPE, OPERAND, PRECISION)
    store(dk_ptr + here * Q * K, i, K, c, Q, K, WHOLE, writes)
    reads += dot(dmixing, k, DTYPE, OPERAND, PRECISION)
    # Through the norm: what lies along q does not change its length.
    q = q.to(tl.float32)
    dq = reads - q * (tl.sum(reads * q, 1) * queries * queries * K)[:, None]
    store(dq_ptr + row * dq_row + h * K, t, dq_token, c, time, K, WHOLE, dq)


@triton.jit
def system_gradients(
    k_ptr, v_ptr, beta_ptr, planes_ptr, norms_ptr, run_ptr, u_ptr, dsolved_ptr, states_ptr, dk_part_ptr, dsums_ptr,
    dk_ptr, dv_ptr, dg_ptr, dbeta_ptr, time, plane,
    k_row, k_token: tl.constexpr, v_row, v_token: tl.constexpr, beta_row, beta_token,
    dk_row, dk_token: tl.constexpr, dv_row, dv_token: tl.constexpr,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
    WHOLE: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The gradients of v and beta, and of k and g with what `mixing_gradients` found for them."""
    h, chunk, chunks, row = tl.program_id(0), tl.program_id(1), tl.num_programs(1), tl.program_id(2).to(tl.int64)
    i, c, t, by_head, here = _place(h, chunk, chunks, row, H, Q, BLOCK_K)
    DTYPE: tl.constexpr = k_ptr.dtype.element_ty
    beta = tl.load(beta_ptr + row * beta_row + t * beta_token + h, mask=t < time, other=0.0).to(tl.float32)
    k = load(k_ptr + row * k_row + h * K, t, k_token, c, time, K, WHOLE)
    dk_part = load(dk_part_ptr + here * Q * K, i, K, c, Q, K, WHOLE)
    dsystem, reads = tl.zeros((Q, Q), tl.float32), tl.zeros((Q, BLOCK_K), tl.float32)
    dbeta = tl.zeros((Q,), tl.float32)
    for first in range(0, V, BLOCK_V):
        v = first + tl.arange(0, BLOCK_V)
        dsolved = load(dsolved_ptr + here * Q * V, i, V, v, Q, V, WHOLE)
        values = load(v_ptr + row * v_row + h * V, t, v_token, v, time, V, WHOLE)
        u = load(u_ptr + here * Q * V, i, V, v, Q, V, WHOLE)
        before = load(states_ptr + here * K * V, c, V, v, K, V, WHOLE)
        dsystem -= dot(dsolved, tl.trans(u), DTYPE, OPERAND, PRECISION)
        reads += dot(dsolved, tl.trans(before), DTYPE, OPERAND, PRECISION)
        dsolved = dsolved.to(tl.float32)
        store(dv_ptr + row * dv_row + h * V, t, dv_token, v, time, V, WHOLE, dsolved * beta[:, None])
        dbeta += tl.sum(dsolved * values.to(tl.float32), 1)
    run, sums = tl.load(run_ptr + row * chunks * Q + t), tl.load(planes_ptr + SUM * plane + by_head + i)
    keys = tl.load(norms_ptr + KEY * plane + by_head + i)
    dsystem *= _decay(sums, run, i) * keys[:, None] * keys[None, :]
    dsystem = tl.where(i[:, None] > i[None, :], dsystem, 0.0)
    reads *= (keys * tl.load(planes_ptr + FROM_BEFORE * plane + by_head + i))[:, None]
    overlaps = dsystem * dot(k, tl.trans(k), DTYPE, OPERAND, PRECISION)
    read = tl.sum(reads * k.to(tl.float32), 1)
    dbeta += tl.sum(overlaps, 1) - read
    overlaps *= beta[:, None]
    dsums = tl.load(dsums_ptr + by_head + i) + tl.sum(overlaps, 1) - tl.sum(overlaps, 0) - beta * read
    at = (row * time + t) * H + h
    tl.store(dbeta_ptr + at, dbeta.to(dbeta_ptr.dtype.element_ty), mask=t < time)
    # Token t decays all that come after it in its document.
    square = tl.zeros((Q, Q), tl.float32) + dsums[None, :]
    sees = (i[:, None] <= i[None, :]) & (run[:, None] == run[None, :])
    dg = tl.sum(tl.where(sees, square, 0.0), 1)
    tl.store(dg_ptr + at, dg.to(dg_ptr.dtype.element_ty), mask=t < time)
    dsystem = (dsystem * beta[:, None]).to(DTYPE)
    dk = dk_part.to(tl.float32) - reads * beta[:, None]
    dk += dot(dsystem, k, DTYPE, OPERAND, PRECISION)
    dk += dot(tl.trans(dsystem), k, DTYPE, OPERAND, PRECISION)
    k = k.to(tl.float32)
    dk -= k * (tl.sum(dk * k, 1) * keys * keys)[:, None]
    store(dk_ptr + row * dk_row + h * K, t, dk_token, c, time, K, WHOLE, dk)
