"""A table of two conditions as colour: one panel per subject, one scale for all, every cell with its number."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import altair as alt

from longspan.report import palette
from longspan.report.axes import TICKS, Row
from longspan.report.charts import plain
from longspan.report.figure import INK

STEPS = palette.HEAT_STEPS
ROW_HEIGHT = 32
FEWEST_PIXELS = 33
"""Width of a cell that holds its number."""


def heat_map(
    rows: Sequence[Row],
    domain: tuple[float, float],
    *,
    x_title: str,
    y_title: str,
    y_unit: str = "",
    percent: bool = True,
    columns: int = 1,
) -> dict[str, Any]:
    """Cells in panels on shared axes; the first y is at the top.

    Args:
        rows: panel, x, y, value, cell (the number in the cell), text (value with interval), n (how many of what),
            open (whether the interval holds guessing: the cell gets a ring).
        domain: value of the first and of the last colour, the same in all panels.
        y_unit: `%` where y is a share.
    """
    values = [{**row, "on": f"var(--{palette.heat_ink_name(step_of(row['value'], domain))})"} for row in rows]
    ticks = alt.Axis(labelExpr=TICKS["tokens"], labelAngle=0, grid=False, domain=False, ticks=False)
    share = "format(datum.value, '.0%')" if y_unit == "%" else TICKS["tokens"]
    encode_x = alt.X("x:O", axis=ticks, title=x_title)
    encode_y = alt.Y("y:O", axis=alt.Axis(grid=False, labelExpr=share), title=None)
    scale = alt.Scale(
        type="quantize",
        domain=list(domain),
        range=[f"var(--{palette.heat_name(step)})" for step in range(STEPS)],
    )
    legend = alt.Legend(
        orient="bottom", title=None, format="~%" if percent else ",~r", gradientLength=240, gradientThickness=9,
        labelColor="var(--soft)", labelFontSize=10.5, labelOverlap=True, offset=10,
    )  # fmt: skip
    tip = [
        alt.Tooltip("panel:N", title="subject"),
        alt.Tooltip("x:Q", title=x_title, format=",~r"),
        alt.Tooltip("y:Q", title=y_title, format=".0%" if y_unit == "%" else ",~r"),
        alt.Tooltip("text:N", title="value"),
        alt.Tooltip("n:N", title="n"),
    ]
    base = alt.Chart().encode(x=encode_x, y=encode_y)
    on = alt.Color("on:N", scale=None, legend=None)
    layers = [
        base.mark_rect(stroke="var(--paper)", strokeWidth=2, cornerRadius=3).encode(
            fill=alt.Fill("value:Q", scale=scale, legend=legend)
        ),
        base.mark_text(baseline="middle", fontSize=11.5, fontWeight=600).encode(text="cell:N", color=on),
        base.transform_filter("datum.open")
        .mark_point(size=14, strokeWidth=1.1, filled=False, yOffset=11, opacity=0.9)
        .encode(stroke=alt.Stroke("on:N", scale=None, legend=None)),
        # On top, so that neither the number nor the ring takes the pointer from the cell.
        base.mark_rect(opacity=0).encode(tooltip=tip),
    ]
    panels = list(dict.fromkeys(row["panel"] for row in rows))
    height = ROW_HEIGHT * len({row["y"] for row in rows})
    chart = (
        alt.layer(*layers)
        .properties(height=height, width=180)
        .facet(
            facet=alt.Facet("panel:N", sort=panels, title=None, header=alt.Header(labelColor=INK)),
            columns=columns,
            data=alt.NamedData("rows"),
            bounds="flush",
            spacing={"column": 22, "row": 46},
        )
        .resolve_scale(fill="shared")
        .properties(padding={"left": 4, "top": 4, "bottom": 4, "right": 8})
    )
    return plain(chart, values)


def step_of(value: float, domain: tuple[float, float]) -> int:
    """The colour step of a value: as many equal steps as there are colours."""
    low, high = domain
    share = (value - low) / (high - low) if high > low else 0.0
    return min(STEPS - 1, max(0, int(share * STEPS)))
