"""Questions that tables, charts and the decision all ask of a probe's summary: who leads, who ties, by how much."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from longspan.records.observation import Comparison, Measurement, Metric
from longspan.records.ties import ranked_groups
from longspan.report.data import ProbeSection, ReportInput
from longspan.report.numbers import finite


@dataclass(frozen=True)
class Finding:
    """One metric of one probe, at one x where the metric has an x axis."""

    section: ProbeSection
    metric: Metric
    x: float | None


def points(section: ProbeSection, metric: str) -> list[Measurement]:
    """The measurements of one metric that have a value, by subject and x; cells of a table are left out."""
    found = [m for m in section.summary.measurements if m.metric == metric and m.y is None and finite(m.value)]
    return sorted(found, key=lambda m: -math.inf if m.x is None else m.x)


def cells(section: ProbeSection, metric: str) -> list[Measurement]:
    """The measurements of one metric in the cells of its table x × y, by x and y."""
    found = [m for m in section.summary.measurements if m.metric == metric and m.y is not None and finite(m.value)]
    return sorted(found, key=lambda m: (m.x or 0.0, m.y or 0.0))


def floor(section: ProbeSection, metric: Metric) -> dict[str, Measurement]:
    """Subject -> what it scores without what the metric tests; empty where that was not asked."""
    return {m.subject: m for m in points(section, metric.floor) if m.x is None} if metric.floor else {}


def measured(finding: Finding) -> dict[str, Measurement]:
    """Subject -> measurement."""
    return {m.subject: m for m in points(finding.section, finding.metric.name) if m.x == finding.x}


def pairs(section: ProbeSection, metric: str) -> list[Comparison]:
    """Comparisons between subjects (main effects of factors left out)."""
    return [c for c in section.summary.comparisons if c.metric == metric and not is_effect(c) and finite(c.difference)]


def effects(section: ProbeSection, metric: str) -> list[Comparison]:
    """Main effects of factors: comparisons between `factor=level` and `factor=level`."""
    return [c for c in section.summary.comparisons if c.metric == metric and is_effect(c) and finite(c.difference)]


def is_effect(comparison: Comparison) -> bool:
    """Whether a comparison is between two levels of one factor rather than between two subjects."""
    name_a, mark_a, _ = comparison.a.partition("=")
    name_b, mark_b, _ = comparison.b.partition("=")
    return bool(mark_a and mark_b and name_a == name_b)


def turned(comparison: Comparison) -> Comparison:
    """The same comparison with `a` and `b` exchanged."""
    return replace(
        comparison,
        a=comparison.b,
        b=comparison.a,
        difference=-comparison.difference,
        low=None if comparison.high is None else -comparison.high,
        high=None if comparison.low is None else -comparison.low,
    )


def between(finding: Finding, a: str, b: str) -> Comparison | None:
    """The comparison a - b, whichever way round it is stored."""
    for comparison in pairs(finding.section, finding.metric.name):
        if comparison.x != finding.x:
            continue
        if (comparison.a, comparison.b) == (a, b):
            return comparison
        if (comparison.a, comparison.b) == (b, a):
            return turned(comparison)
    return None


def decided(comparison: Comparison | None) -> bool:
    """Whether a difference is beyond doubt at 5 % after Holm's adjustment."""
    return comparison is not None and comparison.decided


def order(metric: Metric, measurements: Iterable[Measurement]) -> list[Measurement]:
    """Best first; equal values by name, so that the order never depends on the input's."""
    sign = 1 if metric.better == "lower" else -1
    return sorted(measurements, key=lambda m: (sign * m.value, m.subject))


def tie_groups(finding: Finding) -> list[list[str]]:
    """Subjects in groups, best group first: a group is its best subject and all that cannot be told from it."""
    ranked = [m.subject for m in order(finding.metric, measured(finding).values())]
    found = [c for c in pairs(finding.section, finding.metric.name) if c.x == finding.x and c.decided]
    decided_pairs = {frozenset((c.a, c.b)) for c in found}
    return ranked_groups(ranked, lambda a, b: frozenset((a, b)) in decided_pairs)


def leads(finding: Finding, group: list[str]) -> bool:
    """Whether no two of a group differ and each of them differs from every subject outside it."""
    outside = [subject for subject in measured(finding) if subject not in group]
    told_apart = [decided(between(finding, a, b)) for i, a in enumerate(group) for b in group[i + 1 :]]
    return not any(told_apart) and all(decided(between(finding, a, b)) for a in group for b in outside)


