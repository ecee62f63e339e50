"""What subjects reach against what limits them: both on logarithms, with lines of equal shares of the limit."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import altair as alt

from longspan.records.observation import Measurement, Metric
from longspan.report import charts, findings, numbers, tables
from longspan.report.arms import Arms
from longspan.report.axes import Axis, Row, pixel, spread, value_at, x_channel, y_channel
from longspan.report.data import ProbeSection
from longspan.report.decision import value_text
from longspan.report.figure import LINE, PAPER, SOFT, Figure

HEIGHT = 300
WIDTH = 580
"""Of the chart in pixels; the page makes it a little wider or narrower."""
SHARES = tuple(10.0**power for power in range(-6, 1))


def bound_figure(name: str, section: ProbeSection, metric: Metric, arms: Arms) -> Figure | None:
    """A metric against the one that limits it (`Metric.bound`), a point a subject; None where no limit is known.

    Subjects without a known limit are named in the caption.
    """
    limits = {m.subject: m for m in findings.points(section, metric.bound) if m.x is None and m.value > 0}
    known = [m for m in findings.points(section, metric.name) if m.subject in arms]
    found = [m for m in known if m.subject in limits]
    if not found:
        return None
    limit = next(each for each in section.metrics if each.name == metric.bound)
    rows = [_row(m, limits[m.subject], metric, limit, arms) for m in found]
    x, y = Axis(f"{limit.title.lower()} ({limit.unit})", "log", "~s"), Axis(metric.unit, "log", "~s")
    caption = (
        "Points: the median over training seeds; bars: from the lowest to the highest seed. Both axes are logarithmic; "
        f"grey lines hold equal shares of the {limit.title.lower()}, so that subjects along one of them hold in "
        "proportion to it. Up to 100 % there is room for every answer."
    )
    if any(row["open"] for row in rows):
        caption += " Rings: half or more of the seeds lie beyond what was asked, so that the place is not known."
    if without := ", ".join(m.subject for m in known if m.subject not in limits):
        caption += f" Not shown, since their {limit.title.lower()} is not known: {without}."
    spec = _chart(rows, x, y)
    width = charts.width_of([row["name"] for row in rows])
    return Figure(name, metric.title, caption, spec, _table(rows, metric, limit), 1, width)


def _row(m: Measurement, limit: Measurement, metric: Metric, bound: Metric, arms: Arms) -> Row:
    return {"name": m.subject, "x": limit.value, "y": m.value, "low": m.low, "high": m.high, "n": m.n,
            "seeds": m.seeds, "text": value_text(metric, m), "xtext": value_text(bound, limit), "note": m.note,
            "share": f"{numbers.significant(100 * m.value / limit.value, 2)} %",
            "open": m.beyond, "c": f"var({arms[m.subject].variable})"}  # fmt: skip


def _chart(rows: Sequence[Row], x: Axis, y: Axis) -> dict[str, Any]:
    # At the left there is room for a name.
    domain_x = _domain([row["x"] for row in rows], below=3.0)
    domain_y = _domain([row[key] for row in rows for key in ("y", "low", "high") if row[key]])
    values = [*_labelled(rows, domain_x, domain_y), *_lines(domain_x, domain_y)]
    encode_x, encode_y = x_channel(x, domain_x), y_channel(y, domain_y)
    colour = alt.Color("c:N", scale=None, legend=None)
    points = alt.Chart().transform_filter("isValid(datum.name)").encode(x=encode_x)
    guides = alt.Chart().transform_filter("isValid(datum.guide)").encode(x=encode_x, y=encode_y)
    tip = [alt.Tooltip("name:N", title="subject"), alt.Tooltip("xtext:N", title=x.title),
           alt.Tooltip("text:N", title=y.title), alt.Tooltip("share:N", title="share"), alt.Tooltip("note:N"),
           alt.Tooltip("seeds:Q", title="seeds")]  # fmt: skip
    layers = [
        guides.mark_line(color=LINE, strokeWidth=1, strokeDash=[2, 3], clip=True).encode(detail="guide:N"),
        guides.transform_filter("datum.last").mark_text(align="right", dx=-4, dy=-6, color=SOFT, fontSize=10.5).encode(
            text="guide:N"),
        points.mark_rule(strokeWidth=1.75).encode(y=alt.Y("low:Q"), y2="high:Q", color=colour),
        points.mark_point(filled=True, size=95, opacity=1, strokeWidth=2).encode(
            y=encode_y, fill=alt.condition("datum.open", alt.value(PAPER), colour),
            stroke=alt.Stroke("c:N", scale=None, legend=None), tooltip=tip),
        *(points.transform_filter(f"datum.left == {str(left).lower()}")
          .mark_text(align="right" if left else "left", dx=-10 if left else 10, fontWeight=600)
          .encode(y=alt.Y("label_y:Q"), text="name:N", color=colour) for left in (False, True)),
    ]  # fmt: skip
    return charts.single(layers, values, HEIGHT)


def _domain(values: Sequence[float], below: float = 2.0) -> tuple[float, float]:
    return min(values) / below, max(values) * 2


def _labelled(rows: Sequence[Row], domain_x: tuple[float, float], domain_y: tuple[float, float]) -> list[Row]:
    """Names beside their points, on the side where they meet no other subject, spread apart among neighbours."""
    values = [dict(row) for row in rows]
    for row in values:
        right, left = (_meets(row, values, side, domain_x, domain_y) for side in (1, -1))
        row["left"] = right and not left
    near = math.log(domain_x[1] / domain_x[0]) / 5
    groups: list[list[Row]] = []
    for row in sorted(values, key=lambda row: (row["left"], row["x"])):
        last = groups[-1][-1] if groups else None
        if last is not None and last["left"] == row["left"] and math.log(row["x"] / last["x"]) < near:
            groups[-1].append(row)
        else:
            groups.append([row])
    for group in groups:
        group.sort(key=lambda row: row["y"])
        places = spread([pixel(row["y"], domain_y, "log", HEIGHT) for row in group], 14, HEIGHT)
        for row, place in zip(group, places, strict=True):
            row["label_y"] = value_at(place, domain_y, "log", HEIGHT)
    return values


def _meets(
    row: Row, rows: Sequence[Row], side: int, domain_x: tuple[float, float], domain_y: tuple[float, float]
) -> bool:
    """Whether a name on a side of its point (1 right, -1 left) runs over another subject's point or bar, or out."""
    here = pixel(row["x"], domain_x, "log", WIDTH)
    height = pixel(row["y"], domain_y, "log", HEIGHT)
    end = here + side * charts.width_of([row["name"]])
    for other in rows:
        across = side * (pixel(other["x"], domain_x, "log", WIDTH) - here)
        marked = [pixel(other[key], domain_y, "log", HEIGHT) for key in ("y", "low", "high") if other[key]]
        if 0 < across < abs(end - here) + 8 and min(marked) - 12 < height < max(marked) + 12:
            return True
    return not 0 <= end <= WIDTH


def _lines(domain_x: tuple[float, float], domain_y: tuple[float, float]) -> list[Row]:
    """Both ends of every line of equal share that crosses the chart, within it."""
    lines: list[Row] = []
    for share in SHARES:
        start, end = max(domain_x[0], domain_y[0] / share), min(domain_x[1], domain_y[1] / share)
        if start < end:
            guide = f"{100 * share:g} %"
            lines += [{"guide": guide, "x": at, "y": share * at, "last": at == end} for at in (start, end)]
    return lines


def _table(rows: Sequence[Row], metric: Metric, limit: Metric) -> tables.Table:
    ordered = sorted(rows, key=lambda row: (row["x"], row["name"]))
    titles = (f"{limit.title.lower()} ({limit.unit})", f"{metric.unit} [lowest, highest seed]", "share", "seeds")
    return tables.Table(
        ("<subject", *titles, "<note"),
        tuple((r["name"], r["xtext"], r["text"], r["share"], str(r["seeds"]), r["note"]) for r in ordered),
        tuple(r["name"] for r in ordered),
        tuple(
            {"subject": r["name"], metric.bound: r["x"], metric.name: r["y"]}
            | {k: r[k] for k in ("low", "high", "n", "seeds", "note")}
            for r in ordered
        ),
    )
