"""The selective scan over chunks that stay in cache, with a hand-written backward that computes every state again.

Decays differ per channel and state, so no matmul spans tokens: the work is one multiply-add per token, channel and
state, and what costs time is how often such tensors pass through memory. Here a tile of a few chunks runs through
buffers that are used again; inside, only one fused multiply-add per step depends on the step before. Of a whole row
only the states between chunks are kept.

Shapes: B batch, T time, E channels, N state, C chunks of a row, q time in a chunk; in a tile: r rows, c chunks of a
row, l = r * c lanes, which run side by side. Inside a tile time comes first.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from longspan.ops.compiling import never_compiled

# Numbers per step of a tile: enough to outweigh the call into torch, few enough for `chunk` steps to stay in cache.
STEP_ELEMENTS = {"cpu": 16_384, "cuda": 1 << 20}


class Inputs(NamedTuple):
    """The scan's inputs cut into chunks: x, dt, rate (B, C, q, E); B, C (B, C, q, N); A (N, E); D (E,).

    `rate` is dt, but infinite at the first token of a document, so that what came before decays to exactly nothing.
    """

    x: Tensor
    dt: Tensor
    rate: Tensor
    B: Tensor
    C: Tensor
    A: Tensor
    D: Tensor


class Tile(NamedTuple):
    """Some chunks of some rows."""

    rows: slice
    chunks: slice

    @property
    def shape(self) -> tuple[int, int]:
        """(r, c)."""
        return self.rows.stop - self.rows.start, self.chunks.stop - self.chunks.start

    def take(self, values_BCq: Tensor) -> Tensor:
        """(B, C, q, ...) -> (q, l, ...), contiguous."""
        return values_BCq[self.rows, self.chunks].flatten(0, 1).transpose(0, 1).contiguous()

    def put(self, values_BCq: Tensor, tile_ql: Tensor) -> None:
        """Writes (q, l, ...) back."""
        target = values_BCq[self.rows, self.chunks]
        target.copy_(tile_ql.transpose(0, 1).view(target.shape))


@never_compiled
def selective_scan_chunked(
    x_BTE: Tensor,
    dt_BTE: Tensor,
    A_EN: Tensor,
    B_BTN: Tensor,
    C_BTN: Tensor,
    D_E: Tensor,
    doc_BT: Tensor | None,
    initial_state_BNE: Tensor | None,
    initial_doc_B: Tensor | None,
    chunk: int,
) -> tuple[Tensor, Tensor]:
    """The fast form for any T: pads to whole chunks with steps of size 0, which neither decay nor drive a state."""
    batch, time, channels = x_BTE.shape
    dtype = torch.float64 if x_BTE.dtype == torch.float64 else torch.float32
    size = min(chunk, time)
    padding = -time % size
    x, dt, B, C = (_cut(z.to(dtype), size, padding) for z in (x_BTE, dt_BTE, B_BTN, C_BTN))
    starts_BT = document_starts(doc_BT, initial_doc_B)
    rate = dt.detach()
    if starts_BT is not None:
        rate = rate.masked_fill(_cut(starts_BT, size, padding)[..., None], math.inf)
    A_NE = A_EN.to(dtype).T.contiguous()
    if initial_state_BNE is None:
        state = x.new_zeros(batch, A_NE.shape[0], channels)
    else:
        state = initial_state_BNE.to(dtype)
    inputs = Inputs(x, dt, rate, B, C, A_NE, D_E.to(dtype))
    if torch.is_grad_enabled() and any(z.requires_grad for z in (*inputs, state)):
        y, state = _Scan.apply(*inputs, state)  # type: ignore[no-untyped-call]
    else:
        y, state = _scan(inputs, state, None)
    y_BTE = y.flatten(1, 2)
    return (y_BTE[:, :time] if padding else y_BTE).to(x_BTE.dtype), state


def document_starts(doc_BT: Tensor | None, initial_doc_B: Tensor | None) -> Tensor | None:
    """(B, T): where a token is of another document than the one before it; None: nowhere."""
    if doc_BT is None:
        return None
    before_B1 = doc_BT[:, :1] if initial_doc_B is None else initial_doc_B[:, None].to(doc_BT.dtype)
    starts_BT = doc_BT != torch.cat((before_B1, doc_BT[:, :-1]), dim=1)
    if torch.compiler.is_compiling() or doc_BT.device.type != "cpu" or bool(starts_BT.any()):
        return starts_BT
    return None


def _cut(values_BT: Tensor, size: int, padding: int) -> Tensor:
    """(B, T, ...) -> (B, C, q, ...)."""
    if padding:
        values_BT = F.pad(values_BT, (0, 0) * (values_BT.dim() - 2) + (0, padding))
    return values_BT.reshape(values_BT.shape[0], -1, size, *values_BT.shape[2:])


def _tiles(inputs: Inputs) -> Iterator[Tile]:
    """Cuts the work in the order in which states flow. Rows fill a tile first: lanes of one row need a carry."""
    batch, chunks = inputs.x.shape[:2]
    device = inputs.x.device.type
    elements = STEP_ELEMENTS["cpu"] * torch.get_num_threads() if device == "cpu" else STEP_ELEMENTS["cuda"]
    rows_per_tile = min(batch, max(1, elements // inputs.A.numel()))
    chunks_per_tile = min(chunks, max(1, elements // (2 * rows_per_tile * inputs.A.numel())))
    for row in range(0, batch, rows_per_tile):
        for start in range(0, chunks, chunks_per_tile):
            yield Tile(slice(row, min(row + rows_per_tile, batch)), slice(start, min(start + chunks_per_tile, chunks)))


class _Steps:
    """A buffer (q, l, N, E) and its steps as views, which cost as much to make as a step takes."""

    def __init__(self, like: Tensor, size: int, lanes: int, state: int, channels: int) -> None:
        self.all = like.new_empty(size, lanes, state, channels)
        self.each = self.all.unbind(0)
        self.as_matrices = self.all.view(size * lanes, state, channels)


class _Buffers:
    """Buffers by the shape of a tile, made when first needed."""

    def __init__(self, inputs: Inputs) -> None:
        self.like = inputs.x
        self.size = inputs.x.shape[2]
        self.state, self.channels = inputs.A.shape
        self.made: dict[tuple[str, int], _Steps] = {}

    def get(self, name: str, tile: Tile) -> _Steps:
        rows, chunks = tile.shape
        key = (name, rows * chunks)
        if key not in self.made:
            self.made[key] = _Steps(self.like, self.size, rows * chunks, self.state, self.channels)
        return self.made[key]


def _decay_and_drive(inputs: Inputs, tile: Tile, decay: _Steps, states: _Steps) -> None:
    """Fills the decay of every step, and into the states what drives them."""
    # exp2 is about three times as fast as exp. A zero in A would turn the infinite rate of a first token into NaN.
    rates_NE = (inputs.A * math.log2(math.e)).clamp_(max=-torch.finfo(inputs.A.dtype).tiny)
    torch.mul(tile.take(inputs.rate).unsqueeze(2), rates_NE, out=decay.all).exp2_()
    driving_ql1E = (tile.take(inputs.x) * tile.take(inputs.dt)).unsqueeze(2)
    torch.mul(driving_ql1E, tile.take(inputs.B).unsqueeze(3), out=states.all)


def _scan(inputs: Inputs, state_BNE: Tensor, states_BCNE: Tensor | None) -> tuple[Tensor, Tensor]:
    """All tiles forward; `states`, when given, receives the state before every chunk."""
    y = torch.empty_like(inputs.x, memory_format=torch.contiguous_format)
    state_BNE = state_BNE.clone(memory_format=torch.contiguous_format)
    buffers = _Buffers(inputs)
    for tile in _tiles(inputs):
        keep = None if states_BCNE is None else states_BCNE[tile.rows, tile.chunks]
        _scan_tile(inputs, tile, buffers, state_BNE[tile.rows], keep, y)
    return y, state_BNE


def _scan_tile(
    inputs: Inputs, tile: Tile, buffers: _Buffers, state_rNE: Tensor, states_rcNE: Tensor | None, y: Tensor
) -> None:
    """One tile forward; `state` moves on to the end of the tile."""
    decay, states = buffers.get("decay", tile), buffers.get("states", tile)
    _decay_and_drive(inputs, tile, decay, states)
    by_row = (*tile.shape, *state_rNE.shape[1:])
    first, last = states.each[0].view(by_row), states.each[-1].view(by_row)
    first[:, 0].addcmul_(decay.each[0].view(by_row)[:, 0], state_rNE)
    for t in range(1, len(states.each)):
        states.each[t].addcmul_(decay.each[t], states.each[t - 1])
    if states_rcNE is not None:
        states_rcNE[:, 0] = state_rNE
    if tile.shape[1] > 1:
        for t in range(1, len(decay.each)):
            decay.each[t].mul_(decay.each[t - 1])
        through = decay.each[-1].view(by_row)
        before = states_rcNE if states_rcNE is not None else torch.empty_like(through)
        before[:, 1] = last[:, 0]
        for c in range(1, tile.shape[1] - 1):
            torch.addcmul(last[:, c], through[:, c], before[:, c], out=before[:, c + 1])
        in_steps = (-1, *by_row)
        states.all.view(in_steps)[:, :, 1:].addcmul_(decay.all.view(in_steps)[:, :, 1:], before[:, 1:])
    state_rNE.copy_(last[:, -1])
    C_ql1N = tile.take(inputs.C).view(-1, 1, by_row[2])
    y_qlE = torch.bmm(C_ql1N, states.as_matrices).view(len(states.each), -1, by_row[3])
    tile.put(y, y_qlE.addcmul_(tile.take(inputs.x), inputs.D))


class Gradients(NamedTuple):
    """Where the gradients go, shaped like the `Inputs` of the same name; the states' are (B, N, E)."""

    x: Tensor
    dt: Tensor
    B: Tensor
    C: Tensor
    A: Tensor
    D: Tensor
    state: Tensor


