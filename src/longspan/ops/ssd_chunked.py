"""SSD as matmuls over chunks with a hand-written backward, so that a Mamba-2 layer trains at matmul speed on a CPU.

What costs time in the plain chunked form is not its arithmetic but its memory: autograd keeps several tensors of
(chunks, heads, q, q) and the allocator returns them to the system every step. Here the scan walks over tiles of a few
thousand tokens that stay in cache, keeps only the states between chunks, and computes the decays again in the backward.

Shapes: B batch, T time, H heads, P (p) head dim, G groups, N (n) state, C chunks of a row, q time in a chunk; in a
tile: r rows, c chunks of all its rows, h heads of one group.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from longspan.ops.compiling import never_compiled
from longspan.ops.ssd_tiles import Boundaries, Decays, Tile, tiles


class Inputs(NamedTuple):
    """The scan's inputs cut into chunks: x (B, C, q, H, P), dt (B, C, q, H), B and C (B, C, q, G, N), A and D (H,)."""

    x: Tensor
    dt: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor

    def of(self, tile: Tile) -> Inputs:
        """One tile: x (c, q, h, p), dt (c, q, h), B and C (c, q, n), A and D (h,)."""
        return Inputs(
            tile.of_heads(self.x),
            tile.of_heads(self.dt),
            self.A[tile.heads],
            tile.of_group(self.B),
            tile.of_group(self.C),
            self.D[tile.heads],
        )


@never_compiled
def ssd_chunked(
    x_BTHP: Tensor,
    dt_BTH: Tensor,
    A_H: Tensor,
    B_BTGN: Tensor,
    C_BTGN: Tensor,
    D_H: Tensor,
    doc_BT: Tensor | None,
    initial_state_BHPN: Tensor | None,
    initial_doc_B: Tensor | None,
    chunk: int,
) -> tuple[Tensor, Tensor]:
    """The matmul form for any T: pads to whole chunks with steps of size 0, which neither decay nor drive a state."""
    batch, time, heads, head_dim = x_BTHP.shape
    dtype = torch.float64 if x_BTHP.dtype == torch.float64 else torch.float32
    size = min(chunk, time)
    padding = -time % size
    x, dt, B, C = (_cut(z.to(dtype), size, padding) for z in (x_BTHP, dt_BTH, B_BTGN, C_BTGN))
    if doc_BT is not None and padding:
        doc_BT = torch.cat((doc_BT, doc_BT[:, -1:].expand(batch, padding)), dim=1)
    boundaries = Boundaries.build(doc_BT, initial_doc_B, size, dtype, x.device)
    if initial_state_BHPN is None:
        state = x.new_zeros(batch, heads, head_dim, B.shape[-1])
    else:
        state = initial_state_BHPN.to(dtype)
    inputs = Inputs(x, dt, A_H.to(dtype), B, C, D_H.to(dtype))
    if torch.is_grad_enabled() and any(z.requires_grad for z in (*inputs, state)):
        y, state = _Scan.apply(*inputs, state, boundaries)  # type: ignore[no-untyped-call]
    else:
        y, state = _scan(inputs, state, boundaries, None)
    y_BTHP = y.flatten(1, 2)
    return (y_BTHP[:, :time] if padding else y_BTHP).to(x_BTHP.dtype), state


def _cut(values_BT: Tensor, size: int, padding: int) -> Tensor:
    """(B, T, ...) -> (B, C, q, ...)."""
    if padding:
        values_BT = F.pad(values_BT, (0, 0) * (values_BT.dim() - 2) + (0, padding))
    return values_BT.reshape(values_BT.shape[0], -1, size, *values_BT.shape[2:])


def _scan(
    inputs: Inputs, state_BHPN: Tensor, boundaries: Boundaries, states_BCHPN: Tensor | None
) -> tuple[Tensor, Tensor]:
    """All tiles forward; `states`, when given, receives the state before every chunk."""
    y = torch.empty_like(inputs.x, memory_format=torch.contiguous_format)
    state_BHPN = state_BHPN.clone(memory_format=torch.contiguous_format)
    for tile in tiles(inputs.x, inputs.B.shape[3]):
        keep = None if states_BCHPN is None else states_BCHPN[tile.rows, tile.chunks, tile.heads]
        state = state_BHPN[tile.rows, tile.heads]
        y_tile, after = _scan_tile(inputs.of(tile), boundaries.of(tile.rows, tile.chunks), state, keep)
        tile.put_heads(y, y_tile)
        state.copy_(after)
    return y, state_BHPN


