"""Which figures a report has: from facts and summaries to charts, section by section."""

from __future__ import annotations

import re
from collections.abc import Sequence

from longspan.records.observation import Measurement, Metric
from longspan.report import charts, crossings, findings, heat, numbers, tables, truncation
from longspan.report.arms import Arms
from longspan.report.axes import Axis, Row, log_ticks
from longspan.report.bound_figure import bound_figure
from longspan.report.data import ProbeSection, ReportInput, SubjectFacts
from longspan.report.decision import quantity, value_text
from longspan.report.figure import Figure
from longspan.report.findings import Finding

BAND = "Bands are 95 % intervals."
X_TITLES = {
    "context": "context (tokens)",
    "position": "position in document (tokens)",
    "distance": "distance to the last mention (tokens)",
    "length": "length (tokens)",
    "window": "window (tokens)",
    "entries": "entries of the book",
}
MOST_HALF = 6
"""Subjects whose lines can be told apart at half the width."""


def answer_figure(report: ReportInput, arms: Arms) -> list[Figure]:
    """The primary metric of every subject, best first."""
    finding = findings.primary_finding(report)
    return [_dot_figure("answer", finding, arms)] if finding else []


def quality_figures(report: ReportInput, section: ProbeSection, arms: Arms) -> list[Figure]:
    """One figure per metric with an x axis or read off one, and one for the first metric that is a single number."""
    primary = findings.primary_finding(report)
    floors = {m.floor for m in section.metrics}
    scalars = [
        m for m in section.metrics if m.x_name is None and m.name not in floors and findings.points(section, m.name)
    ]
    curves = [m for m in section.metrics if m.x_name is not None and not m.detail and findings.points(section, m.name)]
    found: list[Figure] = []
    if scalars and not (primary and primary.section is section and primary.metric is scalars[0]):
        found.append(_dot_figure(slug(section.kind), Finding(section, scalars[0], None), arms))
    derived = [metric for metric in scalars[1:] if metric.kind == "derived"]
    found += [_derived_figure(section, metric, arms) for metric in derived if not metric.bound]
    for metric in curves:
        xs = {m.x for m in findings.points(section, metric.name)}
        if len(xs) > 1 or metric.y_name is None:
            # Of many subjects the first curve has the whole width.
            half = len(curves) > 1 and (len(arms) <= MOST_HALF or metric is not curves[0])
            found.append(_curve_figure(report, section, metric, arms, half=half))
        ys = {m.y for m in findings.cells(section, metric.name)} if metric.y_name is not None else set()
        # One row of cells is the curve once more.
        if len(ys) > 1 or (ys and len(xs) <= 1):
            found.append(_cell_figure(section, metric, arms))
    return found + [_derived_figure(section, metric, arms) for metric in derived if metric.bound]


def scalar_table(section: ProbeSection, arms: Arms) -> tables.Table | None:
    """All metrics of a section that are single numbers."""
    scalars = [m for m in section.metrics if m.x_name is None and findings.points(section, m.name)]
    if scalars:
        return tables.scalar_table(section, scalars, arms.labels)
    return truncation.detail_table(section, arms.labels)


def cost_figures(report: ReportInput, arms: Arms) -> list[Figure]:
    """State bytes and FLOPs per token against context, then whatever cost was measured."""
    found = []
    for name, title, form in (
        ("state_bytes", "Decoding state", "bytes"),
        ("forward_flops", "Forward FLOPs per token", "FLOPs"),
    ):
        rows = [row for subject in report.subjects for row in _fact_rows(subject, name)]
        if len({row["x"] for row in rows}) < 2:
            continue
        x = Axis("context (tokens)", "log", "tokens", values=log_ticks([row["x"] for row in rows]))
        y = Axis("", "log", "bytes" if form == "bytes" else "~s")
        unique, shown = _one_per_colour(rows, arms)
        caption = "Computed from the configuration; both axes are logarithmic."
        caption += crossings.pointer(crossings.computed(report, name))
        spec = charts.lines(unique, shown, x, y, mark_x=report.context, bands=False)
        table, drawn = tables.context_cost_table(report, name), [row["subject"] for row in unique]
        caption += _mark([row["x"] for row in rows], report.context, "the training context")
        found.append(_figure(slug(name), title, caption, spec, table, shown, drawn, x.title, half=True))
    for section in report.probes:
        if section.place == "cost":
            found += _measured_cost(section, arms)
    return found


