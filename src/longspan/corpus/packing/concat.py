"""`concat`: all documents in one stream, cut into rows."""

from __future__ import annotations

import numpy as np

from longspan.corpus.packing.plan import Dropped, Pieces, Plan, expand


class ConcatPlan(Plan):
    """Rows of context + 1 elements at distance context - overlap; the last row may be short.

    Rows share one element (plus the overlap), so that every element but the stream's first is somewhere a target.

    Args:
        elements: int64 (documents,), elements of each document.
        order: int64 (documents,), the order of the documents in the stream.
        context, overlap: in tokens; overlap < context.
    """

    def __init__(self, elements: np.ndarray, order: np.ndarray, *, context: int, overlap: int) -> None:
        self._order = order
        self._ends = np.cumsum(elements[order])
        self._context = context
        self._overlap = overlap
        self._total = int(self._ends[-1])
        self.num_rows = 1 + -(-max(0, self._total - 1 - context) // (context - overlap))
        self.dropped: dict[str, Dropped] = {}

    def pieces(self, rows: np.ndarray) -> Pieces:
        """The pieces of `rows`; computed from the stream's positions, nothing is stored per row."""
        begin = rows * (self._context - self._overlap)
        end = np.minimum(begin + self._context + 1, self._total)
        first = np.searchsorted(self._ends, begin, side="right")
        last = np.searchsorted(self._ends, end - 1, side="right")
        row, place = expand(last - first + 1)
        position = first[row] + place
        document = self._order[position]
        document_begin = np.where(position > 0, self._ends[position - 1], 0)
        piece_begin = np.maximum(document_begin, begin[row])
        length = np.minimum(self._ends[position], end[row]) - piece_begin
        shown = np.where(rows[row] > 0, begin[row] + self._overlap + 1, 0)
        return Pieces(
            row=row,
            document=document,
            start=piece_begin - document_begin,
            length=length,
            repeated=np.clip(shown - piece_begin, 0, length),
        )