def _backward_tile(
    inputs: Inputs, tile: Tile, buffers: _Buffers, states_BCNE: Tensor, dy: Tensor, into: Gradients
) -> None:
    """One tile backward; `into.state` moves from the gradient of the state after the tile to that of the one before."""
    decay, states, dstates = (buffers.get(name, tile) for name in ("decay", "states", "dstates"))
    size = len(states.each)
    by_row = (*tile.shape, *inputs.A.shape)
    before_lNE = states_BCNE[tile.rows, tile.chunks].flatten(0, 1)
    _decay_and_drive(inputs, tile, decay, states)
    states.each[0].addcmul_(decay.each[0], before_lNE)
    for t in range(1, size):
        states.each[t].addcmul_(decay.each[t], states.each[t - 1])

    x_qlE, dt_qlE, dy_qlE, B_qlN, C_qlN = (tile.take(z) for z in (inputs.x, inputs.dt, dy, inputs.B, inputs.C))
    vectors = (size * before_lNE.shape[0], 1, -1)
    # Written as rows times matrices: one column on the right takes a path ten times as slow.
    tile.put(into.C, torch.bmm(dy_qlE.view(vectors), states.as_matrices.mT).view_as(C_qlN))

    torch.mul(dy_qlE.unsqueeze(2), C_qlN.unsqueeze(3), out=dstates.all)
    dafter_rNE = into.state[tile.rows]
    dstates.each[-1].view(by_row)[:, -1].add_(dafter_rNE)
    for t in reversed(range(size - 1)):
        dstates.each[t].addcmul_(decay.each[t + 1], dstates.each[t + 1])
    if tile.shape[1] > 1:
        _carry_back(decay, dstates, buffers.get("products", tile), by_row)

    driven_ql1N = torch.bmm((x_qlE * dt_qlE).view(vectors), dstates.as_matrices.mT)
    tile.put(into.B, driven_ql1N.view_as(B_qlN))
    ddriving_qlE = torch.bmm(B_qlN.view(vectors), dstates.as_matrices).view_as(x_qlE)
    tile.put(into.x, (ddriving_qlE * dt_qlE).addcmul_(dy_qlE, inputs.D))
    into.D.add_((dy_qlE * x_qlE).sum((0, 1)))

    dlog = decay.all.mul_(dstates.all)
    dafter_rNE.copy_(decay.each[0].view(by_row)[:, 0])
    decay.each[0].mul_(before_lNE)
    dlog[1:].mul_(states.all[:-1])
    into.A.add_(torch.mul(dlog, dt_qlE.unsqueeze(2), out=states.all).sum((0, 1)))
    tile.put(into.dt, dlog.mul_(inputs.A).sum(2).addcmul_(ddriving_qlE, x_qlE))


