"""Axes: their scales, domains and ticks, and the places of labels beside them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import altair as alt

Row = dict[str, Any]
Scale = Literal["log", "linear"]
TICKS = {
    "~s": "datum.value === 0 ? '0' : format(datum.value, '~s')",
    "signed": "datum.value === 0 ? '0' : format(datum.value, '+~r')",
    "tokens": "datum.value >= 8192 ? (datum.value % 1024 == 0 ? format(datum.value / 1024, '~r') + 'k' : "
    "format(datum.value, '~s')) : format(datum.value, ',~r')",
    "bytes": "datum.value >= 1073741824 ? format(datum.value / 1073741824, ',~r') + ' GiB' : datum.value >= 1048576 ? "
    "format(datum.value / 1048576, '~r') + ' MiB' : datum.value >= 1024 ? format(datum.value / 1024, '~r') + ' KiB' : "
    "format(datum.value, '~r') + ' B'",
}
"""Ticks that a d3 format cannot write: it has no binary prefixes and calls zero `0k` or `+0`."""
_BINARY = ("tokens", "bytes")


@dataclass(frozen=True)
class Axis:
    """One axis.

    Attributes:
        title: empty where the figure's own title says it.
        form: how ticks are written: a d3 format, or `tokens` (512, 4,096, 32k), `bytes` (KiB, MiB, GiB) or `signed`.
        values: the ticks wanted; None leaves them to Vega.
        reach: a value that the axis shows in any case.
    """

    title: str
    scale: Scale = "linear"
    form: str = ",~r"
    zero: bool = False
    values: tuple[float, ...] | None = None
    reach: float | None = None


def scale_of(axis: Axis, domain: tuple[float, float]) -> Any:
    """The Vega scale of an axis over a domain; logarithms of 2 for tokens and bytes, of 10 otherwise."""
    if axis.scale == "linear":
        return alt.Scale(domain=list(domain), nice=False, zero=False)
    if domain[0] <= 0:
        return alt.Scale(type="symlog", domain=list(domain), nice=False)
    return alt.Scale(type="log", base=2 if axis.form in _BINARY else 10, domain=list(domain), nice=False)


def axis_of(axis: Axis, domain: tuple[float, float], *, grid: bool | None = None, count: int | None = None) -> Any:
    """The Vega axis with its ticks written as the axis says."""
    settings: dict[str, Any] = {"labelExpr": TICKS[axis.form]} if axis.form in TICKS else {"format": axis.form}
    if axis.values is not None:
        settings["values"] = list(axis.values)
    elif axis.scale == "log" and domain[0] > 0:
        settings["values"] = log_steps(domain, 2 if axis.form in _BINARY else 10)
    elif count is not None:
        settings["tickCount"] = count
    if grid is not None:
        settings["grid"] = grid
    return alt.Axis(**settings)


def x_channel(axis: Axis, domain: tuple[float, float], *, grid: bool = False) -> Any:
    """The `x` column on an axis."""
    return alt.X(
        "x:Q", scale=scale_of(axis, domain), axis=axis_of(axis, domain, grid=grid, count=6), title=axis.title or None
    )


def y_channel(axis: Axis, domain: tuple[float, float], *, panels: int = 1) -> Any:
    """The `y` column on an axis; untitled in panels."""
    # Panels have their names where the title of the axis would stand.
    title = axis.title if panels == 1 and axis.title else None
    return alt.Y("y:Q", scale=scale_of(axis, domain), axis=axis_of(axis, domain), title=title)


def x_domain(rows: Sequence[Row], axis: Axis, pad: float = 0.0) -> tuple[float, float]:
    """From the smallest to the largest x, widened by the share `pad`."""
    low, high = min(row["x"] for row in rows), max(row["x"] for row in rows)
    if axis.reach is not None:
        low, high = min(low, axis.reach), max(high, axis.reach)
    if axis.scale == "log" and low > 0:
        if low == high:
            return low / 2, high * 2
        factor = (high / low) ** pad
        return low / factor, high * factor * (factor if pad else 1)
    if axis.zero:
        return 0.0, padded(0.0, high, pad)[1]
    return padded(low, high, pad)


def y_domain(rows: Sequence[Row], axis: Axis, also: float | None) -> tuple[float, float]:
    """Room for every value and interval; from zero where the axis says so."""
    keys = ("y", "low", "high")
    known = [r[key] for r in rows for key in keys if r.get(key) is not None and (key == "y" or not r.get("open"))]
    known += [value for value in (also, axis.reach) if value is not None]
    if axis.scale == "log":
        positive = [value for value in known if value > 0]
        low, high = min(positive), max(positive)
        factor = (high / low) ** 0.06 if high > low else 2.0
        return low / factor, high * factor
    low, high = min(known), max(known)
    if axis.zero and low >= 0:
        return 0.0, padded(0.0, high, 0.08)[1]
    return padded(low, high, 0.08)


def padded(low: float, high: float, share: float) -> tuple[float, float]:
    """A domain widened by a share of its length on both sides; never empty."""
    room = (high - low) * share or (0.0 if share == 0 and high > low else abs(high) * 0.05 or 0.5)
    return low - room, high + room


def spread(wanted: Sequence[float], gap: float, height: float) -> list[float]:
    """Rising pixel places near `wanted` (rising) that are at least `gap` apart and, where they fit, within `height`."""
    clusters: list[tuple[float, int]] = []
    for place in wanted:
        centre, size = place, 1
        while clusters and centre - clusters[-1][0] < gap * (size + clusters[-1][1]) / 2:
            before, count = clusters.pop()
            centre, size = (before * count + centre * size) / (count + size), count + size
        clusters.append((centre, size))
    places = [centre + gap * (i - (size - 1) / 2) for centre, size in clusters for i in range(size)]
    top = max(height, gap * (len(places) - 1))
    for i in reversed(range(len(places))):
        places[i] = min(places[i], top if i == len(places) - 1 else places[i + 1] - gap)
    for i in range(len(places)):
        places[i] = max(places[i], 0.0 if i == 0 else places[i - 1] + gap)
    return places


def pixel(value: float, domain: tuple[float, float], scale: Scale, height: float) -> float:
    """Height in pixels above the bottom at which a value stands."""
    low, high = domain
    if scale == "log" and low > 0:
        return height * math.log(value / low) / math.log(high / low)
    return height * (value - low) / (high - low)


def value_at(pixel: float, domain: tuple[float, float], scale: Scale, height: float) -> float:
    """The value that stands at a height in pixels: the inverse of `pixel`."""
    low, high = domain
    if scale == "log" and low > 0:
        return low * math.exp(math.log(high / low) * pixel / height)
    return low + (high - low) * pixel / height


def log_ticks(xs: Mapping[float, Any] | Sequence[float]) -> tuple[float, ...]:
    """Ticks at the x values, thinned where there are many; at powers where the values are no whole numbers."""
    values = sorted({x for x in xs if x > 0})
    if any(x != int(x) for x in values) and values[-1] >= 4 * values[0]:
        base = 10.0 if values[-1] >= 100 * values[0] else 4.0
        first, last = math.ceil(math.log(values[0], base)), math.floor(math.log(values[-1], base) + 1e-9)
        return tuple(base**k for k in range(first, last + 1))
    while len(values) > 9:
        values = values[::2]
    return tuple(values)


def log_steps(domain: tuple[float, float], base: int, most: int = 5) -> list[float]:
    """At most about `most` round ticks: powers of two, or 1-2-5 of powers of ten."""
    low, high = domain
    if base == 2:
        powers = [2.0**k for k in range(math.ceil(math.log2(low)), math.floor(math.log2(high)) + 1)]
        return powers[:: max(1, math.ceil(len(powers) / most))] if len(powers) > 1 else [low, high]
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for digits in ((1, 1.5, 2, 3, 4, 5, 6, 7, 8, 9), (1, 2, 3, 5), (1, 2, 5), (1, 3), (1,)):
        ticks = [d * 10.0**k for k in decades for d in digits if low <= d * 10.0**k <= high]
        if len(ticks) <= most:
            break
    return ticks[:: max(1, math.ceil(len(ticks) / most))]


def robust_domain(rows: Sequence[Row], axis: Axis, share: float) -> tuple[float, float]:
    """Room for the lower `share` of the values: the start of a run must not flatten the rest."""
    values = sorted(row["y"] for row in rows)
    cut = values[: max(1, math.ceil(share * len(values)))]
    return y_domain([{"y": cut[0]}, {"y": cut[-1]}], axis, None)
