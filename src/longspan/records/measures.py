"""The words of a result: metric, observation, measurement, comparison, ties, summary. Plain data, JSON-able."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

Kind = Literal["ratio", "proportion", "difference", "median", "exact", "derived"]


@dataclass(frozen=True, slots=True)
class Metric:
    """What a probe measures and how its observations sum up.

    Attributes:
        name: unique within the probe, e.g. `bits_per_byte`.
        title: for people, e.g. `Bits per byte`.
        unit: of the value after `transform`, e.g. `bits/byte`, empty for shares.
        kind: how observations become a number.
            `ratio`: sum of numerators / sum of denominators, interval by cluster bootstrap.
            `proportion`: the same for right answers among trials, interval by Wilson on the effective sample size.
            `difference`: a ratio that is a difference of two proportions on the same items, within [-1, 1].
            `median`: median of numerator/denominator over repeats; low and high are the quartiles.
            `exact`: computed, not sampled; low and high equal the value.
            `derived`: no item has it; the probe reads it off the other metrics (`Probe.derive`) or off all records of a
            training run (`Probe.derive_of_runs`), interval included.
        better: which direction is better.
        x_name: what `Observation.x` is (`position`, `context`), None for a single number.
        chance: what guessing scores, None where that has no meaning.
        transform: `exp` shows exp(ratio), e.g. perplexity from NLL per token; its interval is transformed too.
        compare: False where a comparison would repeat another metric's or has no sampling error.
        y_name: what `Observation.y` is (`depth`): the second axis of a table x × y, None where there is none. Every
            cell of the table is measured beside the whole of each x; subjects are compared at each x, never in a cell.
        y_unit: `%` where y is a share, else empty.
        floor: name of the probe's single-number metric that says what the same subject scores without what is tested,
            empty where nothing of the kind is asked.
        bound: name of the probe's single-number metric that limits this one, empty where none does: the report draws
            one against the other.
        ceiling: name of the probe's metric over the same x that no subject can exceed, whoever it is: a line in this
            one's figure, empty where nothing of the kind is known.
        counted: what its clusters are: documents, or the strings of a task.
        detail: True where the report shows it in a table beside the others and gives it no figure of its own.
        mark: an x that its figure reaches and marks, in place of what the probe marks; `mark_name` says what it is.
        crossing: True where the report tells from which x on which of two subjects is better.
        sparse: of a detail: left out of that table where it is 0 for everybody.
    """

    name: str
    title: str
    unit: str
    kind: Kind
    better: Literal["lower", "higher"]
    x_name: str | None = None
    chance: float | None = None
    transform: Literal["identity", "exp"] = "identity"
    compare: bool = True
    y_name: str | None = None
    y_unit: Literal["", "%"] = ""
    floor: str = ""
    bound: str = ""
    ceiling: str = ""
    detail: bool = False
    sparse: bool = False
    counted: str = "documents"
    mark: float | None = None
    mark_name: str = ""
    crossing: bool = False

    @property
    def is_share(self) -> bool:
        """Whether its values are shares or differences of shares, which are shown in per cent and points."""
        return self.kind in ("proportion", "difference")

    def shown(self, value: float) -> float:
        """The value in the metric's unit."""
        return math.exp(min(value, 700.0)) if self.transform == "exp" else value


@dataclass(frozen=True, slots=True)
class Observation:
    """One item's share in one metric.

    Attributes:
        subject: label of the arm.
        seed: training seed of the subject.
        item: name of the item; comparisons are made on items that both sides have.
        cluster: unit of resampling, usually the document's id.
        metric: name of the metric.
        x: position or context, None for a single number.
        numerator: e.g. NLL in nats, or 1.0 for a right answer.
        denominator: e.g. tokens, or 1.0 for one trial; > 0.
        y: second axis, e.g. the depth of a needle as a share; None where the metric has none.
    """

    subject: str
    seed: int
    item: str
    cluster: str
    metric: str
    x: float | None
    numerator: float
    denominator: float
    y: float | None = None


@dataclass(frozen=True, slots=True)
class Measurement:
    """A number with its 95 % interval (quartiles for `median`).

    Attributes:
        value: mean over seeds, in the metric's unit.
        low: None where no honest interval exists; `note` says why.
        high: as `low`.
        n: clusters (documents, or repeats for `median`).
        seeds: training seeds; with one seed the interval holds the sampling of documents only.
        items: items per seed.
        y: of a cell of the table x × y; None for all of an x together.
        beyond: True where it lies beyond what was asked, and the value says only how far that went.
    """

    metric: str
    subject: str
    x: float | None
    value: float
    low: float | None
    high: float | None
    n: int
    seeds: int
    items: int
    note: str = ""
    y: float | None = None
    beyond: bool = False


@dataclass(frozen=True, slots=True)
class Comparison:
    """A paired difference a - b on the items both have, at one x.

    Attributes:
        difference: in the metric's unit before `transform`.
        low: of the 95 % interval (not adjusted), None where there are too few documents; `note` says so.
        high: as `low`.
        p: two-sided, None where there are too few documents.
        p_holm: adjusted over all comparisons of the metric.
        mde: smallest true difference that this sample would find with 80 % power at 5 % (not adjusted).
        n: clusters in common.
        seeds: the smaller number of seeds of both sides.
        needed: clusters that would make a true difference of this size detectable, None where meaningless.
        method: the test behind `p`.
    """

    metric: str
    x: float | None
    a: str
    b: str
    difference: float
    low: float | None
    high: float | None
    p: float | None
    p_holm: float | None
    mde: float | None
    n: int
    seeds: int
    needed: int | None
    method: str
    note: str = ""

    @property
    def decided(self) -> bool:
        """True where the difference holds after Holm at 5 %."""
        return self.p_holm is not None and self.p_holm < 0.05


@dataclass(frozen=True, slots=True)
class Ties:
    """Subjects of one metric at one x, best first, in groups that the data cannot tell apart.

    Two subjects share a group exactly where they cannot be told apart (`tie_groups`), so groups overlap where a ties
    with b and b with c, but a beats c. Show groups instead of ranks.
    """

    metric: str
    x: float | None
    groups: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Summary:
    """All that a probe's observations say; JSON through `to_json`."""

    measurements: tuple[Measurement, ...]
    comparisons: tuple[Comparison, ...]
    ties: tuple[Ties, ...]
    notes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Plain dicts, lists, strings, finite numbers and None."""
        return {
            "measurements": [asdict(m) for m in self.measurements],
            "comparisons": [asdict(c) for c in self.comparisons],
            "ties": [{"metric": t.metric, "x": t.x, "groups": [list(g) for g in t.groups]} for t in self.ties],
            "notes": list(self.notes),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Summary:
        """The inverse of `to_json`."""
        return cls(
            tuple(Measurement(**m) for m in data["measurements"]),
            tuple(Comparison(**c) for c in data["comparisons"]),
            tuple(Ties(t["metric"], t["x"], tuple(tuple(g) for g in t["groups"])) for t in data["ties"]),
            tuple(data["notes"]),
        )
