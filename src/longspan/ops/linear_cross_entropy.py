"""Cross-entropy of a linear head without ever holding all logits: the vocabulary is the widest layer of a small model.

Shapes: N tokens, D model width, V vocabulary.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor


def linear_cross_entropy(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    targets_N: Tensor,
    *,
    chunk: int = 1024,
    ignore: int = -100,
    reduction: Literal["none", "sum"] = "sum",
) -> Tensor:
    """Negative log-likelihood (nats) of `targets` under `softmax(hidden @ weight.T)`.

    Args:
        hidden_ND: last hidden states, fp32 or bf16.
        weight_VD: head (or tied embedding) rows.
        targets_N: integer class per token; `ignore` marks tokens without loss.
        chunk: tokens whose logits live at the same time.
        ignore: the target value that carries no loss.
        reduction: "sum" gives a scalar, "none" one value per token (0 where ignored).

    Returns:
        fp32, scalar or (N,).
    """
    losses = []
    for start in range(0, hidden_ND.shape[0], chunk):
        logits = (hidden_ND[start : start + chunk] @ weight_VD.T).float()
        target = targets_N[start : start + chunk].long()
        losses.append(F.cross_entropy(logits, target, ignore_index=ignore, reduction="none"))
    loss_N = torch.cat(losses) if losses else hidden_ND.new_zeros(0, dtype=torch.float32)
    return loss_N.sum() if reduction == "sum" else loss_N
