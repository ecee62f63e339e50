"""MQAR: how many pairs can a subject keep apart, over what length, and is that what its state could hold?"""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from pydantic import Field

from longspan.corpus.tasks import Example, Task
from longspan.corpus.tasks.mqar import Mqar
from longspan.engines.base import Engine
from longspan.foundation.errors import UserError
from longspan.probes.base import Item, ProbeData, register
from longspan.probes.task import TaskProbe
from longspan.records.observation import Measurement, Metric, Observation, Summary
from longspan.records.store import Record

LOAD = "bits asked for, % of the bits of the state"
CEILING = "Most that these bits allow"
EVERY_BIT = 100.0


@dataclass(frozen=True)
class Half:
    """The bits asked for at which half of the answers of one training are right.

    Attributes:
        bits: between two loads that were asked, on a logarithmic scale; the fewest or the most that were asked where
            accuracy is below or above half at all of them.
        state_bits: bits of the state at the longest row; None where the engine does not say.
        beyond: -1: below half already at the fewest, 1: still above at the most, 0: between.
    """

    bits: float
    state_bits: int | None
    beyond: int


def half_right(shares: Sequence[tuple[float, float]]) -> tuple[float, int]:
    """The load from which on fewer than half of the answers are right, and whether it is beyond what was asked.

    Fewer pairs than in training may be answered worse than those: what counts is the last load with half.

    Args:
        shares: load, rising and positive, and the share of answers right at it.

    Returns:
        The load, between two on a logarithmic scale, and `Half.beyond`.
    """
    last = max((i for i, (_, right) in enumerate(shares) if right >= 0.5), default=-1)
    if last < 0:
        return shares[0][0], -1
    if last == len(shares) - 1:
        return shares[-1][0], 1
    (before, more), (after, less) = shares[last], shares[last + 1]
    return before * (after / before) ** ((more - 0.5) / (more - less)), 0