def main_finding(section: ProbeSection) -> Finding | None:
    """The section's first metric that has values: as a whole, else at its largest x."""
    for metric in section.metrics:
        found = points(section, metric.name)
        if found:
            xs = [m.x for m in found]
            if None in xs:
                return Finding(section, metric, None)
            return Finding(section, metric, max(x for x in xs if x is not None))
    return None


def primary_finding(report: ReportInput) -> Finding | None:
    """What the answer rests on: the study's primary metric, else the first metric of quality that has values."""
    kind, _, name = report.primary.partition(".")
    quality = [section for section in report.probes if section.place == "quality"]
    for section in sorted(quality, key=lambda s: s.kind != kind):
        metrics = sorted(section.metrics, key=lambda m: m.name != name)
        finding = main_finding(replace(section, metrics=tuple(metrics)))
        if finding:
            return Finding(section, finding.metric, finding.x)
    return None


def tie_letters(finding: Finding) -> dict[str, str]:
    """Subject -> letters of its tie groups (`a`, `ab`): subjects that share a letter cannot be told apart."""
    letters: dict[str, str] = {}
    for ties in finding.section.summary.ties:
        if ties.metric == finding.metric.name and ties.x == finding.x:
            for index, group in enumerate(ties.groups):
                for subject in group:
                    letters[subject] = letters.get(subject, "") + _letter(index)
    return letters


def _letter(index: int) -> str:
    return chr(ord("a") + index) if index < 26 else f"({index + 1})"


@dataclass(frozen=True)
class Crossover:
    """Where `a` falls below `b` along x; between the measured `low` and `high` that is open (None: exact curves)."""

    a: str
    b: str
    x: float
    y: float
    low: float | None = None
    high: float | None = None


def crossovers(curves: Mapping[str, Sequence[tuple[float, float, float, float]]]) -> list[Crossover]:
    """Crossings of cost curves, interpolated linearly in log-log.

    Where intervals overlap at the measured points around a crossing, several may lie in one stretch of doubt; then only
    whether the order changes over the stretch counts.

    Args:
        curves: subject -> points (x, value, low, high) with rising x > 0 and value > 0; low = high = value if exact.
    """
    found = []
    names = list(curves)
    for i, first in enumerate(names):
        for second in names[i + 1 :]:
            by_x = {p[0]: p for p in curves[second]}
            shared = [(p, by_x[p[0]]) for p in curves[first] if p[0] in by_x and p[1] > 0 and by_x[p[0]][1] > 0]
            # Where two are equal the order does not change; it changes between the points around.
            shared = [(p, q) for p, q in shared if p[1] != q[1]]
            stretches: dict[tuple[float | None, float | None], list[Crossover]] = {}
            for at, ((p0, q0), (p1, q1)) in enumerate(pairwise(shared)):
                gap0, gap1 = math.log(p0[1] / q0[1]), math.log(p1[1] / q1[1])
                if gap0 * gap1 > 0:
                    continue
                share = gap0 / (gap0 - gap1)
                x = p0[0] * (p1[0] / p0[0]) ** share
                y = p0[1] * (p1[1] / p0[1]) ** share
                cheaper, dearer = (first, second) if gap1 < 0 else (second, first)
                low, high = _doubt(shared, at)
                key = (x, x) if low is None else (low, high)
                stretches.setdefault(key, []).append(Crossover(cheaper, dearer, x, y, low, high))
            found += [crossings[len(crossings) // 2] for crossings in stretches.values() if len(crossings) % 2]
    return found


def _doubt(
    shared: Sequence[tuple[tuple[float, float, float, float], tuple[float, float, float, float]]], at: int
) -> tuple[float | None, float | None]:
    """The measured x around a crossing behind `at` between which the order is open; None, None for exact curves."""
    if all(p[2] == p[3] and q[2] == q[3] for p, q in shared):
        return None, None
    apart = [p[0] for p, q in shared if p[2] > q[3] or q[2] > p[3]]
    here = shared[at][0][0]
    below, above = [x for x in apart if x <= here], [x for x in apart if x > here]
    return max(below, default=shared[0][0][0]), min(above, default=shared[-1][0][0])
