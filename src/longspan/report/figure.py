"""What a figure is: a chart's definition and its table, how every chart looks, and the definition for files.

Colours are CSS variables (`var(--ink)`), so that the page follows light and dark without drawing again and prints on
white; `static_spec` puts real colours in for files.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from longspan.report import palette
from longspan.report.arms import Arms
from longspan.report.tables import Table

INK, SOFT, LINE, GRID, ZONE, PAPER = (f"var(--{name})" for name in ("ink", "soft", "line", "grid", "zone", "paper"))
THEMES: dict[str, dict[str, str]] = {
    "light": {
        "ink": "#1b1f24", "soft": "#5b636e", "line": "#b9c0c8", "grid": "#e9ecef", "zone": "#e4e7eb",
        "paper": "#ffffff",
    },
    "dark": {
        "ink": "#e8eaed", "soft": "#a2abb5", "line": "#4a525c", "grid": "#2a3038", "zone": "#303740",
        "paper": "#14171b",
    },
}  # fmt: skip
for _name, _shade in palette.heat_shades().items():
    THEMES["light"][_name], THEMES["dark"][_name] = _shade.light, _shade.dark
FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"
STATIC_WIDTH = 660


@dataclass(frozen=True)
class Figure:
    """One chart with its table.

    Attributes:
        name: of its files and its anchor, e.g. `position-curve`.
        caption: how to read it, in a sentence or two.
        spec: the Vega-Lite definition with CSS variables as colours.
        columns: panels per row at full width; 1 for a single chart.
        label_width: room for direct labels at the right of every panel, in pixels.
        panels: number of panels, and `least` the width in pixels that their names need.
        half: whether it may share a row with the next figure.
    """

    name: str
    title: str
    caption: str
    spec: dict[str, Any]
    table: Table
    columns: int = 1
    label_width: int = 0
    panels: int = 1
    least: int = 118
    half: bool = False


def config() -> dict[str, Any]:
    """The look of every chart."""
    axis = {
        "labelColor": SOFT, "titleColor": SOFT, "gridColor": GRID, "domainColor": LINE, "tickColor": LINE,
        "labelFontSize": 11, "titleFontSize": 11.5, "titleFontWeight": 500, "titlePadding": 8, "labelPadding": 5,
        "tickSize": 4, "labelOverlap": "greedy", "labelFlush": False,
    }  # fmt: skip
    left = {
        "domain": False, "ticks": False, "titleAngle": 0, "titleAlign": "left", "titleAnchor": "end",
        "titleBaseline": "bottom", "titleY": -9, "tickCount": 5,
    }  # fmt: skip
    return {
        "background": "transparent",
        "font": FONT,
        "view": {"stroke": None},
        "axis": axis,
        "axisX": {"grid": False},
        "axisY": left,
        "header": {"labelColor": INK, "labelFontSize": 11.5, "labelFontWeight": 600, "labelAnchor": "start",
                   "title": None, "labelPadding": 6},
        "text": {"color": INK, "fontSize": 11.5},
        "rule": {"color": LINE},
    }  # fmt: skip


def static_spec(figure: Figure, arms: Arms, theme: str = "light") -> dict[str, Any]:
    """The definition with real colours and a fixed width, for SVG and PNG files."""
    text = json.dumps(figure.spec)
    colours = dict(THEMES[theme])
    colours |= {name.removeprefix("--"): getattr(shade, theme) for name, shade in arms.shades.items()}
    for name, colour in colours.items():
        text = text.replace(f"var(--{name})", colour)
    spec: dict[str, Any] = json.loads(text)
    spec["background"] = colours["paper"]
    if "facet" in spec:
        room = STATIC_WIDTH + 60 - figure.columns * figure.label_width
        spec["spec"]["width"] = max(110, (room - 24 * (figure.columns - 1)) // figure.columns)
    else:
        spec["width"] = STATIC_WIDTH
    return spec
