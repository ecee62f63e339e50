"""From which context on one subject costs less than another: the table of crossover lengths, pair by pair."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any, Literal

from longspan.records.observation import Metric
from longspan.report import findings, numbers
from longspan.report.data import ProbeSection, ReportInput
from longspan.report.tables import Table

Point = tuple[float, float, float, float]
"""Context, value, and the ends of its interval, which are the value where it is exact."""
Curves = Mapping[str, Sequence[Point]]

COMPUTED = (("state_bytes", "decoding state (computed)"), ("forward_flops", "FLOPs per token (computed)"))
EXPLANATION = (
    "From which context on which of two subjects is the better one, interpolated between the contexts measured; in "
    "brackets the range in which their intervals do not tell them apart. “Not crossed” names the one that is better "
    "wherever they can be told apart, with the contexts that both have where these are not all of the measure's."
)
POINTER = " From where on which curve is the better is in the table of crossover lengths."


@dataclass(frozen=True)
class Measure:
    """A cost against context for every subject that has it."""

    title: str
    better: Literal["lower", "higher"]
    curves: Curves

    @property
    def contexts(self) -> tuple[float, float]:
        """The shortest and the longest context at which anybody has it."""
        found = [point[0] for curve in self.curves.values() for point in curve]
        return min(found), max(found)


def computed(report: ReportInput, name: str) -> Curves:
    """`state_bytes` or `forward_flops` of every subject, as exact curves."""
    known: dict[str, dict[int, float]] = {s.label: getattr(s, name) for s in report.subjects}
    found = {s: [(float(c), v, v, v) for c, v in sorted(values.items()) if v > 0] for s, values in known.items()}
    return {subject: curve for subject, curve in found.items() if curve}


def measured(section: ProbeSection, metric: Metric) -> Curves:
    """A metric against its x for every subject."""
    found: dict[str, list[Point]] = {}
    for m in findings.points(section, metric.name):
        if m.x is not None and m.value > 0:
            low, high = (m.value if end is None else end for end in (m.low, m.high))
            found.setdefault(m.subject, []).append((m.x, m.value, low, high))
    return found


def pointer(curves: Curves) -> str:
    """What a chart's caption says of crossings: where they are told, empty where there are none."""
    return POINTER if findings.crossovers(curves) else ""


def crossing_table(report: ReportInput) -> Table | None:
    """Pairs of subjects × measures of cost; None where no two subjects have a cost at two contexts.

    A subject that costs the same as one before it in everything is left out.
    """
    measures = [Measure(title, "lower", computed(report, name)) for name, title in COMPUTED]
    measures += [
        Measure(metric.title[:1].lower() + metric.title[1:], metric.better, measured(section, metric))
        for section in report.probes
        if section.place == "cost"
        for metric in section.metrics
        if metric.crossing
    ]
    subjects = _different([s.label for s in report.subjects], measures)
    rows, records = [], []
    for a, b in combinations(subjects, 2):
        told = [_told(measure, a, b) for measure in measures]
        if any(cell for cell, _ in told):
            rows.append((a, b, *(cell or numbers.MISSING for cell, _ in told)))
            records += [{"a": a, "b": b, **record} for _, found in told for record in found]
    if not rows:
        return None
    columns = ("<a", "<b", *(f"<{measure.title}" for measure in measures))
    return Table(columns, tuple(rows), (), tuple(records)).without_empty()


def _different(labels: Sequence[str], measures: Sequence[Measure]) -> list[str]:
    kept: dict[tuple[tuple[Point, ...], ...], str] = {}
    for label in labels:
        kept.setdefault(tuple(tuple(measure.curves.get(label, ())) for measure in measures), label)
    return list(kept.values())


def _told(measure: Measure, a: str, b: str) -> tuple[str, list[dict[str, Any]]]:
    """The cell of a pair and its records; empty where fewer than two contexts are known of both."""
    pair = {name: measure.curves.get(name, ()) for name in (a, b)}
    other = {point[0]: point for point in pair[b]}
    shared = [(point, other[point[0]]) for point in pair[a] if point[0] in other]
    if len(shared) < 2:
        return "", []
    ends = shared[0][0][0], shared[-1][0][0]
    record = {"measure": measure.title, "first": ends[0], "last": ends[1]}
    if found := findings.crossovers(pair):
        better = [each.a if measure.better == "lower" else each.b for each in found]
        cells = [_from("a" if name == a else "b", each) for name, each in zip(better, found, strict=True)]
        return "; ".join(cells), [
            {**record, "better": name, "from": each.x, "low": each.low, "high": each.high}
            for name, each in zip(better, found, strict=True)
        ]
    nothing = {"from": None, "low": None, "high": None}
    where = "" if ends == measure.contexts else f", {numbers.count(ends[0])} to {numbers.count(ends[1])}"
    if all(p[1] == q[1] for p, q in shared):
        return f"equal{where}", [{**record, "better": None, **nothing}]
    apart = [p[1] < q[1] for p, q in shared if p[2] > q[3] or q[2] > p[3]]
    if not apart:
        return f"not told apart{where}", [{**record, "better": None, **nothing}]
    first = apart[0] == (measure.better == "lower")
    return f"not crossed ({'a' if first else 'b'}{where})", [{**record, "better": a if first else b, **nothing}]


def _from(side: str, crossing: findings.Crossover) -> str:
    doubt = ""
    if crossing.low is not None and crossing.high is not None:
        doubt = f" [{numbers.count(crossing.low)}, {numbers.count(crossing.high)}]"
    return f"{side} from {numbers.count(float(f'{crossing.x:.2g}'))}{doubt}"
