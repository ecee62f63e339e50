"""A GRU scan that forgets at document boundaries: all documents run side by side, whatever row they lie in.

torch's own GRU on packed sequences copies a gradient of the whole batch at every step; here a step does only what
depends on the step before.

Shapes: B batch, T time, D input width, H hidden width, M all tokens of the batch. Gates are stacked in torch's order:
reset, update, new.
"""

from __future__ import annotations

import itertools
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from longspan.foundation.errors import UserError
from longspan.ops.compiling import never_compiled
from longspan.ops.scan_order import ScanOrder, before_each


@never_compiled
def gru(
    x_BTD: Tensor,
    weight_input_3HD: Tensor,
    weight_hidden_3HH: Tensor,
    bias_input_3H: Tensor | None = None,
    bias_hidden_3H: Tensor | None = None,
    *,
    doc_BT: Tensor | None = None,
    initial_state_BH: Tensor | None = None,
    initial_doc_B: Tensor | None = None,
    backend: Literal["fused", "reference"] = "fused",
) -> tuple[Tensor, Tensor]:
    """Runs `h[t] = GRU(x[t], h[t-1])`, with h = 0 before the first token of every document.

    The cell is that of `torch.nn.GRU` (Cho et al. 2014, with the reset gate after the hidden matmul).

    Args:
        x_BTD: inputs, T >= 1.
        weight_input_3HD: stacked input weights.
        weight_hidden_3HH: stacked hidden weights.
        bias_input_3H: stacked input biases; None for both biases or for neither.
        bias_hidden_3H: stacked hidden biases.
        doc_BT: document ids; the state is zeroed where the id changes. None: one document.
        initial_state_BH: state before the first token; None: zeros.
        initial_doc_B: document of the initial state, used only where `doc_BT[:, 0]` equals it. None: it continues.
        backend: "fused" (all documents at once, own gradient) or "reference" (a Python loop over time).

    Returns:
        y (B, T, H) and the state after the last token (B, H).

    Raises:
        UserError: an unknown backend, or one bias without the other.
    """
    if backend not in ("fused", "reference"):
        raise UserError(f"gru backend {backend!r}", "'fused' or 'reference'", "name one of the two")
    if (bias_input_3H is None) != (bias_hidden_3H is None):
        raise UserError("one GRU bias without the other", "both or neither", "give both, zeros if need be")
    parameters = [weight_input_3HD, weight_hidden_3HH]
    if bias_input_3H is not None and bias_hidden_3H is not None:
        parameters += [bias_input_3H, bias_hidden_3H]
    hidden = weight_hidden_3HH.shape[1]
    state = x_BTD.new_zeros(x_BTD.shape[0], hidden) if initial_state_BH is None else initial_state_BH
    if doc_BT is not None and initial_doc_B is not None:
        state = state.masked_fill((doc_BT[:, 0] != initial_doc_B)[:, None], 0.0)
    if backend == "reference":
        return _reference(x_BTD, parameters, doc_BT, state)
    if x_BTD.shape[1] == 1:
        state = torch.gru_cell(x_BTD[:, 0], state, *parameters)
        return state[:, None], state
    if len(parameters) == 2:
        parameters += [x_BTD.new_zeros(3 * hidden)] * 2
    return _side_by_side(x_BTD, parameters, doc_BT, state)


def _reference(x_BTD: Tensor, parameters: list[Tensor], doc_BT: Tensor | None, state: Tensor) -> tuple[Tensor, Tensor]:
    outputs = []
    for t in range(x_BTD.shape[1]):
        if doc_BT is not None and t > 0:
            state = state.masked_fill((doc_BT[:, t] != doc_BT[:, t - 1])[:, None], 0.0)
        state = torch.gru_cell(x_BTD[:, t], state, *parameters)
        outputs.append(state)
    return torch.stack(outputs, dim=1), state


