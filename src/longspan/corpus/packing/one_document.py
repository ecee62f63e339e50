"""`one_per_row` and `chunks`: no row holds more than one document."""

from __future__ import annotations

import numpy as np

from longspan.corpus.packing.plan import Dropped, Pieces, Plan, num_windows


class OneDocumentPlan(Plan):
    """Windows of context + 1 elements over each document, context - overlap apart.

    Args:
        elements: int64 (documents,), elements of each document.
        order: int64 (documents,), the order in which documents take their rows.
        context, overlap: in tokens; overlap < context.
        markers: whether a document's first element is a marker; only for counting what is dropped.
        full_only: `chunks`: drop what does not fill a window, instead of padding it (`one_per_row`).
    """

    def __init__(
        self, elements: np.ndarray, order: np.ndarray, *, context: int, overlap: int, markers: bool, full_only: bool
    ) -> None:
        self._elements = elements
        self._order = order
        self._context = context
        self._overlap = overlap
        stride = context - overlap
        if full_only:
            windows = np.where(elements > context, 1 + (elements - 1 - context) // stride, 0)
            kept = np.where(windows > 0, (windows - 1) * stride + context + 1, 0)
            self.dropped = _dropped(elements, kept, markers)
        else:
            windows = num_windows(elements, context, stride)
            self.dropped = {}
        self._ends = np.cumsum(windows[order])
        self.num_rows = int(self._ends[-1])

    def pieces(self, rows: np.ndarray) -> Pieces:
        """One piece for each of `rows`."""
        position = np.searchsorted(self._ends, rows, side="right")
        window = rows - np.where(position > 0, self._ends[position - 1], 0)
        document = self._order[position]
        start = window * (self._context - self._overlap)
        return Pieces(
            row=np.arange(len(rows), dtype=np.int64),
            document=document,
            start=start,
            length=np.minimum(self._elements[document] - start, self._context + 1),
            repeated=np.where(window > 0, 1 + self._overlap, 0),
        )


def _dropped(elements: np.ndarray, kept: np.ndarray, markers: bool) -> dict[str, Dropped]:
    short = kept == 0
    num_short = int(short.sum())
    markers_lost = num_short if markers else 0
    remainder = int((elements - kept)[~short].sum())
    return {
        "shorter_than_context": Dropped(num_short, int(elements[short].sum()) - markers_lost, markers_lost),
        "remainder_of_document": Dropped(0, remainder, 0),
    }
