"""An LSTM scan that forgets at document boundaries: all documents run side by side, whatever row they lie in.

Shapes: B batch, T time, D input width, H hidden width, M all tokens of the batch. Gates are stacked in torch's order:
input, forget, cell, output.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from longspan.foundation.errors import UserError
from longspan.ops.compiling import never_compiled
from longspan.ops.scan_order import ScanOrder, before_each


@never_compiled
def lstm(
    x_BTD: Tensor,
    weight_input_4HD: Tensor,
    weight_hidden_4HH: Tensor,
    bias_input_4H: Tensor | None = None,
    bias_hidden_4H: Tensor | None = None,
    *,
    doc_BT: Tensor | None = None,
    initial_hidden_BH: Tensor | None = None,
    initial_cell_BH: Tensor | None = None,
    initial_doc_B: Tensor | None = None,
    backend: Literal["fused", "reference"] = "fused",
) -> tuple[Tensor, Tensor, Tensor]:
    """Runs `h[t], c[t] = LSTM(x[t], h[t-1], c[t-1])`, with h = c = 0 before the first token of every document.

    The cell is that of `torch.nn.LSTM` (Hochreiter & Schmidhuber 1997, with the forget gate of Gers et al. 2000).

    Args:
        x_BTD: inputs, T >= 1.
        weight_input_4HD: stacked input weights.
        weight_hidden_4HH: stacked hidden weights.
        bias_input_4H: stacked input biases; None for both biases or for neither.
        bias_hidden_4H: stacked hidden biases.
        doc_BT: document ids; the state is zeroed where the id changes. None: one document.
        initial_hidden_BH: h before the first token; None for it and the cell: zeros.
        initial_cell_BH: c before the first token.
        initial_doc_B: document of the initial state, used only where `doc_BT[:, 0]` equals it. None: it continues.
        backend: "fused" (all documents at once, own gradient) or "reference" (a Python loop over time).

    Returns:
        y (B, T, H), and h (B, H) and c (B, H) after the last token.

    Raises:
        UserError: an unknown backend, one bias or one half of the state without the other.
    """
    if backend not in ("fused", "reference"):
        raise UserError(f"lstm backend {backend!r}", "'fused' or 'reference'", "name one of the two")
    if (bias_input_4H is None) != (bias_hidden_4H is None):
        raise UserError("one LSTM bias without the other", "both or neither", "give both, zeros if need be")
    if (initial_hidden_BH is None) != (initial_cell_BH is None):
        raise UserError("half of an LSTM state", "hidden and cell, or neither", "give both, zeros if need be")
    parameters = [weight_input_4HD, weight_hidden_4HH]
    if bias_input_4H is not None and bias_hidden_4H is not None:
        parameters += [bias_input_4H, bias_hidden_4H]
    if initial_hidden_BH is None or initial_cell_BH is None:
        hidden = cell = x_BTD.new_zeros(x_BTD.shape[0], weight_hidden_4HH.shape[1])
    else:
        hidden, cell = initial_hidden_BH, initial_cell_BH
    if doc_BT is not None and initial_doc_B is not None:
        other_B1 = (doc_BT[:, 0] != initial_doc_B)[:, None]
        hidden, cell = hidden.masked_fill(other_B1, 0.0), cell.masked_fill(other_B1, 0.0)
    if backend == "reference":
        return _reference(x_BTD, parameters, doc_BT, hidden, cell)
    if x_BTD.shape[1] == 1:
        hidden, cell = torch.lstm_cell(x_BTD[:, 0], (hidden, cell), *parameters)
        return hidden[:, None], hidden, cell
    return _side_by_side(x_BTD, parameters, doc_BT, hidden, cell)


def _reference(
    x_BTD: Tensor, parameters: list[Tensor], doc_BT: Tensor | None, hidden: Tensor, cell: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    outputs = []
    for t in range(x_BTD.shape[1]):
        if doc_BT is not None and t > 0:
            begins_B1 = (doc_BT[:, t] != doc_BT[:, t - 1])[:, None]
            hidden, cell = hidden.masked_fill(begins_B1, 0.0), cell.masked_fill(begins_B1, 0.0)
        hidden, cell = torch.lstm_cell(x_BTD[:, t], (hidden, cell), *parameters)
        outputs.append(hidden)
    return torch.stack(outputs, dim=1), hidden, cell


def _side_by_side(
    x_BTD: Tensor, parameters: list[Tensor], doc_BT: Tensor | None, hidden_BH: Tensor, cell_BH: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    batch, time = x_BTD.shape[:2]
    weight_input, weight_hidden, *biases = parameters
    bias = biases[0] + biases[1] if biases else weight_input.new_zeros(weight_input.shape[0])
    order = ScanOrder.build(doc_BT, batch, time, x_BTD.device)
    x_MD = x_BTD.flatten(0, 1).index_select(0, order.tokens)
    starts = (order.start(state, time) for state in (hidden_BH, cell_BH))
    y_MH, cell_MH = _Scan.apply(  # type: ignore[no-untyped-call]
        x_MD, *starts, weight_input, weight_hidden, bias, order.sizes
    )
    place_BT = order.places(batch, time)
    y_BTH = y_MH.index_select(0, place_BT.flatten()).view(batch, time, -1)
    # A copy: a view would keep the outputs of the whole call alive.
    return y_BTH, y_BTH[:, -1].clone(), cell_MH[place_BT[:, -1]]


class _Scan(torch.autograd.Function):
    """The steps, with only what depends on the step before inside the loop; weight gradients are one matmul at the end.

    With c' = f c + i g and h' = o tanh(c'), the gradients of the pre-activations are dc' (those of i, f and g) or dh'
    (that of o) times factors known before the backward loop begins.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x_MD: Tensor,
        hidden_NH: Tensor,
        cell_NH: Tensor,
        weight_input: Tensor,
        weight_hidden: Tensor,
        bias: Tensor,
        sizes: list[int],
    ) -> tuple[Tensor, Tensor]:
        width = hidden_NH.shape[1]
        gates_M4H = torch.addmm(bias, x_MD, weight_input.T)
        y_MH, cell_MH, squashed_MH = (gates_M4H.new_empty(x_MD.shape[0], width) for _ in range(3))
        hidden, cell, weight = hidden_NH, cell_NH, weight_hidden.T
        steps = zip(sizes, *(torch.split(z, sizes) for z in (gates_M4H, y_MH, cell_MH, squashed_MH)), strict=True)
        for size, gates, y, cell_after, squashed in steps:
            if size < hidden.shape[0]:
                hidden, cell = hidden[:size], cell[:size]
            gates.addmm_(hidden, weight)
            admit_forget, new, emit = gates.split((2 * width, width, width), dim=1)
            admit, forget = admit_forget.sigmoid_().chunk(2, dim=1)
            cell = torch.mul(forget, cell, out=cell_after).addcmul_(admit, new.tanh_())
            hidden = torch.mul(emit.sigmoid_(), torch.tanh(cell, out=squashed), out=y)
        ctx.save_for_backward(
            x_MD, hidden_NH, cell_NH, weight_input, weight_hidden, gates_M4H, y_MH, cell_MH, squashed_MH
        )
        ctx.sizes = sizes
        return y_MH, cell_MH

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_MH: Tensor, dcell_MH: Tensor) -> tuple[Tensor | None, ...]:
        x_MD, hidden_NH, cell_NH, weight_input, weight_hidden, gates_M4H, y_MH, cell_MH, squashed_MH = ctx.saved_tensors
        sizes: list[int] = ctx.sizes
        admit, forget, new, emit = gates_M4H.chunk(4, dim=1)
        to_cell = emit * (1 - squashed_MH * squashed_MH)
        factors_M4H = torch.stack(
            (
                new * admit * (1 - admit),
                before_each(cell_NH, cell_MH, sizes) * forget * (1 - forget),
                admit * (1 - new * new),
                squashed_MH * emit * (1 - emit),
            ),
            dim=1,
        )

        doutput_MH, dcell_MH = (d.clone(memory_format=torch.contiguous_format) for d in (dy_MH, dcell_MH))
        dhidden_NH, dcell_NH = torch.zeros_like(hidden_NH), torch.zeros_like(cell_NH)
        dy, dc, to_cells, forgets, by_cell, by_output = (
            torch.split(z, sizes)
            for z in (doutput_MH, dcell_MH, to_cell, forget, factors_M4H[:, :3], factors_M4H[:, 3])
        )
        dgates_M4H = factors_M4H.flatten(1)
        for step, dgates in reversed(list(enumerate(torch.split(dgates_M4H, sizes)))):
            dhidden, dcell = dy[step], dc[step].addcmul_(dy[step], to_cells[step])
            by_cell[step].mul_(dcell[:, None])
            by_output[step].mul_(dhidden)
            before = (dhidden_NH, dcell_NH) if step == 0 else (dy[step - 1], dc[step - 1])
            if sizes[step] < before[0].shape[0]:
                before = before[0][: sizes[step]], before[1][: sizes[step]]
            before[0].addmm_(dgates, weight_hidden)
            before[1].addcmul_(dcell, forgets[step])
        return (
            dgates_M4H @ weight_input,
            dhidden_NH,
            dcell_NH,
            dgates_M4H.T @ x_MD,
            dgates_M4H.T @ before_each(hidden_NH, y_MH, sizes),
            dgates_M4H.sum(0),
            None,
        )
