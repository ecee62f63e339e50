"""Efficiency: what a request costs at growing context, alone on this machine."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
from pydantic import Field, PositiveInt
from torch.cuda import OutOfMemoryError, empty_cache

from longspan.engines.base import Engine, Generation, LargestBatch, Sampling
from longspan.foundation.errors import UserError, first_line
from longspan.foundation.randomness import numpy_generator
from longspan.probes.base import Answer, Asked, Item, Probe, ProbeData, register
from longspan.records.observation import Metric, Observation
from longspan.records.store import Record

MOST_CACHED = 0.05
"""Share of a fresh prompt that a server may have met before (what every prompt begins with)."""
FEWEST_CONTEXTS = 3
"""Two points are on a line whatever disturbed them: transformers' Mamba-2, slowed down at its first context, was
−3.6 ms for 1,000 tokens more."""
TRIED, TRIED_TOKENS = 8, 4
"""The first context is tried at this part of it, with so many new tokens."""


@register("efficiency")
class Efficiency(Probe):
    """One request at a time: a fresh prompt of exactly so many tokens of the corpus, then tokens one by one.

    Time to first token is from sending the prompt to the first token; prefill rate is prompt tokens over that time;
    time per output token leaves out the first. Medians with quartiles over `repeats`, after `warm_ups` that are not
    counted. Time per output token is also fitted as `fixed` + `growth` × context over all contexts: what the weights
    cost, and what each token of context adds; no line is drawn through fewer than `FEWEST_CONTEXTS`. Records also hold
    the state bytes of a sequence, by the configuration and as measured.

    A run does not count where the engine cannot time it (a server that sends its answer at once), where it failed, or
    where the server had more than `MOST_CACHED` of the prompt in its cache. A context beyond the subject's limit, one
    after another for which the device's memory was too small, and one that is predicted to take too long are not
    evaluable. The record says so, and why.

    Attributes:
        contexts: prompt lengths; None: 1/2, 1, 2, 4 and 8 times the training context.
        new_tokens: tokens generated, at least 2.
        repeats: counted runs at each context.
        warm_ups: runs before them.
        once_above: a first run at a context that takes more seconds than this is repeated once, and the second alone
            counts: what takes long needs few repeats, and the first may have compiled kernels.
        longest: a context is not evaluable where one run of it is predicted to take more seconds than this, by the
            context before, and for the first by a trial at an eighth of it. Reading takes as many times longer as there
            is more to read, which is the least it can be; a further token takes as long, unless it reads all again.
        largest_batch: also find how many sequences fit at a time, at every context or at those named, where the engine
            can: native and transformers on CUDA, by trying; vLLM, by the room in its cache.
    """

    title: ClassVar[str] = "Cost against context"
    explanation: ClassVar[str] = (
        "What one request costs at growing context: prefill rate, time to the first token, time per further token. "
        "Medians with quartiles over repeats on this machine."
    )
    requires: ClassVar[frozenset[str]] = frozenset({"generate"})
    place: ClassVar[Literal["quality", "cost"]] = "cost"

    contexts: tuple[PositiveInt, ...] | None = Field(None, min_length=1)
    new_tokens: int = Field(32, ge=2)
    repeats: int = Field(5, ge=3)
    warm_ups: int = Field(2, ge=0)
    once_above: float | None = Field(None, gt=0)
    longest: float | None = Field(None, gt=0)
    largest_batch: bool | Annotated[tuple[PositiveInt, ...], Field(min_length=1)] = False

    @property
    def metrics(self) -> tuple[Metric, ...]:
        """In order of importance."""
        return (
            _by_context("prefill_rate", "Prefill", "tok/s", "higher"),
            _by_context("first_token", "Time to first token", "ms", crossing=True),
            _by_context("output_token", "Time per output token", "ms", crossing=True),
            _number("fixed", "Time per output token without context", "ms"),
            _number("growth", "Time per output token that 1,000 tokens add", "ms"),
            _by_context("bandwidth", "Weights and state read", "GB/s", "higher"),
            _by_context("copy_share", "The same of the copy rate", "%", "higher"),
            _by_context("peak_memory", "Peak memory", "GiB", crossing=True),
            replace(_by_context("held", "Weights and state, computed", "GiB"), kind="exact"),
            *self._batch_metrics(),
        )

    def _batch_metrics(self) -> tuple[Metric, ...]:
        if not self.largest_batch:
            return ()
        return (
            _by_context("largest_batch", "Largest batch", "sequences", "higher"),
            _by_context("batch_rate", "Decoding at the largest batch", "tok/s", "higher", crossing=True),
        )

    def items(self, data: ProbeData) -> list[Item]:
        """One item per context."""
        contexts = self.contexts
        if contexts is None:
            contexts = tuple(sorted({max(2, data.context * k // 2) for k in (1, 2, 4, 8, 16)}))
        if data.shards.num_tokens == 0:
            raise UserError("the test split is empty", "some text for prompts", "give it a larger share")
        return [Item(f"context-{n}", 0, n * (self.repeats + self.warm_ups), {"context": n}) for n in contexts]

    def batches(self, items: Sequence[Item]) -> Iterator[list[Item]]:
        """One context at a time."""
        return iter([[item] for item in items])

    def ask(self, engine: Engine, items: Sequence[Item], data: ProbeData) -> Iterator[list[Answer]]:
        """See `Probe.ask`; what a context cost says whether the next is asked."""
        self.check(engine)
        before = None
        for item in items:
            began = time.perf_counter()
            before = self._measured(engine, item.details["context"], data, before)
            yield [Answer(item.id, before, time.perf_counter() - began)]

    def answer(self, engine: Engine, items: Sequence[Item], data: ProbeData) -> list[dict[str, Any]]:
        """Seconds of each run, and state bytes; no runs where the context is not evaluable."""
        return [answer.content for answers in self.ask(engine, items, data) for answer in answers]

    def _measured(
        self, engine: Engine, context: int, data: ProbeData, before: Mapping[str, Any] | None
    ) -> dict[str, Any]:
        content: dict[str, Any] = {"context": context, "new_tokens": self.new_tokens, "runs": []}
        copy_rate = _copy_rate(engine)
        try:
            if reason := self._not_evaluable(engine, context, data, before):
                return {**content, "not_evaluable": reason}
            if reason := self._run(engine, context, data, content):
                return {**content, "not_counted": reason}
        except OutOfMemoryError as error:
            reason = f"out of memory at {context:,} tokens: {first_line(error)}"
            content = {**content, "runs": [], "not_evaluable": reason}
        if "not_evaluable" in content:
            # Only here, where no frame of the failed call holds its tensors any more.
            empty_cache()
            return content
        if (peak := engine.peak_bytes()) is not None:
            content["peak_bytes"] = peak
        content["state_bytes"] = engine.state_bytes(context)
        content["weight_bytes"] = engine.weight_bytes
        content["copy_rate"] = copy_rate
        sought = self.largest_batch if isinstance(self.largest_batch, bool) else context in self.largest_batch
        if sought and (batch := _largest_batch(engine, context)) is not None:
            content["batch"] = [batch.sequences, batch.tokens_per_second]
        return content

    def _not_evaluable(self, engine: Engine, context: int, data: ProbeData, before: Mapping[str, Any] | None) -> str:
        """Why a context is not asked, by the subject's limit and by what a shorter one cost."""
        limit = engine.context_limit
        if limit is not None and context + self.new_tokens - 1 > limit:
            return f"the subject takes {limit:,} tokens"
        if before is not None and context <= before["context"]:
            return ""
        if before is not None and (reason := before.get("not_evaluable", "")).startswith(
            ("out of memory", "predicted")
        ):
            return str(reason)
        if self.longest is None:
            return ""
        return self._too_long(engine, context, before or self._trial(engine, context // TRIED, data))

    def _too_long(self, engine: Engine, context: int, before: Mapping[str, Any]) -> str:
        """Why a run is predicted to take too long, by what a shorter context cost."""
        assert self.longest is not None
        runs = list(_runs(before))
        if not runs:
            return ""
        first, decode, further = runs[-1]
        longer, step = context / before["context"], decode / max(1, further)
        predicted = longer * first + (self.new_tokens - 1) * step * (longer if engine.rereads else 1)
        if predicted <= self.longest:
            return ""
        return (
            f"predicted to take {predicted:.0f} s and more, {self.longest:.0f} allowed: {before['context']:,} tokens "
            f"took {first:.1f} s, and {further} further tokens {decode:.1f} s"
        )

    def _trial(self, engine: Engine, context: int, data: ProbeData) -> dict[str, Any]:
        """A few tokens after a short prompt; the second of two runs, since the first may compile kernels."""
        content: dict[str, Any] = {"context": context, "new_tokens": TRIED_TOKENS, "runs": []}
        sampling = Sampling(max_new_tokens=TRIED_TOKENS, stop_at_boundary=False)
        for run in range(2 if context else 0):
            # Prompts of its own: a server that had met those of this context would not count it later.
            written = engine.timed(self._prompt(data, context, self.warm_ups + self.repeats + run), sampling)
            if _not_counted(written, context):
                break
            content["runs"] = [[written.first_token_seconds, written.decode_seconds, len(written.tokens) - 1]]
        return content

    def _run(self, engine: Engine, context: int, data: ProbeData, content: dict[str, Any]) -> str:
        """All runs at a context, into `content`; why they do not count, empty where they do."""
        sampling = Sampling(max_new_tokens=self.new_tokens, stop_at_boundary=False)
        long = False
        for run in range(self.warm_ups + self.repeats):
            engine.forget_peak()
            began = time.perf_counter()
            written = engine.timed(self._prompt(data, context, run), sampling)
            if reason := _not_counted(written, context):
                return reason
            if run == 0 and self.once_above is not None:
                long = time.perf_counter() - began > self.once_above
            content["state_bytes_measured"] = written.state_bytes
            if run == 1 if long else run >= self.warm_ups:
                further = len(written.tokens) - 1
                content["runs"].append([written.first_token_seconds, written.decode_seconds, further])
            if long and run == 1:
                break
        return ""

    def observe(self, record: Record) -> Iterable[Observation]:
        """Each run is an observation of its own."""
        answer = record.answer
        context, x = answer["context"], float(answer["context"])
        read = (answer.get("weight_bytes") or 0) + (answer.get("state_bytes") or 0)
        for run, (first, decode, further) in enumerate(_runs(answer)):
            item = f"{record.item}:{run}"
            values = [("prefill_rate", context, first), ("first_token", 1e3 * first, 1.0)]
            if further > 0:
                values.append(("output_token", 1e3 * decode, further))
            if further > 0 and answer.get("weight_bytes") and answer.get("state_bytes") is not None:
                values.append(("bandwidth", read * further / 1e9, decode))
                if answer.get("copy_rate"):
                    values.append(("copy_share", 100 * read * further / answer["copy_rate"], decode))
            for metric, numerator, denominator in values:
                if denominator > 0:
                    yield Observation(record.subject, record.seed, item, item, metric, x, numerator, denominator)
        if answer.get("peak_bytes") is not None:
            yield self.observation(record, "peak_memory", answer["peak_bytes"] / 2**30, 1.0, cluster=record.item, x=x)
        if answer.get("weight_bytes") and answer.get("state_bytes") is not None:
            yield self.observation(record, "held", read / 2**30, 1.0, cluster=record.item, x=x)
        if self.largest_batch and "batch" in answer:
            sequences, rate = answer["batch"]
            for metric, value in (("largest_batch", sequences), ("batch_rate", rate)):
                if value is not None:
                    yield self.observation(record, metric, float(value), 1.0, cluster=record.item, x=x)

    def observe_together(self, records: Sequence[Record]) -> Iterable[Observation]:
        """Time per output token as a line over the contexts, one for each repeat."""
        measured: dict[int, list[tuple[float, float]]] = {}
        for record in records:
            for run, (_, decode, further) in enumerate(_runs(record.answer)):
                if further > 0:
                    measured.setdefault(run, []).append((float(record.answer["context"]), 1e3 * decode / further))
        for run, points in measured.items():
            contexts, times = (np.array(values) for values in zip(*points, strict=True))
            if len(set(contexts.tolist())) < FEWEST_CONTEXTS:
                continue
            # Relative errors are alike at all contexts, so the short ones count as much as the long ones.
            growth, fixed = np.polyfit(contexts, times, 1, w=1 / times)
            item = f"fit:{run}"
            for metric, value in (("fixed", fixed), ("growth", 1e3 * growth)):
                first = records[0]
                yield Observation(first.subject, first.seed, item, item, metric, None, float(value), 1.0)

    def describe(self, item: Item, data: ProbeData) -> Asked:
        """The size of the request."""
        del data
        return Asked(f"a prompt of {item.details['context']} tokens, then {self.new_tokens} tokens one by one")

    def _prompt(self, data: ProbeData, context: int, run: int) -> np.ndarray:
        """Documents in another order for every run, the first from somewhere inside, so that no cache has met them.

        Repeated where the split is shorter than the prompt.
        """
        generator = numpy_generator(data.seed, "efficiency", context, run)
        order = generator.permutation(data.shards.num_documents)
        first = data.shards.document(int(order[0]))
        parts: list[np.ndarray] = [first[int(generator.integers(len(first))) :]] if len(first) else []
        total = sum(map(len, parts))
        while total < context:
            for document in order.tolist():
                parts.append(data.shards.document(document))
                total += len(parts[-1])
                if total >= context:
                    break
        return np.concatenate(parts)[:context]


def _by_context(
    name: str, title: str, unit: str, better: Literal["lower", "higher"] = "lower", *, crossing: bool = False
) -> Metric:
    return replace(_number(name, title, unit), better=better, x_name="context", crossing=crossing)


def _number(name: str, title: str, unit: str) -> Metric:
    return Metric(name, title, unit, "median", "lower", compare=False, counted="runs")


def _runs(answer: Mapping[str, Any]) -> Iterator[tuple[float, float, int]]:
    """(seconds to the first token, seconds of the others, how many others) of each run."""
    for run in answer["runs"]:
        yield run[0], run[1], run[2] if len(run) > 2 else answer["new_tokens"] - 1


def _copy_rate(engine: Engine) -> float | None:
    """None as well where the model leaves no room for the copy."""
    try:
        return engine.copy_rate()
    except OutOfMemoryError:
        return None


def _largest_batch(engine: Engine, context: int) -> LargestBatch | None:
    """None as well where the memory is too small to find it out."""
    try:
        return engine.largest_batch(context)
    except OutOfMemoryError:
        return None


def _not_counted(written: Generation, context: int) -> str:
    """Why a run says nothing about cost; empty where it does."""
    if written.failure:
        return f"{written.failure}: {written.detail}"
    if not written.timed:
        return "the server sends its whole answer at once, so no token's time is known"
    if written.cached_tokens is not None and written.cached_tokens > MOST_CACHED * context:
        return f"the server had {written.cached_tokens} of {context} tokens of the prompt in its cache"
    return ""
