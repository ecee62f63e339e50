"""The short convolution in front of a recurrent mixer: what it needs of documents and of the tokens before the call.

Legend: B rows, T tokens, D channels, K taps.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from longspan.models.mixers.base import MixerState
from longspan.models.segments import Segments
from longspan.ops.causal_conv import causal_conv


@dataclass(frozen=True)
class ConvolvedState(MixerState):
    """The state of a mixer with a short convolution: its last K-1 inputs (B, K-1, D) and their documents."""

    tail: Tensor | None = None
    tail_doc: Tensor | None = None

    def undocumented(self, last_doc_B: Tensor) -> Self:
        """Inputs of other documents are zero, as before the first token."""
        if self.tail is None or self.tail_doc is None:
            return self
        others = self.tail_doc != last_doc_B[:, None].to(self.tail_doc)
        return replace(self, tail=self.tail.masked_fill(others[..., None], 0.0), tail_doc=None)

    def handed_over(self, rounded: Callable[[Tensor], Tensor]) -> Self:
        """The recurrent state rounded; the convolution keeps no input, as before the first token."""
        tail = None if self.tail is None else torch.zeros_like(self.tail)
        return replace(replace(self, tail=None, tail_doc=None).map(rounded), tail=tail)


def short_conv(
    x_BTD: Tensor,
    weight_DK: Tensor,
    bias_D: Tensor | None,
    segments: Segments,
    tail_BKD: Tensor | None,
    tail_doc_BK: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """`causal_conv` with SiLU over the documents that recurrent mixers see.

    Args:
        x_BTD: inputs, T >= 1.
        weight_DK: one filter per channel.
        bias_D: added before the SiLU, or None.
        segments: of this call.
        tail_BKD: the K-1 inputs before x; None: nothing seen yet.
        tail_doc_BK: their documents; None: all of the document before this call.

    Returns:
        y (B, T, D), and the tail and its documents for the next call, as copies: a view would keep the inputs of the
        whole call alive.
    """
    doc_BT = segments.state_doc
    if doc_BT is None:
        tail_doc_BK = None
    elif tail_BKD is not None and tail_doc_BK is None:
        assert segments.previous_doc is not None
        tail_doc_BK = segments.previous_doc[:, None].expand(tail_BKD.shape[:2])
    y_BTD, tail, tail_doc = causal_conv(
        x_BTD, weight_DK, bias_D, doc_BT=doc_BT, tail_BKD=tail_BKD, tail_doc_BK=tail_doc_BK
    )
    return y_BTD, tail.clone(), None if tail_doc is None else tail_doc.clone()
