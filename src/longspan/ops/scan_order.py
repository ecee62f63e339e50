"""The order in which a loop over time visits tokens: all documents side by side, whatever row they lie in.

Step after step, in each step the documents that still go on. All documents start together at step 0: fewer, wider steps
than going through the rows, and no document meets what another left behind.

Shapes: B batch, T time, H hidden width, N documents, M all tokens of the batch.
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class ScanOrder(NamedTuple):
    """Documents are sorted by length, longest first, so that those of a step are the first `sizes[step]` of them.

    Attributes:
        tokens: int64 (M,), where in the flattened rows each visited token lies.
        first: int64 (N,), where each document begins.
        sizes: documents in each step.
    """

    tokens: Tensor
    first: Tensor
    sizes: list[int]

    @staticmethod
    def build(doc_BT: Tensor | None, batch: int, time: int, device: torch.device) -> ScanOrder:
        """Finds the documents; every row is one without `doc_BT`.

        On CUDA the host waits here, once per layer: the lengths of the documents decide how many steps it launches.
        """
        if doc_BT is None:
            first_N = torch.arange(batch, device=device) * time
        else:
            starts_BT = F.pad(doc_BT[:, 1:] != doc_BT[:, :-1], (1, 0), value=True)
            first_N = starts_BT.flatten().nonzero()[:, 0]
        length_N = torch.diff(first_N, append=first_N.new_tensor([batch * time]))
        length_N, order_N = length_N.sort(descending=True, stable=True)
        first_N = first_N[order_N]
        step = torch.arange(int(length_N[0]), device=device)
        alive = length_N > step[:, None]
        return ScanOrder((first_N + step[:, None])[alive], first_N, alive.sum(1).tolist())

    def start(self, state_BH: Tensor, time: int) -> Tensor:
        """(N, H): the state of its row where a document begins the row, zeros for all others."""
        continues_N1 = (self.first % time == 0)[:, None]
        return torch.where(continues_N1, state_BH[self.first // time], state_BH.new_zeros(()))

    def places(self, batch: int, time: int) -> Tensor:
        """int64 (B, T): when each token of the rows is visited."""
        place_M = torch.empty_like(self.tokens)
        place_M[self.tokens] = torch.arange(place_M.numel(), device=place_M.device)
        return place_M.view(batch, time)


def before_each(start_NH: Tensor, after_MH: Tensor, sizes: list[int]) -> Tensor:
    """(M, H): the state that every visited token met, from the state that each left."""
    offsets = [0, *itertools.accumulate(sizes)]
    earlier = [after_MH[offset : offset + size] for offset, size in zip(offsets, sizes[1:], strict=False)]
    return torch.cat((start_NH[: sizes[0]], *earlier))
