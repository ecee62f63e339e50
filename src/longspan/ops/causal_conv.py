"""Short causal depthwise convolution that never looks across a document boundary.

Shapes: B batch, T time, D channels, K taps.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from longspan.foundation.errors import UserError


def causal_conv(
    x_BTD: Tensor,
    weight_DK: Tensor,
    bias_D: Tensor | None,
    *,
    doc_BT: Tensor | None = None,
    tail_BKD: Tensor | None = None,
    tail_doc_BK: Tensor | None = None,
    activation: Literal["silu"] | None = "silu",
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Computes `y[t] = act(bias + sum_k weight[:, K-1-k] * x[t-k])` over the taps inside the document of t.

    The tap order is that of `torch.nn.Conv1d` and of `causal_conv1d_fn` (Dao-AILab/causal-conv1d).

    Args:
        x_BTD: inputs, T >= 1.
        weight_DK: one filter per channel; the last column multiplies x[t].
        bias_D: added before the activation, or None.
        doc_BT: document ids; a tap counts only where `doc[t-k] == doc[t]`. None: one document.
        tail_BKD: the K-1 inputs before x, (B, K-1, D); None: the sequence starts here.
        tail_doc_BK: document ids of the tail, (B, K-1); None: the tail belongs to the document of `doc_BT[:, 0]`.
        activation: "silu" or None.

    Returns:
        y (B, T, D); the tail to hand to the next call (B, K-1, D); its document ids (B, K-1), None without documents.

    Raises:
        UserError: an unknown activation.
    """
    if activation not in ("silu", None):
        raise UserError(f"activation {activation!r}", "'silu' or None", "name one of the two")
    taps = weight_DK.shape[1]
    batch, time, channels = x_BTD.shape
    if tail_BKD is None:
        tail_BKD = x_BTD.new_zeros(batch, taps - 1, channels)
    padded = torch.cat((tail_BKD.to(x_BTD.dtype), x_BTD), dim=1)
    docs = None
    if doc_BT is not None:
        if tail_doc_BK is None:
            tail_doc_BK = doc_BT[:, :1].expand(batch, taps - 1)
        docs = torch.cat((tail_doc_BK.to(doc_BT.dtype), doc_BT), dim=1)
    y_BTD = x_BTD * weight_DK[:, -1]
    for k in range(1, taps):
        shifted = padded[:, taps - 1 - k : taps - 1 - k + time]
        if docs is not None:
            same = docs[:, taps - 1 - k : taps - 1 - k + time] == doc_BT
            shifted = shifted.masked_fill(~same[..., None], 0.0)
        y_BTD = y_BTD + shifted * weight_DK[:, taps - 1 - k]
    if bias_D is not None:
        y_BTD = y_BTD + bias_D
    if activation == "silu":
        y_BTD = F.silu(y_BTD)
    tail_doc = None if docs is None else docs[:, time:]
    return y_BTD, padded[:, time:], tail_doc
