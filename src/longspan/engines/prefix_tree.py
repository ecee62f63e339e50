"""Which prompts of a call begin alike, so that what they share is computed once: a tree of common beginnings.

The contexts of a sweep show the same beginning of a document, needles lie in the same haystack. An engine goes through
the tree depth first and goes on from the state at each fork, so that only states on the way to where it is are kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from longspan.engines.base import Engine, Tokens

SHARED_TOKENS = {"cpu": 32, "cuda": 512}
"""A shorter common beginning is not worth a pass of its own: on a GPU a short pass costs as much as a longer one."""
SHARED_SHARE = 1 / 16
"""What is saved must be so much of the sequences that share it, since they may no longer go through as one batch, …"""
LONG_TOKENS = 2_048
"""… unless the beginning is as long as this: then every pass is large enough in any case."""

State = TypeVar("State")


@dataclass(frozen=True)
class Fork:
    """A place where sequences part that began alike; the root stands before the first token.

    Attributes:
        start: tokens that were read at the fork before this one.
        end: tokens that all sequences from here on share.
        leaves: the sequences that go on from here each for itself, in their order.
        children: forks further on, the largest last.
        sequence: one of the sequences from here on: its `[start:end]` are the tokens between the two forks.
        size: tokens of all forks and sequences from here on, those before `start` left out.
    """

    start: int
    end: int
    leaves: tuple[int, ...]
    children: tuple[Fork, ...]
    sequence: int
    size: int


def prefix_tree(sequences: Sequence[Tokens], least: int | None = SHARED_TOKENS["cpu"]) -> Fork:
    """The common beginnings of sequences, as far as they are worth sharing.

    The last token of a sequence is never shared: something of each is left to be computed from the state before it.

    Args:
        sequences: of at least one id each.
        least: tokens that a fork must lie behind the one before it; None: nothing is shared.
    """
    if least is None or not sequences:
        return Fork(0, 0, tuple(range(len(sequences))), (), 0, sum(map(len, sequences)))
    order, common = _sorted(sequences)
    lengths = np.array([len(sequence) for sequence in sequences], np.int64)

    def below(low: int, high: int, start: int, least: int) -> tuple[list[int], list[Fork]]:
        """Leaves and forks of the sorted sequences [low, high), which share `start` tokens."""
        leaves: list[int] = []
        forks: list[Fork] = []
        for first, last in _runs(common[low : high - 1] >= start + least, low):
            if last - first == 1:
                leaves.append(int(order[first]))
                continue
            end = int(common[first : last - 1].min())
            rest = int(lengths[order[first:last]].sum()) - (last - first) * start
            if end - start < LONG_TOKENS and (end - start) * (last - first - 1) < SHARED_SHARE * rest:
                more, further = below(first, last, start, end - start + 1)
                leaves += more
                forks += further
            else:
                forks.append(fork(first, last, start, end))
        return leaves, forks

    def fork(low: int, high: int, start: int, end: int) -> Fork:
        leaves, forks = below(low, high, end, least)
        size = end - start + int((lengths[leaves] - end).sum()) + sum(each.size for each in forks)
        # The largest last: what it goes on from can then be let go of.
        children = tuple(sorted(forks, key=lambda each: each.size))
        return Fork(start, end, tuple(sorted(leaves)), children, int(order[low]), size)

    return fork(0, len(sequences), 0, 0)


def walk(root: Fork, state: State, go_on: Callable[[State, Fork, bool], State]) -> Iterator[tuple[Fork, State]]:
    """Every fork that has leaves, with the state after its tokens; states are kept while a fork below needs them.

    Args:
        root: of `prefix_tree`.
        state: before the first token.
        go_on: the state after `sequence[start:end]` of a fork, from the one at its start; and whether that one is
            needed again.
    """
    waiting: list[tuple[Fork, State, bool]] = [(root, state, False)]
    del state
    while waiting:
        fork, before, needed = waiting.pop()
        after = go_on(before, fork, needed) if fork.end > fork.start else before
        del before
        if fork.leaves:
            yield fork, after
        last = len(fork.children) - 1
        waiting.extend((child, after, place < last) for place, child in reversed(list(enumerate(fork.children))))
        del after


def shared_tokens(root: Fork, count: int) -> list[int]:
    """For each of `count` sequences, its tokens that were computed for one before it; their sum is the work saved."""
    shared = [0] * count

    def visit(fork: Fork, unpaid: int) -> int:
        unpaid += fork.end - fork.start
        for leaf in fork.leaves:
            shared[leaf], unpaid = fork.end - unpaid, 0
        for child in fork.children:
            unpaid = visit(child, unpaid)
        return unpaid

    visit(root, 0)
    return shared


def count_tokens(engine: Engine, root: Fork, sequences: Sequence[Tokens]) -> list[int]:
    """`shared_tokens` of what an engine was asked, which it remembers."""
    shared = shared_tokens(root, len(sequences))
    engine.asked_tokens += sum(map(len, sequences))
    engine.shared_tokens += sum(shared)
    return shared


def parted(leaves: Sequence[int], count: int) -> tuple[list[int], list[int]]:
    """The leaves below `count`, and the others counted from it."""
    return [leaf for leaf in leaves if leaf < count], [leaf - count for leaf in leaves if leaf >= count]


def _runs(together: NDArray[np.bool_], low: int) -> Iterator[tuple[int, int]]:
    """Longest stretches [first, last) in which every neighbour belongs to the one before it."""
    first = low
    for place, joined in enumerate(together.tolist(), start=low + 1):
        if not joined:
            yield first, place
            first = place
    yield first, low + len(together) + 1


def _sorted(sequences: Sequence[Tokens]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The order of the sequences by their tokens, and how many each one shares with the next, its last left out."""
    # Bytes with the high ones first are compared as the ids would be, in one go.
    keys = [np.asarray(sequence[:-1]).astype(">u4").tobytes() for sequence in sequences]
    order = sorted(range(len(keys)), key=keys.__getitem__)
    common = [_common(sequences[a][:-1], sequences[b][:-1]) for a, b in pairwise(order)]
    return np.array(order, np.int64), np.array(common, np.int64)


def _common(one: Tokens, other: Tokens) -> int:
    length = min(len(one), len(other))
    differs = np.flatnonzero(np.asarray(one[:length]) != np.asarray(other[:length]))
    return int(differs[0]) if len(differs) else length
