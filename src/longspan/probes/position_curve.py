"""Position curve: does text further in get easier, and does more context help, on the same documents throughout?"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any, ClassVar

import numpy as np
from pydantic import Field

from longspan.engines.base import Engine
from longspan.foundation.errors import UserError
from longspan.foundation.randomness import numpy_generator
from longspan.probes.base import Item, Probe, ProbeData, register
from longspan.records.observation import Metric, Observation
from longspan.records.store import Record

SHORTEST = 32
"""A curve over fewer tokens says nothing about context."""


@register("position_curve")
class PositionCurve(Probe):
    """NLL by position, and NLL of the same tokens by how much context stands before them.

    Every bin and every subject sees the same documents: those of at least `length` tokens, cut there. Two questions
    are asked. By position: one pass from the document's beginning, binned by the number of tokens before each target.
    Positions differ in more than their context, so the second is the clean one. By context: the last `targets` tokens
    before `length` are scored with 16, 64, 256, … and all tokens before them; `context_benefit` is what that saves
    over the shortest.

    Attributes:
        length: tokens of each document; None: the longest of 4, 2, 1, 1/2, … times the training context for which
            `min_documents` are long enough.
        min_documents: fewest documents for a chosen length.
        max_documents: at most so many, drawn with the study's seed.
        bins_per_octave: how finely positions are binned.
        targets: tokens scored for the second question, at most a quarter of `length`.
    """

    title: ClassVar[str] = "Loss against position and context"
    explanation: ClassVar[str] = (
        "Loss per token by position in the document, and the loss of the same tokens when more of the text before them "
        "is shown. Every point holds the same documents; points beyond the training context test extrapolation."
    )
    requires: ClassVar[frozenset[str]] = frozenset({"nll"})

    length: int | None = Field(None, ge=SHORTEST)
    min_documents: int = Field(8, ge=1)
    max_documents: int = Field(64, ge=1)
    bins_per_octave: int = Field(1, ge=1, le=8)
    targets: int = Field(64, ge=1)

    @property
    def metrics(self) -> tuple[Metric, ...]:
        """In order of importance."""
        return (
            Metric("nll_by_position", "NLL by position", "nats/token", "ratio", "lower", x_name="position"),
            Metric("nll_by_context", "NLL of the same tokens", "nats/token", "ratio", "lower", x_name="context"),
            Metric("context_benefit", "Saved by more context", "nats/token", "ratio", "higher", x_name="context"),
        )

    def items(self, data: ProbeData) -> list[Item]:
        """One item per chosen document, in the order of the split."""
        length = self.length or self._longest(data)
        fitting = np.flatnonzero(data.shards.lengths >= length)
        if len(fitting) < self.min_documents:
            raise _too_short(data, length, len(fitting), self.min_documents)
        if len(fitting) > self.max_documents:
            drawn = numpy_generator(data.seed, "position_curve", "documents").permutation(len(fitting))
            fitting = np.sort(fitting[drawn[: self.max_documents]])
        shorter = sum(context + self._targets(length) for context in self._contexts(length)[:-1])
        return [Item(data.shards.ids[int(i)], int(i), length + shorter, {"length": length}) for i in fitting]

    def answer(self, engine: Engine, items: Sequence[Item], data: ProbeData) -> list[dict[str, Any]]:
        """Sums of NLL per bin of positions, and of the targets per context."""
        prefix = engine.document_prefix
        sequences = []
        for item in items:
            length, room = self._length_and_room(engine, item)
            document = data.shards.document(item.document)[:length]
            tails = [document[length - self._targets(length) - context :] for context in self._shorter(length, room)]
            # A marker says that a document begins; inside one it would be a lie.
            sequences += [np.concatenate([prefix, document[:room]]), *tails]
        answers = iter(engine.nll(sequences))
        contents = []
        for item in items:
            length, room = self._length_and_room(engine, item)
            # The number of document tokens before each scored token is its position.
            whole = next(answers)[len(prefix) :]
            bins = [
                [low, high, float(whole[low - 1 : high - 1].sum())]
                for low, high in self._bins(length)
                if high - 1 <= len(whole)
            ]
            targets = self._targets(length)
            contexts = [[context, float(next(answers)[-targets:].sum())] for context in self._shorter(length, room)]
            if room >= length:
                contexts.append([length - targets, float(whole[-targets:].sum())])
            contents.append({"positions": bins, "targets": targets, "contexts": contexts})
        return contents

    def observe(self, record: Record) -> Iterable[Observation]:
        """x of a bin is its geometric middle; x of a context is the number of tokens before the targets."""
        for low, high, nll in record.answer["positions"]:
            x = round(math.sqrt(low * (high - 1)), 1)
            yield self.observation(record, "nll_by_position", nll, high - low, cluster=record.item, x=x)
        targets, contexts = record.answer["targets"], record.answer["contexts"]
        for context, nll in contexts:
            x = float(context)
            yield self.observation(record, "nll_by_context", nll, targets, cluster=record.item, x=x)
            if context != contexts[0][0]:
                saved = contexts[0][1] - nll
                yield self.observation(record, "context_benefit", saved, targets, cluster=record.item, x=x)

    def _longest(self, data: ProbeData) -> int:
        length = 4 * data.context
        while length > SHORTEST and int((data.shards.lengths >= length).sum()) < self.min_documents:
            length //= 2
        return max(length, SHORTEST)

    def _length_and_room(self, engine: Engine, item: Item) -> tuple[int, int]:
        """Tokens of the item, and how many of them the subject can take."""
        length = int(item.details["length"])
        limit = engine.context_limit
        return length, length if limit is None else min(length, limit - len(engine.document_prefix) + 1)

    def _bins(self, length: int) -> list[tuple[int, int]]:
        """Positions [low, high), log-spaced; a position is the number of tokens before the target."""
        steps = math.ceil(math.log2(length) * self.bins_per_octave)
        edges = sorted({min(length, round(2 ** (step / self.bins_per_octave))) for step in range(steps + 1)} | {length})
        return list(pairwise(edges))

    def _targets(self, length: int) -> int:
        return min(self.targets, length // 4)

    def _contexts(self, length: int) -> list[int]:
        """16, 64, 256, … and all that there is."""
        longest = length - self._targets(length)
        shorter = [16 * 4**k for k in range(16) if 16 * 4**k < longest]
        return [*shorter, longest]

    def _shorter(self, length: int, room: int) -> list[int]:
        return [context for context in self._contexts(length)[:-1] if context + self._targets(length) <= room]


def _too_short(data: ProbeData, length: int, found: int, needed: int) -> UserError:
    lengths = np.sort(data.shards.lengths)[::-1]
    reach = int(lengths[needed - 1]) if len(lengths) >= needed else 0
    have = f"{needed} documents have {reach} tokens or more" if reach else f"the split has {len(lengths)} documents"
    return UserError(
        f"{found} of {len(lengths)} test documents have {length} tokens or more",
        f"at least {needed} ({have})",
        "lower `length` or `min_documents`, or give the test split more or longer documents",
    )