def _carry_back(decay: _Steps, dstates: _Steps, products: _Steps, by_row: tuple[int, ...]) -> None:
    """Adds to every lane but a row's last what reaches it from the lanes after."""
    products.each[-1].fill_(1.0)
    for t in reversed(range(len(decay.each) - 1)):
        torch.mul(products.each[t + 1], decay.each[t + 1], out=products.each[t])
    # What a lane's own outputs give to the state before it, and how much of what comes from behind passes through it.
    own = (decay.each[0] * dstates.each[0]).view(by_row)
    through = (decay.each[0] * products.each[0]).view(by_row)
    dend = torch.empty_like(own)
    dend[:, -2] = own[:, -1]
    for c in reversed(range(1, by_row[1] - 1)):
        torch.addcmul(own[:, c], through[:, c], dend[:, c], out=dend[:, c - 1])
    in_steps = (-1, *by_row)
    dstates.all.view(in_steps)[:, :, :-1].addcmul_(products.all.view(in_steps)[:, :, :-1], dend[:, :-1])


class _Scan(torch.autograd.Function):
    """The scan with its gradient; keeps the inputs and one state per chunk."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        dt: Tensor,
        rate: Tensor,
        B: Tensor,
        C: Tensor,
        A: Tensor,
        D: Tensor,
        state_BNE: Tensor,
    ) -> tuple[Tensor, Tensor]:
        states_BCNE = x.new_empty(*x.shape[:2], *A.shape)
        y, final = _scan(Inputs(x, dt, rate, B, C, A, D), state_BNE, states_BCNE)
        ctx.save_for_backward(x, dt, rate, B, C, A, D, states_BCNE)
        return y, final

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor, dfinal_BNE: Tensor) -> tuple[Tensor | None, ...]:
        *saved, states_BCNE = ctx.saved_tensors
        inputs = Inputs(*saved)
        dx, ddt, dB, dC = (
            torch.empty_like(z, memory_format=torch.contiguous_format)
            for z in (inputs.x, inputs.dt, inputs.B, inputs.C)
        )
        dA, dD = torch.zeros_like(inputs.A), torch.zeros_like(inputs.D)
        dstate_BNE = dfinal_BNE.clone(memory_format=torch.contiguous_format)
        into = Gradients(dx, ddt, dB, dC, dA, dD, dstate_BNE)
        buffers = _Buffers(inputs)
        for tile in reversed(list(_tiles(inputs))):
            _backward_tile(inputs, tile, buffers, states_BCNE, dy, into)
        return dx, ddt, None, dB, dC, dA, dD, dstate_BNE
