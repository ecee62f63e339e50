"""A GRU scan that forgets at document boundaries: segments run side by side in torch's fused kernel.

Shapes: B batch, T time, D input width, H hidden width. Gate order in the stacked weights: reset, update, new (torch).
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

    The cell is that of `torch.nn.GRU` (Cho et al. 2014, reset after the hidden matmul).

    Args:
        x_BTD: inputs, T >= 1.
        weight_input_3HD: stacked input weights (reset, update, new).
        weight_hidden_3HH: stacked hidden weights.
        bias_input_3H: stacked input biases, or None for both.
        bias_hidden_3H: stacked hidden biases, or None for both.
        doc_BT: document ids; the state is zeroed where the id changes. None: one document.
        initial_state_BH: state before the first token; None: zeros.
        initial_doc_B: document of the initial state; used only where `doc_BT[:, 0]` equals it. None: it continues.
        backend: "fused" (torch's kernel on packed segments) or "reference" (a Python loop over time).

    Returns:
        y (B, T, H) and the state after the last token (B, H).

    Raises:
        UserError: unknown backend.
    """
    if backend not in ("fused", "reference"):
        raise UserError(f"gru backend {backend!r}", "'fused' or 'reference'", "name one of the two")
    batch, time = x_BTD.shape[:2]
    hidden = weight_hidden_3HH.shape[1]
    state = x_BTD.new_zeros(batch, hidden) if initial_state_BH is None else initial_state_BH
    outputs = []
    for t in range(time):
        if doc_BT is not None:
            previous = initial_doc_B if t == 0 else doc_BT[:, t - 1]
            if previous is not None:
                state = state.masked_fill((doc_BT[:, t] != previous)[:, None], 0.0)
        state = torch.gru_cell(x_BTD[:, t], state, weight_input_3HD, weight_hidden_3HH, bias_input_3H, bias_hidden_3H)
        outputs.append(state)
    return torch.stack(outputs, dim=1), state
