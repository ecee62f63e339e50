"""What a probe is: items, how to ask them, how to read the answers. Intervals, tests and the report come for free.

A probe of one's own is one file:

    @register("first_word")
    class FirstWord(Probe):
        title = "First word"
        explanation = "How well the second token follows from the first."
        requires = frozenset({"nll"})

        @property
        def metrics(self): return (Metric("nll", "NLL", "nats/token", "ratio", "lower"),)
        def items(self, data): ...
        def answer(self, engine, items, data): ...
        def observe(self, record): ...
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from longspan.corpus.packing import PackingConfig
from longspan.corpus.shards import TokenShards
from longspan.corpus.tasks import Task
from longspan.corpus.tokenizer import Tokenizer
from longspan.engines.base import Engine, Generation, UnusableAnswer
from longspan.foundation.config import Config, shown_value
from longspan.foundation.errors import UserError
from longspan.foundation.registry import Registry
from longspan.records.observation import Measurement, Metric, Observation, Summary
from longspan.records.store import Record

SAME_SCORE = 1e-6
"""Scores closer than this share of their size are equal: float32 sums of equal terms differ by rounding."""


@dataclass(frozen=True)
class ProbeData:
    """What items are drawn from.

    Attributes:
        shards: the test split.
        tokenizer: that made the shards.
        context: training context of the study, the longest where it varies; items may depend on it.
        trained_context: the training context of the subject that is asked, None where it is `context`; items never
            depend on it.
        packing: how the subject that is asked was trained; items never depend on it.
        seed: of the items, the same for every subject.
        task: what the subject was trained on where the corpus is a task; the shards then hold a few of its strings.
    """

    shards: TokenShards
    tokenizer: Tokenizer
    context: int
    packing: PackingConfig = field(default_factory=PackingConfig)
    seed: int = 0
    trained_context: int | None = None
    task: Task | None = None


@dataclass(frozen=True)
class Item:
    """One question.

    Attributes:
        id: unique within the probe, the same for every subject.
        document: index in the shards of the document it is about.
        tokens: about how many tokens one subject takes in for it; batches are cut by it.
        details: what `answer` needs beside the document.
    """

    id: str
    document: int
    tokens: int
    details: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Answer:
    """What a subject answered to one item.

    Attributes:
        item: id of the item.
        content: JSON with finite numbers only; all that `observe` needs.
        seconds: wall time, the batch's shared out evenly.
    """

    item: str
    content: dict[str, Any]
    seconds: float = 0.0


@dataclass(frozen=True)
class Asked:
    """An item for people to look at: what was asked, and what would have been right (empty where nothing is)."""

    asked: str
    expected: str = ""


@dataclass(frozen=True)
class Reply:
    """What a subject wrote, for people to look at, and why that is no answer (empty where it is one)."""

    text: str = ""
    null: str = ""


class Probe(Config, ABC):
    """A set of items, how to ask them, and how to read the answers. Its fields are its settings.

    Class attributes:
        title, explanation: for the report: a short heading; what was asked and how to read it.
        requires: engine capabilities.
        x_scale: of the metrics that have an x.
        place: with the quality of the subjects or with their cost.
        batch_tokens: items are asked together up to about so many tokens.
        only_read: settings that change how answers are read and not what is asked: records stay valid.
    """

    title: ClassVar[str]
    explanation: ClassVar[str]
    requires: ClassVar[frozenset[str]] = frozenset({"nll"})
    x_scale: ClassVar[Literal["log", "linear"]] = "log"
    place: ClassVar[Literal["quality", "cost"]] = "quality"
    batch_tokens: ClassVar[int] = 32_768
    only_read: ClassVar[frozenset[str]] = frozenset()

    kind: str

    @property
    @abstractmethod
    def metrics(self) -> tuple[Metric, ...]:
        """What it measures, in order of importance."""

    @abstractmethod
    def items(self, data: ProbeData) -> list[Item]:
        """The questions, the same for every subject: a function of shards, context, tokenizer and seed alone.

        Raises:
            UserError: too few or too short documents, with the numbers and what to do.
        """

    @abstractmethod
    def answer(self, engine: Engine, items: Sequence[Item], data: ProbeData) -> list[dict[str, Any]]:
        """Ask one batch; the contents of the answers in the order of the items."""

    @abstractmethod
    def observe(self, record: Record) -> Iterable[Observation]:
        """Read one record; pure, so that stored records can be read again without a model."""

    def derive(self, summary: Summary) -> tuple[Measurement, ...]:
        """Numbers of the metrics of kind `derived`, which no single item has: read off the summary of the others."""
        del summary
        return ()

    def derive_of_runs(self, runs: Sequence[Sequence[Record]]) -> tuple[Measurement, ...]:
        """Numbers of the metrics of kind `derived` that are read off each run by itself: all records of one seed."""
        del runs
        return ()

    def observe_together(self, records: Sequence[Record]) -> Iterable[Observation]:
        """What only all records of one subject and seed together show; pure as `observe`."""
        del records
        return ()

    def remarks(self, summary: Summary) -> list[str]:
        """Lines to be read with the numbers, e.g. one that is made of several of them."""
        del summary
        return []

    def mark(self, data: ProbeData) -> tuple[float, str] | None:
        """An x worth marking in the charts and what it is; None: the training context, on axes of tokens."""
        del data
        return None

    def describe(self, item: Item, data: ProbeData) -> Asked:
        """The item as text, shortened."""
        return Asked(shown(data, data.shards.document(item.document)[:100]))

    def reply(self, record: Record) -> Reply:
        """What was written, of probes that are answered in words."""
        del record
        return Reply()

    def hub_dataset(self) -> str | None:
        """The data set on the hub whose rows it asks, at its setting `revision`; None where it asks something else."""
        return None

    def protocol(self) -> dict[str, Any]:
        """Every setting that changes an answer; part of each record's key."""
        return {name: value for name, value in self.model_dump(mode="json").items() if name not in self.only_read}

    def check_task(self, task: Task | None) -> None:
        """Refuse a corpus that is no use to the probe, as far as its settings say so before anything is prepared.

        Args:
            task: that subjects are trained on; None: the corpus is text.

        Raises:
            UserError: no item can be drawn.
        """
        del task

    def check_before(self, context: int) -> None:
        """Refuse settings, and files of its own, that cannot serve in a study, before anything is prepared.

        Args:
            context: training context of the study, as in `ProbeData`.

        Raises:
            UserError: with what to do.
        """
        del context

    def check(self, engine: Engine) -> None:
        """Refuse an engine that lacks what the probe needs."""
        for capability in sorted(self.requires - engine.capabilities):
            raise engine.refuse(capability)

    def ask(self, engine: Engine, items: Sequence[Item], data: ProbeData) -> Iterator[list[Answer]]:
        """Answers, batch by batch; store each batch before taking the next.

        Batches are cut from all items of the probe, wanted or not: after an interruption the same items go through
        together again, so that the answers are the same to the last bit.

        Raises:
            UserError: the engine lacks a capability.
            UnusableAnswer: NaN or infinite likelihoods.
        """
        self.check(engine)
        wanted = {item.id for item in items}
        for batch in self.batches(self.items(data)):
            if not any(item.id in wanted for item in batch):
                continue
            began = time.perf_counter()
            contents = self.answer(engine, batch, data)
            seconds = (time.perf_counter() - began) / len(batch)
            yield [
                Answer(item.id, content, seconds)
                for item, content in zip(batch, contents, strict=True)
                if item.id in wanted
            ]

    def batches(self, items: Sequence[Item]) -> Iterator[list[Item]]:
        """Neighbours together up to `batch_tokens`."""
        batch: list[Item] = []
        for item in items:
            if batch and sum(each.tokens for each in batch) + item.tokens > self.batch_tokens:
                yield batch
                batch = []
            batch.append(item)
        if batch:
            yield batch

    def observation(
        self,
        record: Record,
        metric: str,
        numerator: float,
        denominator: float,
        *,
        cluster: str,
        x: float | None = None,
        y: float | None = None,
    ) -> Observation:
        """An observation that takes subject, seed and item from the record."""
        return Observation(record.subject, record.seed, record.item, cluster, metric, x, numerator, denominator, y)


