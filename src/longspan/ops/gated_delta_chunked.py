"""The gated delta rule as matmuls over chunks with a hand-written backward.

Within a chunk the corrections u depend on each other through a unit lower triangular system, (I + A) U = R with
A[i, j] = beta[i] decay[i, j] k[i].k[j] for j < i. Its inverse turns the chunk into matmuls (the UT transform of the WY
representation), and only the states between chunks are left to a loop. As in `ssd_chunked` the work walks over tiles
that stay in cache, and the backward computes again what it can.

Shapes: B batch, T time, H heads, K key dim, V value dim, C chunks of a row, q time in a chunk; in a tile: r rows,
c chunks of all its rows, h heads, n = c * h.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from longspan.ops.compiling import never_compiled
from longspan.ops.ssd_tiles import Boundaries, Decays, Tile, tiles

NORM_EPS = 1e-6


class Inputs(NamedTuple):
    """What is cut into chunks: q and k (B, C, q, H, K), v (B, C, q, H, V), g and beta (B, C, q, H)."""

    q: Tensor
    k: Tensor
    v: Tensor
    g: Tensor
    beta: Tensor


@never_compiled
def gated_delta_chunked(
    q_BTHK: Tensor,
    k_BTHK: Tensor,
    v_BTHV: Tensor,
    g_BTH: Tensor,
    beta_BTH: Tensor,
    doc_BT: Tensor | None,
    initial_state_BHKV: Tensor | None,
    initial_doc_B: Tensor | None,
    chunk: int,
) -> tuple[Tensor, Tensor]:
    """The matmul form for any T: pads to whole chunks with tokens that neither decay nor correct a state."""
    batch, time, heads, key_dim = k_BTHK.shape
    dtype = torch.float64 if v_BTHV.dtype == torch.float64 else torch.float32
    size = min(chunk, time)
    padding = -time % size
    values = (q_BTHK, k_BTHK, v_BTHV, g_BTH, beta_BTH)
    inputs = Inputs(*(_cut(z.to(dtype), size, padding) for z in values))
    if doc_BT is not None and padding:
        doc_BT = torch.cat((doc_BT, doc_BT[:, -1:].expand(batch, padding)), dim=1)
    boundaries = Boundaries.build(doc_BT, initial_doc_B, size, dtype, v_BTHV.device)
    if initial_state_BHKV is None:
        state = inputs.v.new_zeros(batch, heads, key_dim, v_BTHV.shape[-1])
    else:
        state = initial_state_BHKV.to(dtype)
    if torch.is_grad_enabled() and any(z.requires_grad for z in (*inputs, state)):
        o, state = _Scan.apply(*inputs, state, boundaries)  # type: ignore[no-untyped-call]
    else:
        o, state = _scan(inputs, state, boundaries, None)
    o_BTHV = o.flatten(1, 2)
    return (o_BTHV[:, :time] if padding else o_BTHV).to(v_BTHV.dtype), state


def normalise(z: Tensor) -> tuple[Tensor, Tensor]:
    """z / sqrt(|z|^2 + eps) over the last dimension, and 1 / sqrt(..)."""
    inverse = torch.linalg.vector_norm(z, dim=-1, keepdim=True).square().add_(NORM_EPS).rsqrt_()
    return z * inverse, inverse


def _through_norm(dz: Tensor, normed: Tensor, inverse: Tensor, scale: float = 1.0) -> Tensor:
    """The gradient of what became `normed` of length `scale`, from that of the result; `dz` is used up."""
    return dz.addcmul_(normed, _dot(dz, normed).unsqueeze(-1), value=-(scale**-2)).mul_(inverse)


def _cut(values_BT: Tensor, size: int, padding: int) -> Tensor:
    """(B, T, ...) -> (B, C, q, ...)."""
    if padding:
        values_BT = F.pad(values_BT, (0, 0) * (values_BT.dim() - 2) + (0, padding))
    return values_BT.reshape(values_BT.shape[0], -1, size, *values_BT.shape[2:])


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum(-1)


def _tiles(inputs: Inputs) -> list[Tile]:
    """One head at a time on a CPU, where its chunks are strided views; all at once on a GPU."""
    return list(tiles(inputs.v, inputs.v.shape[3] if inputs.v.device.type == "cpu" else 1))


def _flat(values_cqh: Tensor) -> Tensor:
    """(c, q, h, ...) -> (n, q, ...), a view for one head."""
    return values_cqh.transpose(1, 2).flatten(0, 1)


class _Tile(NamedTuple):
    """What forward and backward both need of a tile.

    Attributes:
        q, k: (n, q, K) of length 1, q over sqrt(K); q_inverse, k_inverse: (n, q, 1) what they were divided by.
        v: (n, q, V).
        beta, to_end, from_before: (n, q, 1).
        carry: (r, C, h, 1, 1).
        between: (n, q, q), decay from token j to token i, zero where j > i or another document.
        overlap: (n, q, q), k[i].k[j] times that decay, zero where j >= i.
    """

    q: Tensor
    k: Tensor
    q_inverse: Tensor
    k_inverse: Tensor
    v: Tensor
    beta: Tensor
    to_end: Tensor
    from_before: Tensor
    carry: Tensor
    between: Tensor
    overlap: Tensor

    @staticmethod
    def build(inputs: Inputs, tile: Tile, boundaries: Boundaries) -> _Tile:
        rows = tile.rows.stop - tile.rows.start
        q, q_inverse = normalise(_flat(tile.of_heads(inputs.q)))
        k, k_inverse = normalise(_flat(tile.of_heads(inputs.k)))
        scale = q.shape[-1] ** -0.5
        decays = Decays.build(tile.of_heads(inputs.g), boundaries)
        heads = decays.carry_ch.shape[1]
        between = decays.between().mul_(boundaries.mask.unsqueeze(-3)).flatten(0, 1)
        return _Tile(
            q.mul_(scale),
            k,
            q_inverse.mul_(scale),
            k_inverse,
            _flat(tile.of_heads(inputs.v)),
            _flat(tile.of_heads(inputs.beta)).unsqueeze(-1),
            _flat(decays.to_end_cqh).unsqueeze(-1),
            _flat(decays.from_before_cqh).unsqueeze(-1),
            decays.carry_ch.view(rows, -1, heads, 1, 1),
            between,
            torch.bmm(k, k.mT).mul_(between).tril_(-1),
        )

    def by_chunk(self, values_n: Tensor) -> Tensor:
        """(n, ...) -> (r, C, h, ...)."""
        return values_n.view(*self.carry.shape[:3], *values_n.shape[1:])

    def in_order(self, parts: list[Tensor]) -> Tensor:
        """(n, q, V) from one (r * h, q, V) per chunk."""
        rows, _, heads = self.carry.shape[:3]
        return torch.stack([part.view(rows, heads, *part.shape[1:]) for part in parts], dim=1).flatten(0, 2)

    def back(self, values_n: Tensor) -> Tensor:
        """(n, q, ...) -> (c, q, h, ...)."""
        return values_n.view(-1, self.carry.shape[2], *values_n.shape[1:]).transpose(1, 2)


def _scan(
    inputs: Inputs, state_BHKV: Tensor, boundaries: Boundaries, kept: tuple[Tensor, Tensor] | None
) -> tuple[Tensor, Tensor]:
    """All tiles forward; `kept`, when given, receives the state before every chunk and the inverse of its system."""
    o = torch.empty_like(inputs.v, memory_format=torch.contiguous_format)
    state_BHKV = state_BHKV.clone(memory_format=torch.contiguous_format)
    for tile in _tiles(inputs):
        part = _Tile.build(inputs, tile, boundaries.of(tile.rows, tile.chunks))
        state_rhKV = state_BHKV[tile.rows, tile.heads]
        inverse = _inverse(part)
        o_tile, states, after = _scan_tile(part, inverse, state_rhKV)
        tile.put_heads(o, o_tile)
        if kept is not None:
            kept[0][tile.rows, tile.chunks, tile.heads] = states
            kept[1][tile.rows, tile.chunks, tile.heads] = part.by_chunk(inverse)
        state_rhKV.copy_(after)
    return o, state_BHKV


def _inverse(part: _Tile) -> Tensor:
    """(n, q, q): (I + A)^-1; tokens of different documents meet in exact zeros only."""
    size = part.overlap.shape[-1]
    eye = torch.eye(size, dtype=part.k.dtype, device=part.k.device)
    inverse: Tensor = torch.linalg.solve_triangular(part.overlap * part.beta, eye, upper=False, unitriangular=True)
    return inverse


def _scan_tile(part: _Tile, inverse: Tensor, state_rhKV: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """One tile forward: o (c, q, h, V), the state before every chunk (r, C, h, K, V), the state after the tile."""
    chunks = part.carry.shape[1]
    free = part.by_chunk(torch.bmm(inverse, part.v * part.beta))
    reading = part.by_chunk(torch.bmm(inverse, part.k * (part.beta * part.from_before)))
    writing = part.by_chunk(part.k * part.to_end)
    states, corrections = [], []
    for c in range(chunks):
        states.append(state_rhKV)
        state = state_rhKV.flatten(0, 1)
        u = torch.baddbmm(free[:, c].flatten(0, 1), reading[:, c].flatten(0, 1), state, alpha=-1)
        state_rhKV = part.carry[:, c] * state_rhKV
        state_rhKV.view_as(state).baddbmm_(writing[:, c].flatten(0, 1).mT, u)
        corrections.append(u)
    before = torch.stack(states, dim=1)
    o = torch.bmm(part.q, before.flatten(0, 2)).mul_(part.from_before)
    o.baddbmm_(torch.bmm(part.q, part.k.mT).mul_(part.between), part.in_order(corrections))
    return part.back(o), before, state_rhKV


class Gradients(NamedTuple):
    """Gradients of one tile, (c, q, h, ...) as its inputs, and that of the state before it."""

    q: Tensor
    k: Tensor
    v: Tensor
    g: Tensor
    beta: Tensor
    state: Tensor


def _backward_tile(
    part: _Tile,
    inverse: Tensor,
    boundaries: Boundaries,
    states_rChKV: Tensor,
    after_rhKV: Tensor,
    o: Tensor,
    do: Tensor,
    dafter_rhKV: Tensor,
) -> Gradients:
    """One tile backward, from the gradients of its outputs o (n, q, V) and of the state after it.

    As in `ssd_chunked`, the sums of g need no gradient through the (q, q) decays: what token i collects over them is
    do_i . o_i, what it gives out is v_i . dv_i, and the end of a chunk adds dstate . state.
    """
    rows, chunks, heads = part.carry.shape[:3]
    before = states_rChKV.flatten(0, 2)
    error = torch.addcmul(part.v, torch.bmm(part.k, before), part.from_before, value=-1)
    u = torch.bmm(inverse, error * part.beta)
    reading = part.by_chunk(torch.bmm(inverse, part.k * (part.beta * part.from_before)))
    writing = part.by_chunk(part.k * part.to_end)
    mixing = torch.bmm(part.q, part.k.mT).mul_(part.between)

    du = part.by_chunk(torch.bmm(mixing.mT, do))
    dstates = part.by_chunk(torch.bmm((part.q * part.from_before).mT, do))
    gained, corrected = [], []
    dstate_rhKV = dafter_rhKV
    for c in reversed(range(chunks)):
        gained.append(dstate_rhKV)
        dstate = dstate_rhKV.flatten(0, 1)
        du_c = torch.baddbmm(du[:, c].flatten(0, 1), writing[:, c].flatten(0, 1), dstate)
        dstate_rhKV = torch.addcmul(dstates[:, c], part.carry[:, c], dstate_rhKV)
        dstate_rhKV.view_as(dstate).baddbmm_(reading[:, c].flatten(0, 1).mT, du_c, alpha=-1)
        corrected.append(du_c)
    dgained_rChKV = torch.stack(gained[::-1], dim=1)
    dgained = dgained_rChKV.flatten(0, 2)
    ends = torch.cat((states_rChKV[:, 1:], after_rhKV.unsqueeze(1)), dim=1)
    dend_c1h = _dot(dgained_rChKV.flatten(3), ends.flatten(3)).view(rows * chunks, 1, heads)

    dr = torch.bmm(inverse.mT, part.in_order(corrected[::-1]))
    dsystem = torch.bmm(dr, u.mT).neg_()
    dbeta = _dot(dr, error).add_(_dot(dsystem, part.overlap))
    doverlap = dsystem.mul_(part.between).mul_(part.beta).tril_(-1)
    dmixing = torch.bmm(do, u.mT).mul_(part.between)

    dq = torch.bmm(do, before.mT).mul_(part.from_before).baddbmm_(dmixing, part.k)
    dk = torch.bmm(u, dgained.mT).mul_(part.to_end)
    dk.addcmul_(torch.bmm(dr, before.mT), part.beta * part.from_before, value=-1)
    dk.baddbmm_(dmixing.mT, part.q)
    dk.baddbmm_(doverlap + doverlap.mT, part.k)
    dv = dr.mul_(part.beta)

    dsteps = part.back(_dot(do, o).sub_(_dot(dv, part.v)))
    dsteps[:, -1:] += dend_c1h
    return Gradients(
        part.back(_through_norm(dq, part.q, part.q_inverse, part.q.shape[-1] ** -0.5)),
        part.back(_through_norm(dk, part.k, part.k_inverse)),
        part.back(dv),
        torch.matmul(boundaries.mask.mT, dsteps),
        part.back(dbeta),
        dstate_rhKV,
    )


class _Scan(torch.autograd.Function):
    """The scan with its gradient; keeps the inputs, the output, and per chunk one state and one inverse."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        g: Tensor,
        beta: Tensor,
        state_BHKV: Tensor,
        boundaries: Boundaries,
    ) -> tuple[Tensor, Tensor]:
        batch, chunks, size, heads = g.shape
        states_BCHKV = v.new_empty(batch, chunks, *state_BHKV.shape[1:])
        inverses = v.new_empty(batch, chunks, heads, size, size)
        o, final = _scan(Inputs(q, k, v, g, beta), state_BHKV, boundaries, (states_BCHKV, inverses))
        ctx.save_for_backward(q, k, v, g, beta, states_BCHKV, inverses, o, final)
        ctx.boundaries = boundaries
        return o, final

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, do: Tensor, dfinal_BHKV: Tensor) -> tuple[Tensor | None, ...]:
        *saved, states_BCHKV, inverses, o, final_BHKV = ctx.saved_tensors
        inputs = Inputs(*saved)
        found = [torch.empty_like(z, memory_format=torch.contiguous_format) for z in inputs]
        dstate_BHKV = dfinal_BHKV.clone(memory_format=torch.contiguous_format)
        last = inputs.v.shape[1]
        for tile in reversed(_tiles(inputs)):
            rows, stop, heads = tile.rows, tile.chunks.stop, tile.heads
            boundaries = ctx.boundaries.of(rows, tile.chunks)
            gradients = _backward_tile(
                _Tile.build(inputs, tile, boundaries),
                inverses[rows, tile.chunks, heads].flatten(0, 2),
                boundaries,
                states_BCHKV[rows, tile.chunks, heads],
                final_BHKV[rows, heads] if stop == last else states_BCHKV[rows, stop, heads],
                _flat(tile.of_heads(o)),
                _flat(tile.of_heads(do)),
                dstate_BHKV[rows, heads],
            )
            for target, gradient in zip(found, gradients, strict=False):
                tile.put_heads(target, gradient)
            dstate_BHKV[rows, heads] = gradients.state
        return *found, dstate_BHKV, None