def _scan_tile(
    inputs: Inputs, boundaries: Boundaries, state_rhpn: Tensor, states_rchpn: Tensor | None
) -> tuple[Tensor, Tensor]:
    """One tile forward: y (c, q, h, p) and the state after it."""
    x, dt, A, B, C, D = inputs
    chunks, size, heads, head_dim = x.shape
    rows = state_rhpn.shape[0]
    decays = Decays.build(dt * A, boundaries)
    driving = (x * (dt * decays.to_end_cqh)[..., None]).flatten(2)
    gained_rchpn = torch.bmm(driving.transpose(1, 2), B).view(rows, -1, heads, head_dim, B.shape[-1])
    carry_rch11 = decays.carry_ch.view(rows, -1, heads, 1, 1)
    if states_rchpn is None:
        states_rchpn = torch.empty_like(gained_rchpn)
    last = chunks // rows - 1
    states_rchpn[:, 0] = state_rhpn
    for c in range(last):
        torch.addcmul(gained_rchpn[:, c], carry_rch11[:, c], states_rchpn[:, c], out=states_rchpn[:, c + 1])
    state_rhpn = torch.addcmul(gained_rchpn[:, last], carry_rch11[:, last], states_rchpn[:, last])

    scores = torch.bmm(C, B.transpose(1, 2)).mul_(boundaries.mask)
    mixing = decays.between().mul_(scores[:, None])
    within = torch.bmm(mixing.flatten(0, 1), _by_head(x, dt).flatten(0, 1)).view(chunks, heads, size, head_dim)
    before = states_rchpn.reshape(chunks, heads * head_dim, -1)
    y = torch.bmm(C, before.transpose(1, 2)).view(chunks, size, heads, head_dim)
    y.mul_(decays.from_before_cqh[..., None]).add_(within.transpose(1, 2)).addcmul_(x, D[:, None])
    return y, state_rhpn


def _by_head(values_cqhp: Tensor, factor_cqh: Tensor) -> Tensor:
    """(c, h, q, p), scaled and contiguous for batched matmuls."""
    moved = values_cqhp.transpose(1, 2)
    out = torch.empty_like(moved, memory_format=torch.contiguous_format)
    return torch.mul(moved, factor_cqh.transpose(1, 2)[..., None], out=out)


class Gradients(NamedTuple):
    """Gradients of one tile, shaped like the tile's `Inputs`, and that of the state before it."""

    x: Tensor
    dt: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor
    state: Tensor