@register("mqar")
class MqarProbe(TaskProbe):
    """Multi-query associative recall at growing numbers of pairs and lengths, asked in two ways like `task`.

    Accuracy is the share of questions with the right value. Answering n questions takes n·log2(V/2) bits of what stood
    before them. Accuracy is also shown against these bits as a share of the bits of the state that the subject holds
    after the row, as the engine computes it: of caches the whole row, of recurrent states all of it, windows of
    convolutions too. Of every training run, `half` is where half of the answers are right.

    Attributes:
        lengths: positions of a row; None: the length of training. Numbers of pairs that do not fit into a length
            (4 x pairs <= length) are left out there.
    """

    title: ClassVar[str] = "Associative recall (MQAR)"
    explanation: ClassVar[str] = (
        "Pairs of a key and a value, then every key once more: which value stood beside it? Accuracy over questions, "
        "in one pass and with the state cache, and against the bits that the answers need, as a share of the state's."
    )
    axis: ClassVar[str] = "pairs"

    lengths: tuple[int, ...] | None = Field(None, min_length=1)

    @property
    def metrics(self) -> tuple[Metric, ...]:
        """In order of importance."""

        def accuracy(name: str, title: str, x_name: str | None, y_name: str | None = None) -> Metric:
            compare = x_name is None
            return Metric(
                name, title, "", "proportion", "higher", x_name, compare=compare, y_name=y_name, counted="rows"
            )

        return (
            accuracy("overall", "Accuracy, all cells", None),
            accuracy("accuracy", "Accuracy", "pairs", "length"),
            *([accuracy("free", "Accuracy, with the state cache", "pairs")] if self.free_running else []),
            accuracy("string", "Rows with every answer right", "pairs"),
            replace(
                accuracy("load", "Accuracy against load", LOAD),
                mark=EVERY_BIT,
                mark_name="every bit of the state in use",
                ceiling="ceiling",
            ),
            Metric("ceiling", CEILING, "", "exact", "higher", LOAD, compare=False, detail=True, counted="rows"),
            Metric(
                "half",
                "Load with half of the answers right",
                "bits",
                "derived",
                "higher",
                compare=False,
                bound="state_bits",
                counted="rows",
            ),
            Metric("state_bits", "State", "bits", "exact", "higher", compare=False, counted="rows"),
        )

    def drawn(self, trained: Task | None, seed: int) -> list[Item]:
        """Rows at each length and number of pairs that fits into it."""
        task = self.task(trained)
        found: list[Item] = []
        sizes = tuple(sorted(set(self.sizes if self.sizes is not None else task.sizes())))
        lengths = sorted(set(self.lengths or (task.length,)))
        if self.sizes is not None and (unfit := [size for size in sizes if 4 * size > lengths[-1]]):
            raise UserError(
                f"{unfit} pairs in rows of {lengths}", "4 x pairs <= the longest row", "ask for fewer, or longer rows"
            )
        for length in lengths:
            at_length = self.changed(task, {**self.settings, **_fitting(length, sizes)})
            items = self.strings_of(at_length, [size for size in sizes if 4 * size <= length], seed)
            found += [Item(f"{length}:{item.id}", 0, item.tokens, {**item.details, "length": length}) for item in items]
        if not found:
            given = f"{list(sizes)} pairs in rows of {lengths}"
            raise UserError(given, "4 x pairs <= length somewhere", "ask for fewer pairs or longer rows")
        return found

    def task(self, trained: Task | None) -> Mqar:
        """The trained task.

        Raises:
            UserError: it is not `mqar`.
        """
        if not isinstance(trained, Mqar):
            given = "text as the corpus" if trained is None else f"the task {trained.task}"
            raise UserError(
                f"the probe `mqar` with {given}", "`corpus: {source: task, task: mqar, ...}`", "leave it out"
            )
        return trained

    def border(self, task: Task) -> int | None:
        """That of the rows that are asked."""
        return self._asked(task, max(self.lengths or (self.task(task).length,)), 1).handover()

    def example(self, item: Item, task: Task, data: ProbeData) -> Example:
        """The row that an item stands for."""
        return super().example(item, self._asked(task, item.details["length"], item.details["size"]), data)

    def _asked(self, task: Task, length: int, size: int) -> Task:
        return task.asked({**self.settings, **_fitting(length, [size])}, None)

    def answer(self, engine: Engine, items: Sequence[Item], data: ProbeData) -> list[dict[str, Any]]:
        """As `task`, with the length of each row."""
        contents = super().answer(engine, items, data)
        return [{**content, "length": item.details["length"]} for content, item in zip(contents, items, strict=True)]

    def observe(self, record: Record) -> Iterable[Observation]:
        """A row: questions answered rightly of all its questions."""
        answer = record.answer
        if "forced" not in answer:
            return
        x, y = float(answer["size"]), float(answer["length"])
        right, asked = float(sum(answer["forced"])), float(len(answer["forced"]))
        yield self.observation(record, "overall", right, asked, cluster=record.item)
        yield self.observation(record, "accuracy", right, asked, cluster=record.item, x=x, y=y)
        if answer["state_bits"]:
            load = float(f"{EVERY_BIT * answer['bits'] / answer['state_bits']:.3g}")
            yield self.observation(record, "load", right, asked, cluster=record.item, x=load)
            if answer.get("ceiling") is not None:
                yield self.observation(record, "ceiling", answer["ceiling"], 1.0, cluster=record.item, x=load)
        yield self.observation(record, "string", float(all(answer["forced"])), 1.0, cluster=record.item, x=x)
        if "free" in answer:
            yield self.observation(record, "free", float(sum(answer["free"])), asked, cluster=record.item, x=x)

    def derive(self, summary: Summary) -> tuple[Measurement, ...]:
        """Nothing beyond what the rows and the runs say."""
        del summary
        return ()

    def derive_of_runs(self, runs: Sequence[Sequence[Record]]) -> tuple[Measurement, ...]:
        """`half` of each subject, the median of its seeds from the lowest to the highest, and the bits of its state."""
        found: dict[str, list[Half]] = defaultdict(list)
        rows: dict[str, int] = {}
        for records in runs:
            asked = [record for record in records if "forced" in record.answer]
            if asked:
                found[asked[0].subject].append(_half(asked))
                rows[asked[0].subject] = len(asked)
        return tuple(
            measured for subject, halves in found.items() for measured in _measured(subject, halves, rows[subject])
        )


def _half(records: Sequence[Record]) -> Half:
    right: dict[float, list[int]] = defaultdict(list)
    for record in records:
        right[record.answer["bits"]] += record.answer["forced"]
    bits, beyond = half_right([(load, statistics.mean(right[load])) for load in sorted(right)])
    return Half(bits, max(record.answer["state_bits"] or 0 for record in records) or None, beyond)


def _measured(subject: str, halves: Sequence[Half], rows: int) -> Iterable[Measurement]:
    bits = sorted(half.bits for half in halves)
    said = [
        f"{count} of {len(halves)} seeds {what}"
        for beyond, what in ((1, "above half at the most asked"), (-1, "below half at the fewest asked"))
        if (count := sum(half.beyond == beyond for half in halves))
    ]

    def made(
        metric: str, value: float, low: float, high: float, note: str = "", *, beyond: bool = False
    ) -> Measurement:
        return Measurement(metric, subject, None, value, low, high, rows, len(halves), rows, note, beyond=beyond)

    # Of so many seeds the median is one that was not asked far enough, or lies half way to one.
    beyond = 2 * sum(half.beyond != 0 for half in halves) >= len(halves)
    yield made("half", statistics.median(bits), bits[0], bits[-1], "; ".join(said), beyond=beyond)
    if halves[0].state_bits is not None:
        held = float(halves[0].state_bits)
        yield made("state_bits", held, held, held)


def _fitting(length: int, sizes: Sequence[int]) -> dict[str, Any]:
    """Settings of rows of a length, with numbers of pairs that fit."""
    return {"length": length, "pairs": [size for size in sizes if 4 * size <= length] or [1]}
