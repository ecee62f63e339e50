"""Numbers as a person reads them: no more digits than the interval allows, one style in terminal and page."""

from __future__ import annotations

import math

MINUS = "−"
MISSING = "–"
_DECIMAL = ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))
_SYMBOLS = ("FLOP", "FLOP/s", "B/s")
_BINARY = ((2.0**40, "TiB"), (2.0**30, "GiB"), (2.0**20, "MiB"), (2.0**10, "KiB"))


def finite(value: float | None) -> bool:
    """Whether there is a number at all: neither None nor NaN nor infinite."""
    return value is not None and math.isfinite(value)


def scaled(value: float | None, unit: str = "") -> str:
    """Three significant digits with a decimal prefix: `25.6 M`, `1.32 M tok/s`, `103 GFLOP/s`, `863`.

    A prefix belongs to the symbol of a unit, and stands before words (`tok/s`) by itself.
    """
    if value is None or not math.isfinite(value):
        return MISSING
    tail = f" {unit}" if unit else ""
    size = abs(value)
    for base, prefix in _DECIMAL:
        if size >= base * 0.9995:
            return f"{significant(value / base)} {prefix}{unit if unit in _SYMBOLS else tail}"
    return f"{significant(value) if value != int(value) or size >= 1000 else format_signed(int(value))}{tail}"


def byte_size(value: float | None) -> str:
    """Three significant digits with a binary prefix: `3.25 MiB`."""
    if value is None or not math.isfinite(value):
        return MISSING
    for base, unit in _BINARY:
        if abs(value) >= base * 0.9995:
            return f"{significant(value / base)} {unit}"
    return f"{value:.0f} B"


def count(value: float | None) -> str:
    """A whole number with thin separators: `12,345`."""
    if value is None or not math.isfinite(value):
        return MISSING
    return f"{round(value):,}".replace("-", MINUS)


def duration(seconds: float | None) -> str:
    """`40 ms`, `41 s`, `3 min 20 s`, `2 h 05 min`."""
    if seconds is None or not math.isfinite(seconds):
        return MISSING
    if 0.0005 <= seconds < 0.095:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min"


def significant(value: float, digits: int = 3) -> str:
    """`digits` significant digits without an exponent: `0.0123`, `25.6`, `863`."""
    if value == 0:
        return "0"
    decimals = max(0, digits - 1 - math.floor(math.log10(abs(value))))
    if round(abs(value), decimals) >= 10 ** (math.floor(math.log10(abs(value))) + 1):
        decimals = max(0, decimals - 1)
    return format_signed(value, decimals)


def format_signed(value: float, decimals: int = 0, *, plus: bool = False) -> str:
    """A fixed number of decimals with a real minus sign; never `-0`."""
    text = f"{abs(value):.{decimals}f}"
    if float(text) == 0:
        return text
    return (MINUS if value < 0 else "+" if plus else "") + text


def decimals_for(half_width: float, *, most: int = 6) -> int:
    """Decimals that show an interval's half width with two significant digits (one where it starts with 3 to 9)."""
    if not math.isfinite(half_width) or half_width <= 0:
        return 3
    exponent = math.floor(math.log10(half_width))
    leading = half_width / 10**exponent
    return min(most, max(0, -exponent + (1 if leading < 3 else 0)))


def estimate(value: float | None, low: float | None, high: float | None, *, plus: bool = False) -> str:
    """`3.482 ± 0.011`; `3.482 [3.461, 3.521]` where the interval is lopsided; the bare value where there is none."""
    if value is None or not math.isfinite(value):
        return MISSING
    if low is None or high is None or not (math.isfinite(low) and math.isfinite(high)):
        return f"{'+' if plus and value > 0 else ''}{significant(value, 4)} (no interval)"
    half = (high - low) / 2
    decimals = decimals_for(half)
    shown = format_signed(value, decimals, plus=plus)
    if half <= 0:
        return f"{'+' if plus and value > 0 else ''}{significant(value, 4)} ± 0"
    if abs((high - value) - (value - low)) <= 0.2 * half:
        return f"{shown} ± {half:.{decimals}f}"
    return f"{shown} [{format_signed(low, decimals)}, {format_signed(high, decimals)}]"


def percentage(value: float | None, low: float | None = None, high: float | None = None, n: int | None = None) -> str:
    """`31.2 % [27.3, 35.4] n=503`."""
    if value is None or not math.isfinite(value):
        return MISSING
    tail = f" n={n:,}" if n is not None else ""
    if low is None or high is None or not (math.isfinite(low) and math.isfinite(high)):
        return f"{100 * value:.0f} % (no interval){tail}"
    decimals = 1 if high - low < 0.2 else 0
    return f"{100 * value:.{decimals}f} % [{100 * low:.{decimals}f}, {100 * high:.{decimals}f}]{tail}"


def difference(value: float, low: float | None, high: float | None, *, proportion: bool = False) -> str:
    """A signed difference with its interval; points (`pp`) for proportions."""
    factor, tail = (100.0, " pp") if proportion else (1.0, "")
    if low is None or high is None or not (math.isfinite(low) and math.isfinite(high)):
        return f"{format_signed(value * factor, 1 if proportion else 3, plus=True)}{tail} (no interval)"
    decimals = decimals_for((high - low) / 2 * factor)
    parts = [format_signed(each * factor, decimals, plus=True) for each in (value, low, high)]
    return f"{parts[0]}{tail} [{parts[1]}, {parts[2]}]"


def p_value(value: float | None) -> str:
    """`< 0.001`, `0.012`, `0.34`."""
    if value is None or not math.isfinite(value):
        return MISSING
    if value < 0.001:
        return "< 0.001"
    return f"{value:.3f}" if value < 0.1 else f"{value:.2f}"


def share(value: float | None, decimals: int = 0) -> str:
    """A share as per cent: `21.5 %`."""
    return MISSING if value is None or not math.isfinite(value) else f"{100 * value:.{decimals}f} %"


def relative(value: float | None) -> str:
    """A signed share as per cent: `−0.12 %`."""
    if value is None or not math.isfinite(value):
        return MISSING
    return f"{format_signed(100 * value, 2, plus=True)} %"
