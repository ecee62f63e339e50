"""The kinds of chart a report draws, each defined once (Altair) for the page and for the figure files.

Widths are set by the page; heights are fixed, which is what lets the labels at line ends be spread apart here.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any

import altair as alt

from longspan.report.arms import Arms
from longspan.report.axes import (
    Axis,
    Row,
    axis_of,
    padded,
    pixel,
    robust_domain,
    spread,
    value_at,
    x_channel,
    x_domain,
    y_channel,
    y_domain,
)
from longspan.report.figure import INK, LINE, PAPER, SOFT, ZONE, config


def lines(rows: Sequence[Row], arms: Arms, x: Axis, y: Axis, *, chance: float | None = None, height: int = 290,
          mark_x: float | None = None, bands: bool = True, points: bool = True,
          limit: Sequence[tuple[float, float]] = ()) -> dict[str, Any]:  # fmt: skip
    """Lines with 95 % bands and labels at their ends.

    Args:
        rows: subject, x, y, low, high (None where there is no interval), text and n for the tooltip.
        chance: level of guessing, drawn as a dashed line.
        mark_x: an x worth marking, e.g. the training context.
        limit: (x, y) of a line above which nobody can be, from left to right.
    """
    panels = len({arms[r["subject"]].panel for r in rows})
    height = height if panels == 1 else 150
    rows = [_styled(row, arms) for row in rows]
    domain_x, domain_y = x_domain(rows, x), y_domain(rows, y, chance)
    labels = _end_labels(rows, arms, y, domain_y, height)
    values = [{"kind": "point", **row} for row in rows] + labels
    encode_x = x_channel(x, domain_x)
    encode_y = y_channel(y, domain_y, panels=panels)
    colour = alt.Color("c:N", scale=None, legend=None)
    dash = alt.StrokeDash(
        "d:N", scale=alt.Scale(domain=list(arms.dashes), range=[list(d) for d in arms.dashes.values()]), legend=None
    )
    base = alt.Chart().transform_filter("datum.kind == 'point'").encode(x=encode_x, detail="s:N")
    layers: list[Any] = []
    if chance is not None:
        layers.append(alt.Chart().mark_rule(strokeDash=[3, 3], color=SOFT).encode(y=alt.datum(chance)))
    if mark_x is not None and domain_x[0] < mark_x < domain_x[1]:
        layers.append(alt.Chart().mark_rule(color=LINE, strokeDash=[1, 3], strokeWidth=1.5).encode(x=alt.datum(mark_x)))
    if limit:
        drawn = [row["p"] for row in rows]
        values += [{"kind": "limit", "p": p, "x": at, "y": most} for p in dict.fromkeys(drawn) for at, most in limit]
        over = alt.Chart().transform_filter("datum.kind == 'limit'")
        layers.append(over.mark_line(color=SOFT, strokeWidth=1.5, strokeDash=[8, 3], clip=True).encode(
            x=encode_x, y=encode_y))  # fmt: skip
    if bands and any(row["low"] is not None for row in rows):
        band = base.transform_filter("isValid(datum.low) && isValid(datum.high)")
        layers.append(band.mark_area(opacity=0.16, clip=True).encode(y=alt.Y("low:Q"), y2="high:Q", fill=_fill()))
    layers.append(base.mark_line(strokeWidth=2, clip=True).encode(y=encode_y, color=colour, strokeDash=dash))
    if points:
        shape = alt.Shape("m:N", scale=None, legend=None)
        layers.append(base.mark_point(filled=True, size=36, opacity=1).encode(y=encode_y, color=colour, shape=shape))
    layers.append(base.mark_point(filled=True, size=260, opacity=0).encode(y=encode_y, tooltip=_tooltip(x)))
    layers += _label_layers(encode_y, colour)
    return finish(layers, values, panels, arms, height, width_of([r["text"] for r in labels if r["kind"] == "label"]))


def dots_domain(rows: Sequence[Row], also: Sequence[float] = (), *, percent: bool) -> tuple[float, float]:
    """What the axis of `dots` spans: all estimates with their intervals; shares do not go below 0."""
    known = [row[key] for row in rows for key in ("value", "low", "high") if row.get(key) is not None] + [*also]
    low, high = padded(min(known), max(known), 0.05)
    return (max(low, 0.0) if percent and min(known) >= 0 else low), high


def dots(rows: Sequence[Row], x: Axis, *, chance: float | None = None, reference: float | None = None,
         ) -> dict[str, Any]:  # fmt: skip
    """One row per estimate, in the order given: name and number above, point with its 95 % interval below.

    Args:
        rows: name, value, low, high, text, c (colour), hollow (drawn as a ring), zone (half width of a grey zone
            around `reference`, None for none), detail (more lines for the tooltip).
        reference: a vertical line, e.g. 0 for differences.
    """
    values = [{"i": index, **row} for index, row in enumerate(rows)]
    # The estimate stands nearer to its own name than to the next one.
    step, below, zone_height = (38, 5, 16) if len(values) <= 16 else (30, 3, 12)
    zones = [row["zone"] for row in values if row.get("zone")]
    also = [each for each in (chance, reference) if each is not None]
    if reference is not None and zones:
        also += [reference - max(zones), reference + max(zones)]
    low, high = dots_domain(values, also, percent=x.form == "~%")
    if x.zero:
        low = 0.0
    encode_y = alt.Y("i:O", axis=None, scale=alt.Scale(paddingInner=0, paddingOuter=0))
    scale, axis = alt.Scale(domain=[low, high], nice=False, zero=False), axis_of(x, (low, high), grid=True, count=6)

    def place(field: str) -> Any:
        return alt.X(field, scale=scale, axis=axis, title=x.title or None)

    encode_x = place("value:Q")
    colour = alt.Color("c:N", scale=None, legend=None)
    base = alt.Chart().encode(y=encode_y)
    layers: list[Any] = []
    if zones and reference is not None:
        zone = base.transform_calculate(from_=f"{reference} - datum.zone", to=f"{reference} + datum.zone")
        zone = zone.transform_filter("datum.zone > 0")
        layers.append(
            zone.mark_bar(color=ZONE, height=zone_height, cornerRadius=2, yOffset=below).encode(
                x=place("from_:Q"), x2="to:Q"
            )
        )
    for each in (chance, reference):
        if each is not None:
            # Beside the estimates only: a full rule would run through the numbers.
            tick = base.transform_calculate(at=f"{each}").mark_tick(color=SOFT, size=19, thickness=1, yOffset=below)
            layers.append(tick.encode(x=place("at:Q")))
    interval = base.transform_filter("isValid(datum.low) && isValid(datum.high)")
    layers.append(interval.mark_rule(strokeWidth=2.5, strokeCap="round", yOffset=below).encode(
        x=place("low:Q"), x2="high:Q", color=colour))  # fmt: skip
    full, ring = base.transform_filter("!datum.hollow"), base.transform_filter("datum.hollow")
    layers.append(full.mark_point(filled=True, size=75, opacity=1, yOffset=below).encode(x=encode_x, color=colour))
    layers.append(ring.mark_point(filled=True, size=60, opacity=1, fill=PAPER, strokeWidth=2, yOffset=below).encode(
        x=encode_x, stroke=alt.Stroke("c:N", scale=None, legend=None)))  # fmt: skip
    layers.append(base.mark_text(align="left", baseline="middle", dy=-8, fontWeight=600).encode(
        x=alt.value(0), text="name:N"))  # fmt: skip
    layers.append(base.mark_text(align="right", baseline="middle", dy=-8, color=SOFT).encode(
        x=alt.value("width"), text="text:N"))  # fmt: skip
    tip = [alt.Tooltip("name:N", title="what"), alt.Tooltip("text:N", title="value"), alt.Tooltip("detail:N")]
    layers.append(base.mark_bar(opacity=0, height=step).encode(x=alt.value(0), x2=alt.value("width"), tooltip=tip))
    return single(layers, values, step * len(values))


def scatter(rows: Sequence[Row], x: Axis, y: Axis, *, height: int = 300) -> dict[str, Any]:
    """Quality against cost: points with intervals and direct labels; dominated ones are grey, the front is joined.

    Args:
        rows: name, x, y, low, high, text, xtext, c (colour), front (bool).
    """
    values = [dict(row) for row in sorted(rows, key=lambda r: (r["x"], r["y"]))]
    domain_x, domain_y = x_domain(values, x, pad=0.1), y_domain(values, y, None)
    _spread_scatter(values, x, y, domain_x, domain_y, height)
    encode_x = x_channel(x, domain_x)
    encode_y = y_channel(y, domain_y)
    colour = alt.Color("c:N", scale=None, legend=None)
    base = alt.Chart().encode(x=encode_x)
    front = base.transform_filter("datum.front")
    tip = [alt.Tooltip("name:N", title="subject"), alt.Tooltip("xtext:N", title=x.title),
           alt.Tooltip("text:N", title=y.title), alt.Tooltip("n:Q", title="n", format=",d")]  # fmt: skip
    layers = [
        front.mark_line(color=LINE, strokeWidth=1.5, strokeDash=[4, 3]).encode(y=encode_y),
        base.transform_filter("isValid(datum.low) && isValid(datum.high)").mark_rule(strokeWidth=1.5, opacity=0.6)
        .encode(y=alt.Y("low:Q"), y2="high:Q", color=colour),
        base.mark_point(filled=True, size=95, opacity=1).encode(y=encode_y, color=colour, tooltip=tip),
        *(base.transform_filter(f"datum.label != '' && datum.left === {str(left).lower()}")
          .mark_text(align="right" if left else "left", dx=-9 if left else 9, fontWeight=600)
          .encode(y=alt.Y("label_y:Q"), text="label:N", color=colour) for left in (False, True)),
    ]  # fmt: skip
    return single(layers, values, height)


def differences(rows: Sequence[Row], x: Axis, y: Axis, columns: int) -> dict[str, Any]:
    """Paired differences against x, a panel per pair, with the grey zone of what could not be detected.

    Args:
        rows: pair, x, y, low, high, zone (half width), decided, text, n.
    """
    domain_x, domain_y = x_domain(rows, x), y_domain(rows, y, 0.0)
    reach = max(abs(domain_y[0]), abs(domain_y[1]))
    values = [{**row, "zone_low": -min(row["zone"], reach), "zone_high": min(row["zone"], reach)} for row in rows]
    encode_x = x_channel(x, domain_x)
    scale = alt.Scale(domain=list(domain_y), nice=False, zero=False)
    encode_y = alt.Y("y:Q", scale=scale, axis=axis_of(y, domain_y), title=None)
    base = alt.Chart().encode(x=encode_x)
    tip = [alt.Tooltip("pair:N"), alt.Tooltip("x:Q", title=x.title, format=",~r"), alt.Tooltip("text:N"),
           alt.Tooltip("n:Q", title="n", format=",d")]  # fmt: skip
    band = base.transform_filter("isValid(datum.low) && isValid(datum.high)")
    layers = [
        base.mark_area(color=ZONE, clip=True).encode(y=alt.Y("zone_low:Q", scale=scale), y2="zone_high:Q"),
        alt.Chart().mark_rule(color=SOFT).encode(y=alt.datum(0)),
        band.mark_area(color=INK, opacity=0.18, clip=True).encode(y=alt.Y("low:Q", scale=scale), y2="high:Q"),
        base.mark_line(color=INK, strokeWidth=1.75).encode(y=encode_y),
        base.mark_point(filled=True, size=42, opacity=1, stroke=INK, strokeWidth=1.5).encode(
            y=encode_y, fill=alt.condition("datum.decided", alt.value(INK), alt.value(PAPER)), tooltip=tip
        ),
    ]
    pairs = list(dict.fromkeys(row["pair"] for row in rows))
    chart = (
        alt.layer(*layers)
        .properties(height=150, width=180)
        .facet(
            facet=alt.Facet("pair:N", sort=pairs, title=None),
            columns=columns,
            data=alt.NamedData("rows"),
            bounds="flush",
            spacing={"column": 40, "row": 46},
        )
        .properties(padding={"left": 4, "top": 4, "bottom": 4, "right": 8})
    )
    return plain(chart, values)


def training(
    rows: Sequence[Row], checks: Sequence[Row], arms: Arms, x: Axis, y: Axis, *, labelled: bool
) -> dict[str, Any]:
    """Training curves: raw thin, smoothed thick, validation as points.

    Args:
        rows: subject, series (subject and seed), x, y, smooth, text; `checks` the same for validation.
        labelled: whether the lines carry their names.
    """
    everything = [_styled(row, arms) for row in (*rows, *checks)]
    panels = len({row["p"] for row in everything})
    height = 170 if not labelled or panels > 1 else 280
    domain_x = x_domain(everything, x)
    domain_y = robust_domain(everything, y, 0.97 if labelled else 0.995)
    ends = [{**row, "y": row.get("smooth", row["y"])} for row in everything if not row["check"]] or everything
    labels = _end_labels(ends, arms, y, domain_y, height) if labelled else []
    values = [{key: value for key, value in row.items() if value is not None} for row in everything] + labels
    encode_x = x_channel(x, domain_x)
    encode_y = y_channel(y, domain_y, panels=panels)
    colour = alt.Color("c:N", scale=None, legend=None)
    line = alt.Chart().transform_filter("datum.check === false").encode(x=encode_x, detail="s:N", color=colour)
    check = alt.Chart().transform_filter("datum.check === true").encode(x=encode_x, color=colour)
    tip = [alt.Tooltip("series:N", title="run"), alt.Tooltip("x:Q", title="tokens", format=",d"),
           alt.Tooltip("text:N", title="validation")]  # fmt: skip
    over = [alt.Tooltip("series:N", title="run"), alt.Tooltip("x:Q", title="tokens", format=",d"),
            alt.Tooltip("text:N", title="value")]  # fmt: skip
    layers = [
        line.mark_line(strokeWidth=0.75, opacity=0.35, clip=True).encode(y=encode_y),
        line.mark_line(strokeWidth=2, clip=True).encode(y=alt.Y("smooth:Q")),
        line.mark_point(filled=True, size=60, opacity=0, clip=True).encode(y=encode_y, tooltip=over),
        check.mark_point(filled=True, size=46, opacity=1, stroke=PAPER, strokeWidth=1.2).encode(
            y=encode_y, tooltip=tip
        ),
        *(_label_layers(encode_y, colour) if labelled else ()),
    ]
    width = width_of([row["text"] for row in labels]) if labelled else 8
    return finish(layers, values, panels, arms, height, width)


def finish(
    layers: Sequence[Any], values: Sequence[Row], panels: int, arms: Arms, height: int, label_width: int
) -> dict[str, Any]:
    """A layered chart, or the same in panels with shared axes."""
    if panels == 1:
        return single(layers, values, height)
    layered = alt.layer(*layers).properties(height=height, width=160)
    chart = layered.facet(
        facet=alt.Facet("p:N", sort=list(arms.panels), title=None),
        columns=arms.columns,
        data=alt.NamedData("rows"),
        bounds="flush",
        spacing={"column": label_width + 14, "row": 46},
    ).properties(padding={"left": 4, "top": 4, "bottom": 4, "right": label_width})
    return plain(chart, values)


def single(layers: Sequence[Any], values: Sequence[Row], height: int) -> dict[str, Any]:
    """A layered chart as wide as its place."""
    chart = alt.layer(*layers, data=alt.NamedData("rows")).properties(
        height=height, width="container", padding={"left": 2, "top": 4, "bottom": 4, "right": 2}
    )
    spec = plain(chart, values)
    spec["autosize"] = {"type": "fit-x", "contains": "padding"}
    return spec


def plain(chart: Any, values: Sequence[Row]) -> dict[str, Any]:
    """A chart as a Vega-Lite definition with the common look and its data inside."""
    # Validating specifications that are our own costs seconds a report; a test validates every kind of chart.
    spec: dict[str, Any] = chart.configure(**config()).to_dict(validate=False)
    spec.pop("$schema", None)
    spec["data"] = {"values": list(values)}
    return spec


def _styled(row: Row, arms: Arms) -> Row:
    arm = arms[row["subject"]]
    return {"low": None, "high": None, **row, "s": row.get("series", arm.label), "c": f"var({arm.variable})",
            "p": arm.panel, "d": arm.stroke, "m": arm.shape}  # fmt: skip


def _tooltip(x: Axis) -> list[Any]:
    return [
        alt.Tooltip("subject:N"),
        alt.Tooltip("x:Q", title=x.title, format=",~r"),
        alt.Tooltip("text:N", title="value"),
        alt.Tooltip("n:Q", title="n", format=",d"),
    ]


def _fill() -> Any:
    return alt.Fill("c:N", scale=None, legend=None)


def _end_labels(rows: Sequence[Row], arms: Arms, y: Axis, domain: tuple[float, float], height: int) -> list[Row]:
    """A label and a leader for the last point of every line, spread apart in each panel."""
    last: dict[tuple[str, str], Row] = {}
    for row in rows:
        key = (row["p"], row["subject"])
        if row["y"] is not None and (key not in last or row["x"] >= last[key]["x"]):
            last[key] = row
    heights: dict[tuple[str, str], list[float]] = {}
    for row in rows:
        if row["y"] is not None:
            heights.setdefault((row["p"], row["subject"]), []).append(row["y"])
    labels: list[Row] = []
    farthest = max((row["x"] for row in last.values()), default=0.0)
    for panel in dict.fromkeys(key[0] for key in last):
        # Lines that end together are named in the order in which they ran.
        ends = sorted(
            (row for key, row in last.items() if key[0] == panel),
            key=lambda r: (
                round(pixel(r["y"], domain, y.scale, height)),
                statistics.mean(heights[panel, r["subject"]]),
            ),
        )
        places = spread(sorted(pixel(row["y"], domain, y.scale, height) for row in ends), 13.5, height)
        for row, place in zip(ends, places, strict=True):
            shared = {"p": panel, "c": row["c"], "s": row["s"], "d": row["d"], "y": row["y"], "x": row["x"]}
            at = value_at(place, domain, y.scale, height)
            early = row["x"] < farthest
            labels.append({**shared, "kind": "label", "at": at, "early": early, "text": arms[row["subject"]].short})
    return labels


def _label_layers(encode_y: Any, colour: Any) -> list[Any]:
    ends = alt.Chart().transform_filter("datum.kind == 'label'")
    place = {"x": alt.X("x:Q"), "x2": alt.value("width"), "y": encode_y, "y2": "at:Q"}
    leader = ends.transform_filter("!datum.early").mark_rule(strokeWidth=1, opacity=0.55, x2Offset=7)
    # A long line in the curve's colour would look like more of the curve.
    far = ends.transform_filter("datum.early").mark_rule(strokeWidth=1, strokeDash=[1, 4], color=SOFT, x2Offset=7)
    text = ends.mark_text(align="left", baseline="middle", dx=10, fontWeight=600).encode(
        x=alt.value("width"), y=alt.Y("at:Q"), text="text:N", color=colour
    )
    return [leader.encode(**place, color=colour), far.encode(**place), text]


def _spread_scatter(
    values: list[Row], x: Axis, y: Axis, domain_x: tuple[float, float], domain_y: tuple[float, float], height: int
) -> None:
    """Labels near in x are spread in y; of many points only the front is labelled."""
    for row in values:
        row["label"] = row["name"] if len(values) <= 8 or row["front"] else ""
        row["label_y"] = row["y"]
        # A name that would run out at the right stands on the left.
        row["left"] = pixel(row["x"], domain_x, x.scale, 1.0) > 0.7
    named = [row for row in values if row["label"]]
    for row in named:
        row["px"] = pixel(row["x"], domain_x, x.scale, 620)
    groups: list[list[Row]] = []
    for row in sorted(named, key=lambda r: float(r["px"])):
        if groups and row["px"] - groups[-1][-1]["px"] < 70:
            groups[-1].append(row)
        else:
            groups.append([row])
    for group in groups:
        group.sort(key=lambda r: float(r["y"]))
        places = spread([pixel(r["y"], domain_y, y.scale, height) for r in group], 14, height)
        for member, place in zip(group, places, strict=True):
            member["label_y"] = value_at(place, domain_y, y.scale, height)


def width_of(texts: Sequence[str]) -> int:
    """Room for the longest of some labels, in pixels."""
    return 16 + math.ceil(6.9 * max((len(text) for text in texts), default=0))


def least_width(names: Sequence[str], x_title: str) -> int:
    """What a panel needs so that neither its name nor its axis title runs into the next panel's."""
    return max(118, *(math.ceil(6.7 * len(name)) for name in names), math.ceil(5.9 * len(x_title)))
