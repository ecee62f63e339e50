"""A GRU scan that forgets at document boundaries: documents run side by side in torch's fused kernel.

Shapes: B batch, T time, D input width, H hidden width, M all tokens of the batch. Gates are stacked in torch's order:
reset, update, new.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from longspan.foundation.errors import UserError


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
        backend: "fused" (torch's kernel over all documents at once) or "reference" (a Python loop over time).

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
    if doc_BT is None or not bool((doc_BT[:, 1:] != doc_BT[:, :-1]).any()):
        y, last = torch.gru(x_BTD, state[None], parameters, len(parameters) == 4, 1, 0.0, False, False, True)
        return y, last[0]
    return _packed(x_BTD, parameters, doc_BT, state)


def _reference(x_BTD: Tensor, parameters: list[Tensor], doc_BT: Tensor | None, state: Tensor) -> tuple[Tensor, Tensor]:
    outputs = []
    for t in range(x_BTD.shape[1]):
        if doc_BT is not None and t > 0:
            state = state.masked_fill((doc_BT[:, t] != doc_BT[:, t - 1])[:, None], 0.0)
        state = torch.gru_cell(x_BTD[:, t], state, *parameters)
        outputs.append(state)
    return torch.stack(outputs, dim=1), state


def _packed(x_BTD: Tensor, parameters: list[Tensor], doc_BT: Tensor, state_BH: Tensor) -> tuple[Tensor, Tensor]:
    """All documents start at step 0, longest first, so that the kernel's steps shrink as documents end."""
    batch, time = doc_BT.shape
    starts_BT = torch.cat((torch.ones_like(doc_BT[:, :1], dtype=torch.bool), doc_BT[:, 1:] != doc_BT[:, :-1]), dim=1)
    first_N = starts_BT.flatten().nonzero()[:, 0]
    length_N = torch.diff(first_N, append=first_N.new_tensor([batch * time]))
    length_N, order_N = length_N.sort(descending=True, stable=True)
    first_N = first_N[order_N]

    step = torch.arange(int(length_N[0]), device=doc_BT.device)
    alive = length_N[None, :] > step[:, None]
    token_M = (first_N[None, :] + step[:, None])[alive]
    row_N = first_N // time
    continues_N1 = (first_N % time == 0)[:, None]
    hidden_NH = torch.where(continues_N1, state_BH[row_N], state_BH.new_zeros(()))
    packed_MH, _ = torch.gru(
        x_BTD.flatten(0, 1)[token_M],
        alive.sum(1).cpu(),
        hidden_NH[None],
        parameters,
        len(parameters) == 4,
        1,
        0.0,
        False,
        False,
    )
    place_M = torch.empty_like(token_M).scatter_(0, token_M, torch.arange(token_M.numel(), device=token_M.device))
    y_BTH = packed_MH[place_M].view(batch, time, -1)
    return y_BTH, y_BTH[:, -1]
