"""`best_fit`: documents are cut only where longer than a row, and rows are filled tightly.

The packing of "Fewer Truncations Improve Language Modeling" (Ding et al., 2024): best-fit-decreasing over the pieces.
Because lengths are small integers, pieces of one length are placed all at once, into all open rows of the tightest
fitting size, so the work hangs on the number of different lengths and not on the number of documents.
"""

from __future__ import annotations

import numpy as np

from longspan.corpus.packing.plan import Dropped, Pieces, Plan, expand, num_windows


class BestFitPlan(Plan):
    """Rows of several whole documents, or parts of long ones.

    Args:
        elements: int64 (documents,), elements of each document.
        order: int64 (documents,); among pieces of equal length the earlier one is placed first, and a row holds its
            pieces in this order.
        context: in tokens.
    """

    def __init__(self, elements: np.ndarray, order: np.ndarray, *, context: int) -> None:
        ordered = elements[order]
        position, window = expand(num_windows(ordered, context, context))
        start = window * context
        length = np.minimum(ordered[position] - start, context + 1)
        rows, self.num_rows = best_fit_decreasing(length, context + 1)
        by_row = np.argsort(rows, kind="stable")
        self._document = order[position[by_row]].astype(np.int32)
        self._start = start[by_row]
        self._length = length[by_row].astype(np.int32)
        self._offsets = np.concatenate([[0], np.cumsum(np.bincount(rows, minlength=self.num_rows))])
        self.dropped: dict[str, Dropped] = {}

    def pieces(self, rows: np.ndarray) -> Pieces:
        """The pieces of `rows`."""
        row, place = expand(self._offsets[rows + 1] - self._offsets[rows])
        piece = self._offsets[rows][row] + place
        start = self._start[piece]
        return Pieces(
            row=row,
            document=self._document[piece].astype(np.int64),
            start=start,
            length=self._length[piece].astype(np.int64),
            repeated=(start > 0).astype(np.int64),
        )


def best_fit_decreasing(lengths: np.ndarray, capacity: int) -> tuple[np.ndarray, int]:
    """Sort pieces into bins: longest first, each into the fullest bin that still takes it.

    Args:
        lengths: int64 (pieces,), from 1 to capacity.
        capacity: of every bin.

    Returns:
        int64 (pieces,) the bin of each piece, and the number of bins.
    """
    order = np.argsort(-lengths, kind="stable")
    counts = np.bincount(lengths, minlength=capacity + 1)
    bins = _Bins(capacity)
    placed = [bins.place(int(length), int(counts[length])) for length in np.flatnonzero(counts)[::-1]]
    assigned = np.empty(len(lengths), np.int64)
    assigned[order] = np.concatenate(placed)
    return assigned, bins.number


class _Bins:
    """Open bins by the room that is left in them."""

    def __init__(self, capacity: int) -> None:
        self.number = 0
        self._capacity = capacity
        self._by_room: dict[int, np.ndarray] = {}
        self._has_room = np.zeros(capacity + 1, bool)

    def place(self, length: int, count: int) -> np.ndarray:
        """Place `count` pieces of one length; returns the bin of each, in the order of placing."""
        placed = []
        while count:
            room = length + int(np.argmax(self._has_room[length:]))
            if not self._has_room[room]:
                room = self._capacity
                self._add(room, np.arange(self.number, self.number - (-count // (room // length))))
                self.number += -(-count // (room // length))
            bins = self._by_room.pop(room)
            self._has_room[room] = False
            # One piece after another, the tightest bin is filled up before the next one is begun.
            each = room // length
            full = min(len(bins), count // each)
            placed.append(np.repeat(bins[:full], each))
            self._add(room - each * length, bins[:full])
            count -= full * each
            rest = bins[full:]
            if count and len(rest):
                placed.append(np.repeat(rest[:1], count))
                self._add(room - count * length, rest[:1])
                rest, count = rest[1:], 0
            self._add(room, rest)
        return np.concatenate(placed)

    def _add(self, room: int, bins: np.ndarray) -> None:
        if len(bins):
            before = self._by_room.get(room)
            self._by_room[room] = bins if before is None else np.concatenate([before, bins])
            self._has_room[room] = True