def _side_by_side(
    x_BTD: Tensor, parameters: list[Tensor], doc_BT: Tensor | None, state_BH: Tensor
) -> tuple[Tensor, Tensor]:
    batch, time = x_BTD.shape[:2]
    order = ScanOrder.build(doc_BT, batch, time, x_BTD.device)
    x_MD = x_BTD.flatten(0, 1).index_select(0, order.tokens)
    y_MH = _Scan.apply(x_MD, order.start(state_BH, time), *parameters, order.sizes)  # type: ignore[no-untyped-call]
    y_BTH = y_MH.index_select(0, order.places(batch, time).flatten()).view(batch, time, -1)
    # A copy: a view would keep the outputs of the whole call alive.
    return y_BTH, y_BTH[:, -1].clone()


class _Scan(torch.autograd.Function):
    """The steps, with only what depends on the step before inside the loop; weight gradients are one matmul at the end.

    With h' = n + z (h - n), n = tanh(i_n + r g), g = the hidden matmul's new gate, every pre-activation gradient is
    dh' times a factor known before the backward loop begins.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x_MD: Tensor,
        start_NH: Tensor,
        weight_input: Tensor,
        weight_hidden: Tensor,
        bias_input: Tensor,
        bias_hidden: Tensor,
        sizes: list[int],
    ) -> Tensor:
        width = start_NH.shape[1]
        gates_M3H = torch.addmm(bias_input, x_MD, weight_input.T)
        hidden_MH, y_MH = (gates_M3H.new_empty(x_MD.shape[0], width) for _ in range(2))
        state, offset, weight = start_NH, 0, weight_hidden.T
        for size in sizes:
            span = slice(offset, offset + size)
            state = state[:size]
            recurrent = torch.addmm(bias_hidden, state, weight)
            gates = gates_M3H[span]
            gates[:, : 2 * width].add_(recurrent[:, : 2 * width]).sigmoid_()
            hidden_MH[span] = recurrent[:, 2 * width :]
            gates[:, 2 * width :].addcmul_(gates[:, :width], hidden_MH[span]).tanh_()
            state = torch.lerp(gates[:, 2 * width :], state, gates[:, width : 2 * width], out=y_MH[span])
            offset += size
        ctx.save_for_backward(x_MD, start_NH, weight_input, weight_hidden, gates_M3H, hidden_MH, y_MH)
        ctx.sizes = sizes
        return y_MH

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_MH: Tensor) -> tuple[Tensor | None, ...]:
        x_MD, start_NH, weight_input, weight_hidden, gates_M3H, hidden_MH, y_MH = ctx.saved_tensors
        sizes: list[int] = ctx.sizes
        before_MH = before_each(start_NH, y_MH, sizes)
        reset, update, new = gates_M3H.chunk(3, dim=1)
        to_new = (1 - update) * (1 - new * new)
        to_update = (before_MH - new) * update * (1 - update)
        factors_M3H = torch.stack((to_new * hidden_MH * reset * (1 - reset), to_update, to_new * reset), dim=1)

        doutput_MH = dy_MH.clone(memory_format=torch.contiguous_format)
        offsets = [0, *itertools.accumulate(sizes)]
        dstart_NH = torch.zeros_like(start_NH)
        for step in reversed(range(len(sizes))):
            span = slice(offsets[step], offsets[step + 1])
            dstate = doutput_MH[span]
            factors = factors_M3H[span].mul_(dstate[:, None])
            earlier = dstart_NH if step == 0 else doutput_MH[offsets[step - 1] : offsets[step]]
            target = earlier[: sizes[step]].addcmul_(dstate, update[span])
            target.addmm_(factors.flatten(1), weight_hidden)
        dhidden_M3H = factors_M3H.flatten(1)
        dinput_M3H = torch.cat((dhidden_M3H[:, : -new.shape[1]], doutput_MH * to_new), dim=1)
        return (
            dinput_M3H @ weight_input,
            dstart_NH,
            dinput_M3H.T @ x_MD,
            dhidden_M3H.T @ before_MH,
            dinput_M3H.sum(0),
            dhidden_M3H.sum(0),
            None,
        )