def _backward_tile(
    inputs: Inputs,
    boundaries: Boundaries,
    states_rchpn: Tensor,
    after_rhpn: Tensor,
    y: Tensor,
    dy: Tensor,
    dafter_rhpn: Tensor,
) -> Gradients:
    """One tile backward, from the gradients of its outputs y (c, q, h, p) and of the state after it.

    The sums dt*A need no gradient through the (q, q) decays: what token i collects over them is dy_i . y_i, what it
    gives out is x_i . dx_i (without the skip), and the end of a chunk adds dstate . state. Both sums hold the token's
    own term, which cancels: the gradients of dt and A carry a rounding error that grows with |dt A|.
    """
    x, dt, A, B, C, D = inputs
    chunks, size, heads, head_dim = x.shape
    rows = after_rhpn.shape[0]
    state = B.shape[-1]
    decays = Decays.build(dt * A, boundaries)
    before = states_rchpn.reshape(chunks, heads * head_dim, state)

    read = (dy * decays.from_before_cqh[..., None]).flatten(2)
    dC = torch.bmm(read, before)
    dstates_rchpn = torch.bmm(read.transpose(1, 2), C).view(rows, -1, heads, head_dim, state)
    carry_rch11 = decays.carry_ch.view(rows, -1, heads, 1, 1)
    dgained_rchpn = torch.empty_like(dstates_rchpn)
    dgained_rchpn[:, -1] = dafter_rhpn
    for c in reversed(range(1, chunks // rows)):
        torch.addcmul(dstates_rchpn[:, c], carry_rch11[:, c], dgained_rchpn[:, c], out=dgained_rchpn[:, c - 1])
    dbefore_rhpn = torch.addcmul(dstates_rchpn[:, 0], carry_rch11[:, 0], dgained_rchpn[:, 0])
    dend_rch = torch.empty_like(carry_rch11[..., 0, 0])
    dend_rch[:, :-1] = _dot(dgained_rchpn[:, :-1].flatten(3), states_rchpn[:, 1:].flatten(3))
    dend_rch[:, -1] = _dot(dgained_rchpn[:, -1].flatten(2), after_rhpn.flatten(2))
    dgained = dgained_rchpn.view(chunks, heads * head_dim, state)
    driving = (x * (dt * decays.to_end_cqh)[..., None]).flatten(2)
    dB = torch.bmm(driving, dgained)

    dy_chqp = dy.transpose(1, 2).contiguous().flatten(0, 1)
    dmixing = torch.bmm(dy_chqp, _by_head(x, dt).flatten(0, 1).transpose(1, 2)).view(chunks, heads, size, size)
    between = decays.between()
    dscores = dmixing.mul_(between).sum(1).mul_(boundaries.mask)
    dB.baddbmm_(dscores.transpose(1, 2), C)
    dC.baddbmm_(dscores, B)
    scores = torch.bmm(C, B.transpose(1, 2)).mul_(boundaries.mask)
    mixing = between.mul_(scores[:, None]).flatten(0, 1)
    within = torch.bmm(mixing.transpose(1, 2), dy_chqp).view(chunks, heads, size, head_dim)
    dx = torch.bmm(B, dgained.transpose(1, 2)).view(chunks, size, heads, head_dim)
    dx.mul_(decays.to_end_cqh[..., None]).add_(within.transpose(1, 2))

    ddt = _dot(dx, x)
    dskip = _dot(dy, x)
    dsteps = _dot(dy, y).sub_(dskip * D).sub_(ddt * dt)
    dsteps[:, -1] += dend_rch.view(chunks, heads)
    dlog = torch.matmul(boundaries.mask.transpose(-1, -2), dsteps)
    dx.mul_(dt[..., None]).addcmul_(dy, D[:, None])
    return Gradients(dx, ddt.addcmul_(dlog, A), (dlog * dt).sum((0, 1)), dB, dC, dskip.sum((0, 1)), dbefore_rhpn)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum(-1)


class _Scan(torch.autograd.Function):
    """The scan with its gradient; keeps the inputs, the output and one state per chunk."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor,
        state_BHPN: Tensor,
        boundaries: Boundaries,
    ) -> tuple[Tensor, Tensor]:
        states_BCHPN = x.new_empty(*x.shape[:2], *state_BHPN.shape[1:])
        y, final = _scan(Inputs(x, dt, A, B, C, D), state_BHPN, boundaries, states_BCHPN)
        ctx.save_for_backward(x, dt, A, B, C, D, states_BCHPN, y, final)
        ctx.boundaries = boundaries
        return y, final

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor, dfinal_BHPN: Tensor) -> tuple[Tensor | None, ...]:
        *saved, states_BCHPN, y, final_BHPN = ctx.saved_tensors
        inputs = Inputs(*saved)
        dx, ddt, dB, dC = (
            torch.empty_like(z, memory_format=torch.contiguous_format)
            for z in (inputs.x, inputs.dt, inputs.B, inputs.C)
        )
        dA, dD = torch.zeros_like(inputs.A), torch.zeros_like(inputs.D)
        dstate_BHPN = dfinal_BHPN.clone(memory_format=torch.contiguous_format)
        last = inputs.x.shape[1]
        for tile in reversed(list(tiles(inputs.x, inputs.B.shape[3]))):
            rows, stop, heads = tile.rows, tile.chunks.stop, tile.heads
            after = final_BHPN[rows, heads] if stop == last else states_BCHPN[rows, stop, heads]
            dstate = dstate_BHPN[rows, heads]
            gradients = _backward_tile(
                inputs.of(tile),
                ctx.boundaries.of(rows, tile.chunks),
                states_BCHPN[rows, tile.chunks, heads],
                after,
                tile.of_heads(y),
                tile.of_heads(dy),
                dstate,
            )
            tile.put_heads(dx, gradients.x)
            tile.put_heads(ddt, gradients.dt)
            tile.put_group(dB, gradients.B)
            tile.put_group(dC, gradients.C)
            dA[heads] += gradients.A
            dD[heads] += gradients.D
            dstate.copy_(gradients.state)
        return dx, ddt, dA, dB, dC, dD, dstate_BHPN, None
