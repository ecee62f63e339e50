"""The figures of paired differences: forest plots, and curves of the difference against x."""

from __future__ import annotations

from collections.abc import Sequence

from longspan.records.observation import Comparison, Metric
from longspan.report import charts, findings, numbers, tables
from longspan.report.arms import Arms
from longspan.report.axes import Axis, Row, log_ticks
from longspan.report.data import ProbeSection
from longspan.report.decision import difference_text
from longspan.report.figure import Figure
from longspan.report.figures import BAND, slug, title_of_x
from longspan.report.findings import Finding

MOST_PAIRS = 15
MOST_CURVES = 6


def comparison_figures(section: ProbeSection, arms: Arms) -> list[Figure]:
    """Paired differences of every compared metric: a forest plot, or curves of the difference against x."""
    found = []
    for metric in section.metrics:
        effects = findings.effects(section, metric.name)
        compared = findings.pairs(section, metric.name)
        if not (effects or compared):
            continue
        xs = sorted({c.x for c in compared if c.x is not None})
        name = slug(f"{section.kind}-{metric.name}-differences")
        if effects:
            found.append(_forest(f"{name}-effects", section, metric, effects, arms, "Main effects: "))
        if len(xs) > 1:
            found.append(_difference_curves(name, section, metric, compared))
        elif compared:
            found.append(_forest(name, section, metric, compared, arms, ""))
    return found


def _forest(
    name: str, section: ProbeSection, metric: Metric, compared: Sequence[Comparison], arms: Arms, head: str
) -> Figure:
    shown, left_out = _worth_showing(section, metric, compared)
    factor = 100.0 if metric.is_share else 1.0
    rows = [_forest_row(metric, _better_first(metric, c), factor, arms) for c in shown]
    unit = "percentage points" if factor > 1 else _difference_unit(metric)
    better = "left" if metric.better == "lower" else "right"
    spec = charts.dots(rows, Axis(f"difference ({unit})", form="signed"), reference=0.0)
    caption = (
        f"Paired on the same {metric.counted}; the first subject of a pair looks better, {better} of zero. Filled: "
        "beyond doubt after Holm's adjustment; rings: not decided. Grey: differences that this study would not find "
        "reliably."
    )
    if left_out:
        caption += f" {left_out} further pairs are in the table."
    table = tables.comparison_table(metric, compared)
    width = charts.width_of([row["text"] for row in rows]) + 8
    return Figure(name, f"{head}{section.title}: {metric.title}", caption, spec, table, 1, width)


def _forest_row(metric: Metric, c: Comparison, factor: float, arms: Arms) -> Row:
    colour = "var(--soft)"
    if c.decided:
        colour = f"var({arms[c.a].variable})" if c.a in arms else "var(--ink)"
    ends = [None if end is None else end * factor for end in (c.low, c.high)]
    detail = f"p (Holm) {numbers.p_value(c.p_holm)}, n={c.n:,}; {c.method}" + (f"; {c.note}" if c.note else "")
    return {"name": _pair(c), "value": c.difference * factor, "low": ends[0], "high": ends[1], "c": colour,
            "text": difference_text(metric, c), "hollow": not c.decided, "detail": detail,
            "zone": c.mde * factor if c.mde else 0}  # fmt: skip


def _difference_unit(metric: Metric) -> str:
    return "log scale" if metric.transform == "exp" else metric.unit or metric.title.lower()


def _pair(c: Comparison) -> str:
    if findings.is_effect(c):
        factor, _, level = c.a.partition("=")
        return f"{factor}: {level} − {c.b.partition('=')[2]}"
    return f"{c.a} − {c.b}"


def _better_first(metric: Metric, c: Comparison) -> Comparison:
    sign = 1 if metric.better == "lower" else -1
    return findings.turned(c) if sign * c.difference > 0 else c


def _worth_showing(
    section: ProbeSection, metric: Metric, compared: Sequence[Comparison]
) -> tuple[list[Comparison], int]:
    """All pairs where they are few; of many, those with the best subject."""
    chosen = list(compared)
    if len(chosen) > MOST_PAIRS:
        finding = Finding(section, metric, chosen[0].x)
        ranked = findings.order(metric, findings.measured(finding).values())
        best = ranked[0].subject if ranked else chosen[0].a
        chosen = [c for c in chosen if best in (c.a, c.b)] or chosen[:MOST_PAIRS]
    chosen.sort(key=lambda c: (-abs(c.difference), c.a, c.b))
    return chosen, len(compared) - len(chosen)


def _difference_curves(name: str, section: ProbeSection, metric: Metric, compared: Sequence[Comparison]) -> Figure:
    """The difference of every pair against x, each in its own panel on shared axes."""
    pairs = list(dict.fromkeys((c.a, c.b) for c in compared))
    largest = max(c.x for c in compared if c.x is not None)
    if len(pairs) > MOST_CURVES:
        at_end = [c for c in compared if c.x == largest]
        kept, _ = _worth_showing(section, metric, at_end)
        pairs = [(c.a, c.b) for c in kept][:MOST_CURVES]
    factor = 100.0 if metric.is_share else 1.0
    rows: list[Row] = [
        {"pair": _pair(c), "x": c.x, "y": c.difference * factor, "n": c.n, "text": difference_text(metric, c),
         "low": None if c.low is None else c.low * factor, "high": None if c.high is None else c.high * factor,
         "zone": c.mde * factor if c.mde else 0.0, "decided": c.decided,
         "open": c.low is not None and c.high is not None and factor > 1 and c.high - c.low >= 2.0 - 1e-9}
        for c in compared if (c.a, c.b) in pairs and c.x is not None
    ]  # fmt: skip
    unit = "percentage points" if factor > 1 else _difference_unit(metric)
    x = Axis(title_of_x(metric), section.x_scale, "tokens", values=log_ticks([row["x"] for row in rows]))
    columns = min(3, len(pairs))
    least = charts.least_width([row["pair"] for row in rows], x.title)
    spec = charts.differences(rows, x, Axis(f"difference ({unit})", form="signed"), columns)
    direction = "below" if metric.better == "lower" else "above"
    caption = (
        f"The first subject of a pair is better where the line is {direction} zero. {BAND} Filled points are beyond "
        "doubt after Holm's adjustment; the grey zone holds differences this study would not reliably detect."
    )
    left_out = len({(c.a, c.b) for c in compared}) - len(pairs)
    caption += f" {left_out} further pairs are in the table." if left_out else ""
    table = tables.comparison_table(metric, compared)
    return Figure(
        name,
        f"{section.title}: {metric.title}, difference ({unit})",
        caption,
        spec,
        table,
        columns,
        8,
        len(pairs),
        least,
    )
