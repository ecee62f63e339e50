"""Task: how long may a string of the trained task become before the answer breaks?"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from longspan.corpus.tasks import Example, Task
from longspan.engines.base import OWN, Engine, Sampling
from longspan.foundation.errors import UserError
from longspan.foundation.randomness import numpy_generator
from longspan.probes.base import Asked, Item, Probe, ProbeData, register, shown
from longspan.records.observation import Measurement, Metric, Observation, Summary
from longspan.records.store import Record

REACHED = 0.9
"""Accuracy that counts as being able to."""


@register("task")
class TaskProbe(Probe):
    """Strings of the task that the subject was trained on, at a grid of sizes, answered in two ways.

    Teacher-forced: the whole string goes through once, and the likeliest token after each place is compared with the
    answer. Free-running: the subject reads the question and writes the answer greedily with its state cache, reading
    what it wrote itself. A string is right where every token of its answer is, its end included. Without a mistake
    both go the same way, so the two string accuracies must agree; the accuracies of single tokens need not.

    Attributes:
        sizes: lengths (of `mqar`: numbers of pairs) to ask at; None: those of training.
        strings: items at each size, the same for every subject.
        free_running: ask for generation too; off leaves out half of what a record can show.
        settings: of the task, where it shall not be asked as it was trained, e.g. `{length: 256}`, or another task
            with the same vocabulary, `{task: duplicate_ngram, ngram: 3}`.
    """

    title: ClassVar[str] = "Task"
    explanation: ClassVar[str] = (
        "Strings of the trained task at growing size; the whole answer must be right. Teacher-forced: one pass over "
        "the right answer. Free-running: the subject reads what it wrote itself. Intervals are Wilson's over strings."
    )
    requires: ClassVar[frozenset[str]] = frozenset({"predict", "generate"})
    x_scale: ClassVar[Literal["log", "linear"]] = "log"

    axis: ClassVar[str] = "length"

    sizes: tuple[int, ...] | None = None
    strings: int = Field(256, ge=2)
    free_running: bool = True
    settings: dict[str, Any] = Field(default_factory=dict)

    @property
    def metrics(self) -> tuple[Metric, ...]:
        """In order of importance."""

        def accuracy(name: str, title: str) -> Metric:
            return Metric(name, title, "", "proportion", "higher", x_name=self.axis, compare=False, counted="strings")

        free_string = accuracy("free_string", "String accuracy, free-running")
        free_token = accuracy("free_token", "Token accuracy, free-running")
        return (
            Metric("overall", f"String accuracy, all {self.axis}s", "", "proportion", "higher", counted="strings"),
            accuracy("string", "String accuracy"),
            *([free_string] if self.free_running else ()),
            accuracy("token", "Token accuracy"),
            *([free_token] if self.free_running else ()),
            Metric(
                "reach",
                f"Longest with {REACHED:.0%} of strings right",
                "",
                "derived",
                "higher",
                compare=False,
                counted="strings",
            ),
        )

    def check(self, engine: Engine) -> None:
        """Generation is needed only where it is asked for."""
        for capability in sorted(self.requires - engine.capabilities):
            if capability != "generate" or self.free_running:
                raise engine.refuse(capability)

    def items(self, data: ProbeData) -> list[Item]:
        """`strings` at each size; what a string is follows from the task, the size and its number."""
        return self.drawn(data.task, data.seed)

    def check_task(self, task: Task | None) -> None:
        """Refuse text, and sizes of which there is no string."""
        self.drawn(task, 0)

    def drawn(self, trained: Task | None, seed: int) -> list[Item]:
        """The items, which follow from the trained task and the seed."""
        task = self.task(trained)
        sizes = tuple(sorted(set(self.sizes if self.sizes is not None else task.sizes())))
        if not sizes or sizes[0] < 1:
            fix = "e.g. `sizes: [10, 20]`; without it, those of training"
            raise UserError(f"sizes {list(sizes)}", "one or more positive sizes", fix)
        return self.strings_of(task, sizes, seed)

    def strings_of(self, task: Task, sizes: Sequence[int], seed: int) -> list[Item]:
        """Items of a task at some sizes.

        Raises:
            UserError: there is no string of some size; said before anything is trained.
        """
        for size in sizes:
            task.example(numpy_generator(seed, "task probe", size, 0), size)
        return [
            Item(f"{size}:{number}", 0, 2 * task.span(size), {"size": size, "number": number})
            for size in sizes
            for number in range(self.strings)
        ]

    def batches(self, items: Sequence[Item]) -> Iterator[list[Item]]:
        """Neighbours of one size together."""
        for batch in super().batches(items):
            cuts = [i for i in range(1, len(batch)) if batch[i].details["size"] != batch[i - 1].details["size"]]
            for start, end in zip([0, *cuts], [*cuts, len(batch)], strict=True):
                yield batch[start:end]

    def answer(self, engine: Engine, items: Sequence[Item], data: ProbeData) -> list[dict[str, Any]]:
        """Which tokens of each answer are right, both ways; nothing where the subject cannot take the length."""
        task = self.task(data.task)
        examples = [self.example(item, task, data) for item in items]
        limit = engine.context_limit
        if limit is not None and max(len(example.inputs) for example in examples) > limit:
            return [
                {"size": item.details["size"], "context": len(e.inputs)}
                for item, e in zip(items, examples, strict=True)
            ]
        held = self.held(engine, task, len(examples[0].inputs))
        bits = [task.bits(item.details["size"]) for item in items]
        forced = engine.predict([e.inputs for e in examples], [e.labels >= 0 for e in examples])
        contents = [
            {
                "size": item.details["size"],
                "context": len(example.inputs),
                "state_bits": held,
                "bits": needed,
                "forced": _right(written, example),
            }
            for item, example, needed, written in zip(items, examples, bits, forced, strict=True)
        ]
        if self.free_running:
            border = self.border(task) if engine.handed_over else None
            for content, example, written in zip(contents, examples, _written(engine, examples, border), strict=True):
                content["free"] = _right(written, example)
        if engine.handed_over is not None and held is not None:
            for content, item in zip(contents, items, strict=True):
                content["ceiling"] = task.most_right(item.details["size"], held)
        return contents

    def border(self, task: Task) -> int | None:
        """Positions before the questions of every string that is asked; None where they differ."""
        return task.handover()

    def held(self, engine: Engine, task: Task, context: int) -> int | None:
        """Bits of the state that a subject answers from: as handed over, or after the whole string.

        Raises:
            UserError: the state is handed over elsewhere than where the questions begin.
        """
        if engine.handed_over is None:
            size = engine.state_bytes(context)
            return None if size is None else 8 * size
        border, at = self.border(task), engine.handed_over.at
        if border != at:
            where = "at no fixed place" if border is None else f"at {border}"
            raise UserError(
                f"questions that begin {where}, of a subject whose state is handed over at {at}",
                "questions that begin where the state is handed over",
                "ask for them as in training: leave the setting of the probe that moves them out",
            )
        return engine.handed_over.bits

    def observe(self, record: Record) -> Iterable[Observation]:
        """One string: right or not, and how many of its tokens are."""
        x = float(record.answer["size"])
        for way, prefix in (("forced", ""), ("free", "free_")):
            if way in record.answer:
                right = record.answer[way]
                whole, tokens = float(all(right)), float(sum(right))
                yield self.observation(record, f"{prefix}string", whole, 1.0, cluster=record.item, x=x)
                if way == "forced":
                    yield self.observation(record, "overall", whole, 1.0, cluster=record.item)
                yield self.observation(record, f"{prefix}token", tokens, float(len(right)), cluster=record.item, x=x)

    def derive(self, summary: Summary) -> tuple[Measurement, ...]:
        """The largest size up to which every size asked has at least 90 % of its strings right.

        Its interval is read off the intervals at the sizes: the same with their lower and with their upper ends.
        """
        found: dict[str, list[Measurement]] = {}
        for measured in summary.measurements:
            if measured.metric == "string":
                found.setdefault(measured.subject, []).append(measured)
        return tuple(_reach(subject, sorted(curve, key=lambda m: m.x or 0)) for subject, curve in found.items())

    def mark(self, data: ProbeData) -> tuple[float, str] | None:
        """The largest size in training."""
        return None if data.task is None else (float(max(data.task.sizes())), f"the largest {self.axis} in training")

    def describe(self, item: Item, data: ProbeData) -> Asked:
        """The question and the answer as symbols."""
        example = self.example(item, self.task(data.task), data)
        own = example.fed_back
        given = example.inputs[: int(np.argmax(own))] if own.any() else example.inputs
        return Asked(shown(data, given), shown(data, example.answer))

    def task(self, trained: Task | None) -> Task:
        """What is asked of subjects that were trained on a task.

        Raises:
            UserError: the corpus is no task, or the settings change its vocabulary.
        """
        if trained is None:
            raise UserError(
                f"the probe `{self.kind}` with text as the corpus",
                "a task: `corpus: {source: task, task: copy, ...}`",
                "leave the probe out, or choose a task",
            )
        return self.changed(trained, self.settings) if self.settings else trained

    def changed(self, trained: Task, settings: Mapping[str, Any]) -> Task:
        """The trained task with other settings and the same ids.

        Raises:
            UserError: settings that it refuses, or that change its vocabulary.
        """
        task = trained.asked(settings, self.sizes)
        if task.tokenizer().fingerprint != trained.tokenizer().fingerprint:
            raise UserError(
                f"settings {dict(settings)} change the vocabulary of {trained.task}",
                "strings of the ids that the subjects were trained on",
                "leave `vocab_size` and its like as in training",
            )
        return task

    def example(self, item: Item, task: Task, data: ProbeData) -> Example:
        """The string that an item stands for."""
        size, number = item.details["size"], item.details["number"]
        return task.example(numpy_generator(data.seed, "task probe", size, number), size)


def _written(engine: Engine, examples: Sequence[Example], border: int | None) -> list[NDArray[np.int64]]:
    """What a subject writes at the places of the answers, reading its own where the string repeats the answer.

    Args:
        border: tokens that it reads at once; None: all before its first answer.
    """
    starts = [border or example.num_given for example in examples]
    ends = [int(np.flatnonzero(example.labels >= 0)[-1]) + 1 for example in examples]
    given = [
        np.where(example.fed_back, OWN, example.inputs)[start:end]
        for example, start, end in zip(examples, starts, ends, strict=True)
    ]
    sampling = Sampling(max_new_tokens=max(map(len, given)) + 1, stop_at_boundary=False)
    prompts = [example.inputs[:start] for example, start in zip(examples, starts, strict=True)]
    return [
        generation.tokens[example.labels[start - 1 : end] >= 0]
        for generation, example, start, end in zip(
            engine.generate(prompts, sampling, given), examples, starts, ends, strict=True
        )
    ]


def _right(written: NDArray[np.int64], example: Example) -> list[int]:
    """1 for every token of the answer that was written, 0 for the others and for those that were not written."""
    answer = example.answer
    right = np.zeros(len(answer), bool)
    right[: len(written)] = written[: len(answer)] == answer[: len(written)]
    return [int(each) for each in right]


def _reach(subject: str, curve: Sequence[Measurement]) -> Measurement:
    def up_to(ends: Sequence[float | None]) -> float:
        reached = 0.0
        for measured, end in zip(curve, ends, strict=True):
            if end is None or end < REACHED:
                break
            reached = measured.x or 0.0
        return reached

    value, low, high = (up_to([getattr(m, name) for m in curve]) for name in ("value", "low", "high"))
    first, last = curve[0], curve[-1]
    note = f"longest asked: {last.x:g}" if value == last.x else "" if value else f"shortest asked: {first.x:g}"
    return Measurement("reach", subject, None, value, low, high, first.n, first.seeds, first.items, note)
