"""What a benchmark's cuts left of its documents, drawn under every accuracy against context, with its floors.

A probe whose documents are cut says so by the metrics `kept_fraction` and `fully_visible`. Without them nothing here
happens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from longspan.records.observation import Measurement, Metric
from longspan.report import findings, numbers
from longspan.report.arms import Arms
from longspan.report.data import ProbeSection, ReportInput
from longspan.report.tables import Table

KEPT, WHOLE, ACCURACY = "kept_fraction", "fully_visible", "accuracy"
RIGHT = "right_"
"""Beginning of the names of metrics that say how often a letter is right."""
SOFT, ZONE = "var(--soft)", "var(--zone)"


@dataclass(frozen=True)
class Underlay:
    """What stands under a curve.

    Attributes:
        seen: x → mean share of the documents that was seen, and mean share of documents seen whole, over subjects.
        constant: what always saying the most frequent right letter scores, None where that is not known.
        floors: subject → accuracy without any document.
    """

    seen: dict[float, tuple[float, float]]
    constant: float | None
    floors: dict[str, float]


def underlay(report: ReportInput, section: ProbeSection, metric: Metric) -> Underlay | None:
    """What to draw under a metric; None where it is no accuracy or nothing was cut."""
    kept = findings.points(section, KEPT)
    if metric.chance is None or not kept or metric.kind != "proportion":
        return None
    whole = {(m.subject, m.x): m.value for m in findings.points(section, WHOLE)}
    seen = {}
    for x in sorted({m.x for m in kept if m.x is not None}):
        shares = [m for m in kept if m.x == x]
        both = [
            sum(values) / len(values)
            for values in ([m.value for m in shares], [whole.get((m.subject, x), 0.0) for m in shares])
        ]
        seen[x] = both[0], both[1]
    letters = [
        m.value for each in section.metrics if each.name.startswith(RIGHT) for m in findings.points(section, each.name)
    ]
    return Underlay(seen, max(letters) if letters else None, _floors(report, section, metric))


def _floors(report: ReportInput, section: ProbeSection, metric: Metric) -> dict[str, float]:
    """The same metric where nothing of a document was shown: of a section with the same metrics and no cuts."""
    names = {each.name for each in section.metrics}
    for other in report.probes:
        # Of two protocols of one probe the one that asks again measures more.
        theirs = {each.name for each in other.metrics}
        alike = theirs <= names or names <= theirs
        if other is not section and theirs and alike and not findings.points(other, KEPT):
            return {m.subject: m.value for m in findings.points(other, metric.name)}
    return {}


def drawn_under(spec: dict[str, Any], under: Underlay, arms: Arms) -> dict[str, Any]:
    """The chart with the underlay as its lowest layers; every panel shows the same."""
    rows = [{"x": x, "kept": kept, "whole": whole} for x, (kept, whole) in under.seen.items()]
    place = {"field": "x", "type": "quantitative"}
    layers: list[dict[str, Any]] = [
        {
            "data": {"values": rows},
            "mark": {"type": "area", "color": ZONE, "opacity": 0.55, "clip": True},
            "encoding": {"x": place, "y": {"field": "kept", "type": "quantitative"}, "y2": {"datum": 0}},
        },
        {
            "data": {"values": rows},
            "mark": {"type": "line", "color": SOFT, "strokeWidth": 1, "strokeDash": [1, 2], "clip": True},
            "encoding": {"x": place, "y": {"field": "whole", "type": "quantitative"}},
        },
    ]
    if under.constant is not None:
        layers.append(_level(under.constant, SOFT, [8, 3]))
    layers += [_level(value, f"var({arms[s].variable})", [2, 4]) for s, value in under.floors.items() if s in arms]
    target = spec["spec"] if "facet" in spec else spec
    layered = {**target, "layer": [*layers, *target["layer"]]}
    return {**spec, "spec": layered} if "facet" in spec else layered


def _level(value: float, colour: str, dash: Sequence[int]) -> dict[str, Any]:
    return {
        "data": {"values": [{"level": value}]},
        "mark": {"type": "rule", "color": colour, "strokeDash": list(dash)},
        "encoding": {"y": {"field": "level", "type": "quantitative"}},
    }


def caption(under: Underlay) -> str:
    """How to read it."""
    text = (
        " Grey ground: share of the documents that was seen, mean over subjects; its dotted line: share of items whose "
        "document was seen whole."
    )
    if under.constant is not None:
        text += f" Long dashes: always saying the most frequent right letter ({100 * under.constant:.1f} %)."
    if under.floors:
        text += " Dotted levels in a subject's colour: the same questions without any document."
    return text


def detail_table(section: ProbeSection, labels: Sequence[str]) -> Table | None:
    """Every metric with an x axis that has no figure of its own, beside the first: a row per subject and x."""
    details = [
        m
        for m in section.metrics
        if m.detail and m.x_name is not None and (found := findings.points(section, m.name))
        if not (m.sparse and all(each.value == 0 for each in found))
    ]
    if not details:
        return None
    columns = [section.metrics[0], *details]
    measured: dict[tuple[str, float], dict[str, Measurement]] = {}
    for metric in columns:
        for m in findings.points(section, metric.name):
            if m.x is not None:
                measured.setdefault((m.subject, m.x), {})[metric.name] = m
    order = sorted(measured, key=lambda key: (labels.index(key[0]) if key[0] in labels else len(labels), key[1]))
    rows = tuple(
        (subject, numbers.count(x), *(_cell(metric, measured[subject, x].get(metric.name)) for metric in columns))
        for subject, x in order
    )
    records = tuple(
        {"subject": subject, "x": x, **{name: m.value for name, m in measured[subject, x].items()}}
        for subject, x in order
    )
    headings = ("<subject", section.metrics[0].x_name or "x", *(metric.title for metric in columns))
    return Table(headings, rows, tuple(subject for subject, _ in order), records)


def _cell(metric: Metric, m: Measurement | None) -> str:
    if m is None:
        return numbers.MISSING
    if metric.is_share:
        return f"{100 * m.value:.1f} %"
    return numbers.significant(m.value, 4)
