"""What a report is made of: plain facts that a study stores as JSON beside the report and that rebuild it later.

Everything here is JSON-able: `to_json(ReportInput)` gives plain values (numbers that are not finite become null) and
`from_json` gives the same object back (null becomes NaN where a number is required).
"""

from __future__ import annotations

import math
import types
import typing
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal

from longspan.foundation.errors import DataError
from longspan.foundation.files import read_json, write_json
from longspan.records.observation import Metric, Summary


@dataclass(frozen=True)
class ParameterFacts:
    """Parameters by part. `embedding` includes an untied head; `non_embedding` = `total` - `embedding`."""

    total: int
    embedding: int
    non_embedding: int
    mixers: int
    mlp: int


@dataclass(frozen=True)
class SubjectFacts:
    """One subject (one arm of the study), all its seeds together.

    Attributes:
        label: the name that summaries use for it (`Measurement.subject`).
        letters: the expanded pattern, one letter (or group such as `[AM]`) per layer, e.g. `AMAM`; empty where it is
            not known.
        mixers: the true mixer name of every layer, e.g. `("attention", "mamba2")`, `("[attention+mamba2]",)`.
        kind: where its weights come from.
        factors: what the study varies, e.g. `{"pattern": "MMMM", "isolation": "full"}`; seeds are not a factor.
        training_flops: FLOPs of the whole training run.
        tokens_trained: trained positions.
        tokens_per_second: median training throughput.
        peak_memory_bytes: peak memory of training, and `peak_memory_of` what that number measures.
        state_bytes: context -> bytes of decoding state (KV + recurrent + convolution).
        forward_flops: context -> forward FLOPs per token, causal average.
        match_quantity: the cost that is held equal, e.g. `non_embedding_parameters`; empty where nothing was matched.
        match_target: the cost the free setting was solved for, None where nothing was matched.
        match_residual: (reached - target) / target, e.g. -0.0012.
        best_loss: lowest full-validation loss (nats per token), mean over seeds; `last_loss` the one at the end.
        weights: which weights the probes examined.
        wall_seconds: training time of one seed, mean over seeds.
        notes: anything a reader must know about this subject.
    """

    label: str
    letters: str = ""
    mixers: tuple[str, ...] = ()
    kind: Literal["trained", "checkpoint", "pretrained", "endpoint", "shape"] = "trained"
    factors: dict[str, str] = field(default_factory=dict)
    parameters: ParameterFacts | None = None
    training_flops: float | None = None
    tokens_trained: int | None = None
    tokens_per_second: float | None = None
    peak_memory_bytes: int | None = None
    peak_memory_of: str = ""
    state_bytes: dict[int, float] = field(default_factory=dict)
    forward_flops: dict[int, float] = field(default_factory=dict)
    match_quantity: str = ""
    match_target: float | None = None
    match_residual: float | None = None
    seeds: tuple[int, ...] = ()
    device: str = ""
    dtype: str = ""
    best_loss: float | None = None
    last_loss: float | None = None
    weights: Literal["best", "last"] = "best"
    wall_seconds: float | None = None
    notes: str = ""


@dataclass(frozen=True)
class ProbeSection:
    """What one probe found.

    Attributes:
        kind: the name that the study gave the probe; without one its kind, e.g. `perplexity`.
        title: a short heading; `explanation` says in one or two sentences what was asked and how to read it.
        metrics: in order of importance; the first is the probe's own primary metric.
        summary: measurements and paired comparisons. A comparison whose `a` and `b` are `factor=level` (e.g.
            `isolation=full` and `isolation=none`) is shown as a main effect of that factor.
        x_scale: scale of the x axis of the metrics that have one.
        place: with the quality of the subjects or with their cost (prefill, decode).
        empty_because: why there is nothing to show, where there is nothing.
        mark: an x worth marking, e.g. the longest string in training, and `mark_name` what it is; None: the training
            context, on axes of tokens.
        asked_context: tokens that its longest item takes; None where they do not say.
        remarks: lines to be read with the numbers, e.g. one that is made of several of them.
    """

    kind: str
    title: str
    explanation: str
    metrics: tuple[Metric, ...]
    summary: Summary
    x_scale: Literal["log", "linear"] = "log"
    place: Literal["quality", "cost"] = "quality"
    empty_because: str = ""
    mark: float | None = None
    mark_name: str = ""
    asked_context: int | None = None
    remarks: tuple[str, ...] = ()


@dataclass(frozen=True)
class TrainingCurve:
    """The metrics file of one training run.

    Attributes:
        rows: the `train` lines: step, tokens, loss, lr, grad_norm, tokens_per_second, seconds.
        validation: the `validation` lines: step, tokens, loss, perplexity, bits_per_byte, num_targets, seconds; of a
            task also samples, string_accuracy, token_accuracy, num_strings.
        best_step: the step of the best weights, None where unknown.
        mastery: string accuracy that was to end the training; None where nothing of the kind was asked for.
    """

    subject: str
    seed: int
    rows: list[dict[str, float | None]] = field(default_factory=list)
    validation: list[dict[str, float | None]] = field(default_factory=list)
    best_step: int | None = None
    mastery: float | None = None