def shown(data: ProbeData, tokens: NDArray[Any], limit: int = 300) -> str:
    """Token ids as text on one line, shortened in the middle."""
    text = " ".join(data.tokenizer.decode(np.asarray(tokens)).split())
    return text if len(text) <= limit else f"{text[: limit // 2]} … {text[-limit // 2 :]}"


def credit(scores: NDArray[np.float64], right: int) -> float:
    """1 where the right one of several answers alone has the lowest score, 1/k where k share it, else 0.

    An argmin would give the point to the first of them, and to a NaN.

    Args:
        scores: of each answer, the lower the likelier, e.g. nats.
        right: which one is right.

    Raises:
        UnusableAnswer: a score that is not finite.
    """
    if not np.isfinite(scores).all():
        raise UnusableAnswer(f"scores {scores.tolist()}", "finite numbers", "the subject's answer is not usable")
    best = float(scores.min())
    tied = scores <= best + SAME_SCORE * max(1.0, abs(best))
    return 1.0 / int(tied.sum()) if tied[right] else 0.0


def failure_of(written: Generation) -> dict[str, str]:
    """Why there is no answer, for a record; empty where there is one."""
    if not written.failure:
        return {}
    return {"failure": written.failure, "detail": written.detail[:200]}


# --- registry ---------------------------------------------------------------------------------------------------------

_PROBES: Registry[Probe] = Registry("probe", package="longspan.probes")
register = _PROBES.register
registered = _PROBES.all


def make_probe(name: str, settings: Any = None) -> Probe:
    """A probe from a study.

    Args:
        name: what the study calls it; also its kind, unless the settings hold another `kind`.
        settings: of the probe, a mapping or None.

    Raises:
        UserError: an unknown kind or setting, with the nearest one.
    """
    if settings is not None and not isinstance(settings, Mapping):
        problem = f"probes.{name} = {shown_value(settings)}"
        raise UserError(problem, "a mapping of settings", f"write `{name}: {{setting: value}}`")
    kind = str((settings or {}).get("kind", name))
    return _PROBES.find(kind).parse({**(settings or {}), "kind": kind}, f"probes.{name}")


def reader(protocol: Mapping[str, Any], **reading: Any) -> Probe:
    """The probe that reads records of a protocol, without its items.

    Args:
        protocol: of a record.
        reading: settings that change how answers are read, e.g. `scorer="robust"`.

    Raises:
        UserError: the kind is unknown here, or has no such setting.
    """
    kind = str(protocol.get("kind", ""))
    kinds = registered()
    if kind not in kinds:
        fix = "load the file that registers it, or leave those records out"
        raise UserError(f"records of the probe {kind!r}", ", ".join(sorted(kinds)), fix)
    known = {name: value for name, value in protocol.items() if name in kinds[kind].model_fields}
    return kinds[kind].parse({**known, **reading, "kind": kind}, kind)