def pareto_figures(report: ReportInput, arms: Arms) -> list[Figure]:
    """The primary metric against state bytes and against FLOPs per token, at the longest context that all share."""
    finding = findings.primary_finding(report)
    if finding is None or len(findings.measured(finding)) < 2:
        return []
    found: list[Figure] = []
    for name, title, unit in (
        ("state_bytes", "decoding state", "bytes"),
        ("forward_flops", "FLOPs per token", "FLOPs"),
        ("training_flops", "training FLOPs", "FLOPs"),
    ):
        figure = _pareto(report, arms, finding, name, title, unit)
        if figure and not (name == "training_flops" and len(found) == 2):
            found.append(figure)
    return found


def slug(text: str) -> str:
    """A name for files and anchors."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-") or "figure"


def _figure(name: str, title: str, caption: str, spec: dict[str, object], table: tables.Table, arms: Arms,
            drawn: Sequence[str], x_title: str, *, half: bool = False) -> Figure:  # fmt: skip
    panels = len({arms[s].panel for s in drawn})
    width = charts.width_of([arms[s].short for s in drawn])
    least = charts.least_width(arms.panels, x_title)
    return Figure(
        name, title, caption, spec, table, arms.columns if panels > 1 else 1, width, panels, least, half and panels == 1
    )


def _dot_figure(name: str, finding: Finding, arms: Arms) -> Figure:
    metric = finding.metric
    ranked = [m for m in findings.order(metric, findings.measured(finding).values()) if m.subject in arms]
    rows = [_dot(metric, m, arms) for m in ranked]
    percent = metric.is_share
    spec = charts.dots(rows, Axis(metric.unit, form="~%" if percent else ",~r"), chance=metric.chance)
    width = charts.width_of([row["text"] for row in rows]) + 8
    table = tables.scalar_table(finding.section, [metric], arms.labels) if finding.x is None else _at_x(finding, arms)
    better = "Lower" if metric.better == "lower" else "Higher"
    caption = f"{better} is better{_bars(metric, ranked)}."
    caption += "" if charts.dots_domain(rows, percent=percent)[0] == 0.0 else " The axis does not start at zero."
    if metric.chance is not None:
        caption = f"{better} is better{_bars(metric, ranked)}; the thin line is {_chance_name(metric)}."
    title = quantity(finding)
    return Figure(name, title[:1].upper() + title[1:], caption, spec, table, 1, width)


def _bars(metric: Metric, found: Sequence[Measurement]) -> str:
    """What the bars of single numbers are; a number that was computed, or measured once, has none."""
    if all(m.low is None or m.low == m.high for m in found):
        return ""
    if metric.bound:
        return "; bars go from the lowest to the highest seed"
    return "; bars are quartiles over repeats" if metric.kind == "median" else "; bars are 95 % intervals"


def _derived_figure(section: ProbeSection, metric: Metric, arms: Arms) -> Figure:
    name = slug(f"{section.kind}-{metric.name}")
    against = bound_figure(name, section, metric, arms) if metric.bound else None
    return against or _dot_figure(name, Finding(section, metric, None), arms)


def _at_x(finding: Finding, arms: Arms) -> tables.Table:
    return tables.metric_table(finding.section, finding.metric, arms.labels)


def _dot(metric: Metric, m: Measurement, arms: Arms) -> Row:
    text = value_text(metric, m)
    return {"name": m.subject, "value": m.value, "low": m.low, "high": m.high, "text": text, "hollow": False,
            "c": f"var({arms[m.subject].variable})", "detail": _basis(m)}  # fmt: skip


def _basis(m: Measurement) -> str:
    return f"n={m.n:,}, {m.seeds} seed{'s' if m.seeds != 1 else ''}" + (f"; {m.note}" if m.note else "")


def _curve_figure(report: ReportInput, section: ProbeSection, metric: Metric, arms: Arms, *, half: bool) -> Figure:
    found = [m for m in findings.points(section, metric.name) if m.subject in arms and m.x is not None]
    rows = [_point(metric, m) for m in found]
    percent = metric.is_share
    seen = [row["x"] for row in rows]
    ticks = log_ticks([*seen, metric.mark] if metric.mark is not None else seen)
    beyond = None if metric.mark is None else 1.2 * metric.mark
    x = Axis(title_of_x(metric), section.x_scale, "tokens", values=ticks, reach=beyond)
    under = truncation.underlay(report, section, metric)
    reach = None if under is None else 1.0
    y = Axis(metric.unit, form="~%" if percent else ",~r", zero=metric.kind == "proportion", reach=reach)
    in_tokens = metric.x_name in ("context", "position")
    mark = section.mark if section.mark is not None else report.context if in_tokens else None
    name_of_mark = section.mark_name or "the training context"
    if metric.mark is not None:
        mark, name_of_mark, seen = metric.mark, metric.mark_name, [*seen, 0.0, metric.mark + 1.0]
    limit = _ceiling(section, metric)
    spec = charts.lines(rows, arms, x, y, chance=metric.chance, mark_x=mark, limit=limit)
    better = "Lower" if metric.better == "lower" else "Higher"
    caption = f"{better} is better. {BAND}" + ("" if percent else " The y axis does not start at zero.")
    caption += f" The dashed line is {_chance_name(metric)}." if metric.chance is not None else ""
    if limit:
        caption += " Nobody can be above the long dashes: that many right answers are all that the state's bits allow."
    if under is not None:
        spec, caption = truncation.drawn_under(spec, under, arms), caption + truncation.caption(under)
    table = tables.metric_table(section, metric, arms.labels)
    drawn = [row["subject"] for row in rows]
    name = slug(f"{section.kind}-{metric.name}")
    caption += _mark(seen, mark, name_of_mark)
    return _figure(name, metric.title, caption, spec, table, arms, drawn, x.title, half=half)


def _ceiling(section: ProbeSection, metric: Metric) -> list[tuple[float, float]]:
    """The most that anybody can reach at each x, from left to right; of several limits at one x the highest."""
    highest: dict[float, float] = {}
    for m in findings.points(section, metric.ceiling) if metric.ceiling else ():
        if m.x is not None:
            highest[m.x] = max(m.value, highest.get(m.x, m.value))
    if highest and metric.mark is not None:
        # Up to there everything is possible.
        highest[metric.mark] = max(highest.values())
    return sorted(highest.items())


def _cell_figure(section: ProbeSection, metric: Metric, arms: Arms) -> Figure:
    """A metric over two conditions: a panel of coloured cells per subject."""
    found = [m for m in findings.cells(section, metric.name) if m.subject in arms]
    floors = findings.floor(section, metric)
    percent = metric.is_share
    # Subjects in the order of the report, in every panel the floor that the same subject has.
    headers = {
        label: f"{label} · floor {value_text(metric, floors[label]).split(' [')[0]}" if label in floors else label
        for label in arms.labels
        if any(m.subject == label for m in found)
    }
    rows = [{"panel": headers[label], **_cell(metric, m)} for label in headers for m in found if m.subject == label]
    low, high = min(row["value"] for row in rows), max(row["value"] for row in rows)
    domain = (0.0, 1.0) if metric.kind == "proportion" else (low, high if high > low else low + 1.0)
    x_title, y_title = title_of_x(metric), metric.y_name or ""
    columns = len(headers) if len(headers) <= 3 else 2 if len(headers) == 4 else 3
    spec = heat.heat_map(
        rows, domain, x_title=x_title, y_title=y_title, y_unit=metric.y_unit, percent=percent, columns=columns
    )
    counts = sorted({m.items for m in found})
    asked = (
        numbers.count(counts[0]) if len(counts) == 1 else f"{numbers.count(counts[0])} to {numbers.count(counts[-1])}"
    )
    better = "Lower" if metric.better == "lower" else "Higher"
    number = "The number is per cent" if percent else f"The number is {metric.unit or metric.title.lower()}"
    caption = f"{better} is better. {number}, from {asked} questions a cell; intervals (95 %) are in the table."
    if any(row["open"] for row in rows):
        guess = f" ({100 * metric.chance:.3g} %)" if metric.chance is not None and percent else ""
        caption += f" A ring marks cells whose interval holds {_chance_name(metric)}{guess}."
    if floors:
        caption += " The floor is what the subject scores on the same questions without the text."
    caption += f" Subjects are compared at each {metric.x_name or 'x'}, all of its cells together, not cell by cell."
    table = tables.cell_table(section, metric, arms.labels)
    least = max(charts.least_width(list(headers.values()), x_title), heat.FEWEST_PIXELS * len({r["x"] for r in rows}))
    title = f"{metric.title} by {y_title} and {metric.x_name}"
    name = slug(f"{section.kind}-{metric.name}-by-{y_title}")
    return Figure(name, title, caption, spec, table, columns, 8, len(headers), least)


def _chance_name(metric: Metric) -> str:
    """What a subject that takes nothing from the text scores: guessing, or no gain at all."""
    return "guessing" if metric.kind == "proportion" else "no gain"


def _cell(metric: Metric, m: Measurement) -> Row:
    percent = metric.is_share
    guess = metric.chance is not None and m.low is not None and m.high is not None
    return {"x": m.x, "y": m.y, "value": m.value, "text": value_text(metric, m),
            "cell": numbers.format_signed(100 * m.value) if percent else numbers.significant(m.value, 2),
            "n": f"{m.items:,} in {m.n:,} {metric.counted}",
            "open": bool(guess and (m.low or 0.0) <= (metric.chance or 0.0) <= (m.high or 0.0))}  # fmt: skip


def _point(metric: Metric, m: Measurement) -> Row:
    return {"subject": m.subject, "x": m.x, "y": m.value, "low": m.low, "high": m.high, "n": m.n,
            "open": _says_nothing(metric, m.low, m.high), "text": value_text(metric, m)}  # fmt: skip


def _says_nothing(metric: Metric, low: float | None, high: float | None) -> bool:
    """Whether an interval holds every possible value: it is drawn, but does not stretch the axis."""
    if metric.kind not in ("proportion", "difference") or low is None or high is None:
        return False
    return high - low >= (1.0 if metric.kind == "proportion" else 2.0) - 1e-9


def _unit_title(metric: Metric) -> str:
    return (
        f"{metric.title} ({metric.unit})" if metric.unit and metric.unit not in metric.title.lower() else metric.title
    )


def title_of_x(metric: Metric) -> str:
    """What the x axis of a metric is called."""
    return X_TITLES.get(metric.x_name or "", metric.x_name or "")


def _mark(xs: Sequence[float], mark: float | None, name: str) -> str:
    if mark is None or not min(xs) < mark < max(xs):
        return ""
    return f" The dotted line marks {name} ({numbers.count(mark)})."


def _fact_rows(subject: SubjectFacts, name: str) -> list[Row]:
    known: dict[int, float] = getattr(subject, name)
    show = numbers.byte_size if name == "state_bytes" else numbers.scaled
    return [{"subject": subject.label, "x": float(c), "y": v, "n": None, "text": show(v)}
            for c, v in sorted(known.items()) if v > 0]  # fmt: skip


def _one_per_colour(rows: Sequence[Row], arms: Arms) -> tuple[list[Row], Arms]:
    """Arms with equal curves (packing does not change cost) are drawn once, in one panel."""
    curves: dict[str, tuple[tuple[float, float], ...]] = {}
    for row in rows:
        curves[row["subject"]] = (*curves.get(row["subject"], ()), (row["x"], row["y"]))
    kept: dict[tuple[str, tuple[tuple[float, float], ...]], str] = {}
    for subject, curve in curves.items():
        kept.setdefault((arms[subject].colour, curve), subject)
    colours = [colour for colour, _ in kept]
    if len(set(colours)) < len(colours):
        return list(rows), arms
    keep = set(kept.values())
    return [row for row in rows if row["subject"] in keep], arms.in_one_panel()


def _repeats(points: Sequence[Measurement]) -> str:
    """What bands of medians are; a single run has none."""
    if all(point.n == 1 for point in points):
        return "Single runs, without bands."
    if any(point.n == 1 for point in points):
        return "Medians over repeats; bands are their quartiles, and single runs have none."
    return "Medians over repeats; bands are their quartiles."


def _measured_cost(section: ProbeSection, arms: Arms) -> list[Figure]:
    found = []
    for metric in section.metrics:
        points = [m for m in findings.points(section, metric.name) if m.subject in arms]
        name = slug(f"{section.kind}-{metric.name}")
        if not points:
            continue
        if any(m.x is None for m in points) or len({m.x for m in points}) < 2:
            found.append(_dot_figure(name, Finding(section, metric, points[0].x), arms))
            continue
        rows = [_point(metric, m) for m in points]
        x = Axis(title_of_x(metric), section.x_scale, "tokens", values=log_ticks([row["x"] for row in rows]))
        positive = all(row["y"] > 0 and (row["low"] is None or row["low"] > 0) for row in rows)
        y = Axis(metric.unit, "log" if positive else "linear", "~s")
        how, doubt = ("Computed", "") if metric.kind == "exact" else ("Measured", f" {_repeats(points)}")
        caption = f"{how}. {'Lower' if metric.better == 'lower' else 'Higher'} is better.{doubt}"
        caption += crossings.pointer(crossings.measured(section, metric)) if metric.crossing else ""
        spec = charts.lines(rows, arms, x, y)
        table = tables.metric_table(section, metric, arms.labels)
        drawn = [row["subject"] for row in rows]
        found.append(_figure(name, metric.title, caption, spec, table, arms, drawn, x.title, half=True))
    return found


def _pareto(report: ReportInput, arms: Arms, finding: Finding, name: str, title: str, unit: str) -> Figure | None:
    costs, where = _costs(report, name, finding.section.asked_context)
    values = {s: m for s, m in findings.measured(finding).items() if s in costs and s in arms}
    if len(values) < 2 or max(costs[s] for s in values) <= min(costs[s] for s in values) * 1.0001:
        return None
    show = numbers.byte_size if unit == "bytes" else numbers.scaled
    beaten = {s for s in values if any(_dominates(finding, costs, o, s, values) for o in values if o != s)}
    rows: list[Row] = [
        {"name": s, "x": costs[s], "y": m.value, "low": m.low, "high": m.high, "n": m.n, "front": s not in beaten,
         "text": value_text(finding.metric, m), "xtext": show(costs[s]),
         "c": "var(--soft)" if s in beaten else f"var({arms[s].variable})"}
        for s, m in values.items()
    ]  # fmt: skip
    percent = finding.metric.is_share
    x = Axis(f"{title}{where}", "log", "bytes" if unit == "bytes" else "~s")
    spec = charts.scatter(rows, x, Axis(finding.metric.unit, form="~%" if percent else ",~r"))
    corner = "lower left" if finding.metric.better == "lower" else "upper left"
    caption = f"The {corner} is best. Grey: another subject costs no more and is better beyond doubt. Bars are 95 %."
    table = tables.Table(
        ("<subject", f"{title}{where}", _unit_title(finding.metric), "<dominated"),
        tuple((r["name"], r["xtext"], r["text"], "" if r["front"] else "yes") for r in rows),
        tuple(r["name"] for r in rows),
        tuple({k: r[k] for k in ("name", "x", "y", "low", "high", "n", "front")} for r in rows),
    )
    labelled = [r["name"] for r in rows if len(rows) <= 8 or r["front"]]
    heading = f"{finding.metric.title} against {title}"
    return Figure(f"pareto-{slug(name)}", heading, caption, spec, table, 1, charts.width_of(labelled), half=True)


def _near(contexts: set[int], asked: int | None) -> int:
    """The smallest known context that holds the longest item; the largest where items do not say how long they are."""
    enough = [context for context in contexts if asked is not None and context >= asked]
    return min(enough, default=max(contexts))


def _costs(report: ReportInput, name: str, asked: int | None) -> tuple[dict[str, float], str]:
    if name == "training_flops":
        return {s.label: s.training_flops for s in report.subjects if s.training_flops}, ""
    known: dict[str, dict[int, float]] = {s.label: getattr(s, name) for s in report.subjects if getattr(s, name)}
    shared = set.intersection(*(set(values) for values in known.values())) if known else set()
    if not shared:
        return {}, ""
    context = _near(shared, asked)
    return {s: v[context] for s, v in known.items() if v[context] > 0}, f" at {numbers.count(context)} tokens"


def _dominates(finding: Finding, costs: dict[str, float], one: str, other: str, values: dict[str, Measurement]) -> bool:
    sign = 1 if finding.metric.better == "lower" else -1
    better = sign * (values[one].value - values[other].value) < 0
    return better and costs[one] <= costs[other] and findings.decided(findings.between(finding, one, other))