@dataclass(frozen=True)
class LedgerEntry:
    """One thing that was dropped, truncated, deduplicated, skipped, resumed or warned about.

    Attributes:
        topic: what it belongs to, e.g. `corpus`, `packing AAAA`, `training`, `oracle`.
        table: rows of equal keys, shown under the text.
    """

    level: Literal["info", "warning"]
    topic: str
    text: str
    table: list[dict[str, str | int | float | None]] = field(default_factory=list)


@dataclass(frozen=True)
class Reproduce:
    """How to get the same numbers again. `study_yaml` is the resolved study as text."""

    command: str
    study_yaml: str
    versions: dict[str, str] = field(default_factory=dict)
    hardware: dict[str, str] = field(default_factory=dict)
    git: dict[str, str] = field(default_factory=dict)
    hashes: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class ItemAnswer:
    """What one subject answered to one item.

    Attributes:
        text: the answer as text (model text; it is escaped on the page).
        score: what it scored, None where it was not scored; `scored` says how, e.g. `exact match`, `bits per byte`.
        null: why there is no answer, e.g. `context limit`, empty where there is one.
    """

    subject: str
    seed: int
    text: str
    score: float | None
    scored: str = ""
    null: str = ""


@dataclass(frozen=True)
class ItemRow:
    """One item of a probe with every subject's answer, for "look inside".

    Attributes:
        x: context of the item in tokens, None where it has several or none.
        asked: what was asked, shortened by the probe; `expected` the right answer, empty where there is none.
        correct: True where a score of 1 means right and 0 wrong (shown as a tick or a cross).
    """

    probe: str
    item: str
    asked: str
    answers: list[ItemAnswer]
    x: float | None = None
    expected: str = ""
    correct: bool = False


@dataclass(frozen=True)
class ReportInput:
    """All that a report shows.

    Attributes:
        study: name of the study; `variant` of its variant, empty for the default.
        created: time of the results (ISO 8601, UTC); the page takes its date from here, so it is deterministic.
        context: training context in tokens, marked in the charts; None where nothing was trained.
        tokenizer: name of the tokenizer; perplexities and losses per token are only comparable under the same one.
        primary: `probe.metric` that decides.
        notes: remarks shown under the answer.
    """

    study: str
    question: str
    created: str
    subjects: list[SubjectFacts]
    probes: list[ProbeSection]
    reproduce: Reproduce
    variant: str = ""
    primary: str = "perplexity.bits_per_byte"
    context: int | None = None
    tokenizer: str = ""
    training: list[TrainingCurve] = field(default_factory=list)
    ledger: list[LedgerEntry] = field(default_factory=list)
    items: list[ItemRow] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def to_json(value: Any) -> Any:
    """Plain JSON values of a report's dataclass; numbers that are not finite become None."""
    if is_dataclass(value) and not isinstance(value, type):
        return {f.name: to_json(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, dict):
        return {str(key): to_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [to_json(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value


def from_json(data: Any) -> ReportInput:
    """The `ReportInput` that `to_json` wrote.

    Raises:
        DataError: a part is missing or has another shape.
    """
    try:
        report: ReportInput = _build(ReportInput, data)
    except (TypeError, KeyError, ValueError, AttributeError) as error:
        raise DataError(
            f"the stored facts of this report cannot be read ({error})",
            "report.json as Longspan wrote it",
            "run the study again: it rebuilds the facts from the records",
        ) from error
    return report


def save(report: ReportInput, path: Path) -> None:
    """Write the facts as readable JSON, atomically."""
    write_json(path, to_json(report))


def load(path: Path) -> ReportInput:
    """Read what `save` wrote."""
    return from_json(read_json(path))


def _build(hint: Any, data: Any) -> Any:
    """`data` (plain JSON) as the annotated type `hint`."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        if data not in arguments:
            raise ValueError(f"{data!r} is not one of {', '.join(map(repr, arguments))}")
        return data
    if origin in (typing.Union, types.UnionType):
        return _build_union(arguments, data)
    if origin is dict:
        return {_key(arguments[0], key): _build(arguments[1], item) for key, item in data.items()}
    if origin is tuple:
        item_hint = arguments[0] if arguments[-1] is Ellipsis else None
        item_hints = [item_hint] * len(data) if item_hint is not None else list(arguments)
        return tuple(_build(each, item) for each, item in zip(item_hints, data, strict=True))
    if origin is not None and isinstance(origin, type) and issubclass(origin, Sequence):
        return [_build(arguments[0], item) for item in data]
    if is_dataclass(hint) and isinstance(hint, type):
        hints = typing.get_type_hints(hint)
        unknown = set(data) - {f.name for f in fields(hint)}
        if unknown:
            raise ValueError(f"{hint.__name__} has no {', '.join(sorted(unknown))}")
        return hint(**{f.name: _build(hints[f.name], data[f.name]) for f in fields(hint) if f.name in data})
    if hint is float:
        return math.nan if data is None else float(data)
    return data


def _build_union(arguments: tuple[Any, ...], data: Any) -> Any:
    if data is None:
        return None
    options = [each for each in arguments if each is not types.NoneType]
    return _build(options[0], data) if len(options) == 1 else data


def _key(hint: Any, key: str) -> Any:
    return hint(key) if hint in (int, float) else key
