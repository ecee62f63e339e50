"""What a packing method decides: for every row of one pass over the documents, which pieces of which documents."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True)
class Pieces:
    """Pieces of documents in the order in which they fill some rows; every array is int64 (pieces,).

    Attributes:
        row: which of the asked rows, from 0.
        document: index in the shards.
        start: first element of the document that the piece holds.
        length: elements.
        repeated: how many leading elements an earlier row has shown already.
    """

    row: np.ndarray
    document: np.ndarray
    start: np.ndarray
    length: np.ndarray
    repeated: np.ndarray


@dataclass(frozen=True, slots=True)
class Dropped:
    """What a plan leaves out: documents that vanish whole, text tokens, and markers."""

    documents: int
    tokens: int
    markers: int


class Plan(ABC):
    """One pass over the documents. Rows are numbered in the order of the documents that the plan was given.

    Attributes:
        num_rows: rows of the pass.
        dropped: reason → what no row holds.
    """

    num_rows: int
    dropped: dict[str, Dropped]

    @abstractmethod
    def pieces(self, rows: np.ndarray) -> Pieces:
        """The pieces of `rows` (int64, any order)."""


def num_windows(elements: np.ndarray, context: int, stride: int) -> np.ndarray:
    """Rows of `context` + 1 elements, `stride` apart, that hold all elements (the last one may be short)."""
    windows: np.ndarray = 1 + -(-np.maximum(elements - 1 - context, 0) // stride)
    return windows


def expand(counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For groups of `counts` members: the group of each member, and its place within the group."""
    group = np.repeat(np.arange(len(counts), dtype=np.int64), counts)
    return group, np.arange(len(group), dtype=np.int64) - np.repeat(np.cumsum(counts) - counts, counts)
