"""One colour per mixer family, the same in every chart and every report, told apart by colour-blind readers too.

Colours are set in OKLCH: attention is blue, state-space mixers orange, recurrent ones green. A hybrid lies on the path
between its families (attention to SSM runs through violet and magenta) by the share of its layers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

FAMILIES: dict[str, str] = {
    "A": "attention",
    "S": "attention",
    "M": "ssm",
    "m": "ssm",
    "G": "recurrent",
    "L": "recurrent",
}
"""letter -> family; letters a study defines itself count by their mixer's name (see `family`)."""

_LETTERS: dict[str, tuple[float, float, float]] = {
    "A": (0.55, 0.135, 250.0),
    "S": (0.66, 0.11, 235.0),
    "M": (0.67, 0.155, 55.0),
    "m": (0.74, 0.14, 80.0),
    "G": (0.57, 0.115, 165.0),
    "L": (0.64, 0.12, 135.0),
}
_HUES = {"attention": 250.0, "ssm": 55.0 + 360.0, "recurrent": 165.0}
_OTHER = (0.55, 0.02, 80.0)
_LEVELS = ((0.47, 0.14, 285.0), (0.68, 0.12, 200.0), (0.52, 0.15, 15.0), (0.75, 0.13, 95.0), (0.60, 0.13, 135.0))
_DARK_LIFT = 0.13


@dataclass(frozen=True)
class Shade:
    """A colour on light and on dark paper, as `#rrggbb`."""

    light: str
    dark: str


def family(letter: str, mixer: str = "") -> str:
    """The family of a layer, by its letter or else by the true name of its mixer."""
    if letter in FAMILIES:
        return FAMILIES[letter]
    for word, name in (("attention", "attention"), ("mamba", "ssm"), ("ssm", "ssm"), ("gru", "recurrent")):
        if word in mixer.lower():
            return name
    return "other"


def letter_shade(letter: str, mixer: str = "") -> Shade:
    """The colour of one layer's cell in a pattern strip."""
    if letter in _LETTERS:
        return _shade(*_LETTERS[letter])
    by_family = {"attention": "A", "ssm": "M", "recurrent": "G"}.get(family(letter, mixer))
    return _shade(*_LETTERS[by_family]) if by_family else _shade(*_OTHER)


def pattern_shades(patterns: Sequence[str]) -> dict[str, Shade]:
    """A colour for each pattern: its mixer's if it has one mixer, else one between its families.

    Hybrids of the same families whose shares are too alike are spread along the path and alternate in lightness.
    """
    shades: dict[str, Shade] = {}
    mixed: dict[tuple[str, ...], list[str]] = {}
    for pattern in dict.fromkeys(patterns):
        letters = set(pattern)
        if len(letters) == 1:
            shades[pattern] = letter_shade(pattern[0])
        else:
            mixed.setdefault(tuple(sorted({family(letter) for letter in letters})), []).append(pattern)
    for families, members in mixed.items():
        shades |= _mixed_shades(families, members)
    return shades


def level_shades(levels: Sequence[str]) -> dict[str, Shade]:
    """Colours for the levels of a factor that is not the pattern; none of them is a family's colour."""
    return {
        level: _shade(base[0] - 0.12 * (index // len(_LEVELS) % 2), base[1], base[2] + 25.0 * (index // len(_LEVELS)))
        for index, level in enumerate(dict.fromkeys(levels))
        for base in (_LEVELS[index % len(_LEVELS)],)
    }


def _mixed_shades(families: tuple[str, ...], members: list[str]) -> dict[str, Shade]:
    start, end = _path(families)
    if start is None or end is None:
        return {p: _shade(0.42 + 0.1 * (i % 4), 0.05, 60.0 + 70.0 * i) for i, p in enumerate(members)}
    last = families[-1] if families[0] != families[-1] else ""
    shares = {p: sum(family(letter) == last for letter in p) / len(p) if last else 0.5 for p in members}
    ordered = sorted(members, key=lambda p: (shares[p], p))
    hues = [start + (end - start) * shares[p] for p in ordered]
    if any(b - a < 14 for a, b in pairwise(hues)):
        margin = 0.16 * (end - start)
        steps = max(1, len(ordered) - 1)
        hues = [start + margin + (end - start - 2 * margin) * i / steps for i in range(len(ordered))]
        lightness = [0.50 + 0.17 * (i % 2) for i in range(len(ordered))]
    else:
        lightness = [0.69] * len(ordered)
    return {p: _shade(light, 0.13, hue) for p, light, hue in zip(ordered, lightness, hues, strict=True)}


def _path(families: tuple[str, ...]) -> tuple[float | None, float | None]:
    if families == ("attention", "ssm"):
        # Starting beyond blue keeps an even hybrid off the blues that red-blind readers see in violet.
        return 266.0, _HUES["ssm"]
    if families == ("attention", "recurrent"):
        return 250.0, 165.0
    if families == ("recurrent", "ssm"):
        return 165.0, 55.0
    if len(families) <= 2 and all(name in _HUES for name in families):
        return _HUES[families[0]], _HUES[families[-1]] if len(families) == 2 else _HUES[families[0]] + 50
    return None, None


def _shade(lightness: float, chroma: float, hue: float) -> Shade:
    return Shade(_hex(lightness, chroma, hue), _hex(min(0.86, lightness + _DARK_LIFT), chroma * 0.92, hue))


def _hex(lightness: float, chroma: float, hue: float) -> str:
    """OKLCH to sRGB; chroma is reduced until the colour exists."""
    while True:
        channels = _oklch_to_linear(lightness, chroma, hue)
        if all(-1e-4 <= c <= 1 + 1e-4 for c in channels) or chroma < 0.005:
            break
        chroma *= 0.95
    encoded = (_encode(min(1.0, max(0.0, c))) for c in channels)
    return "#" + "".join(f"{round(255 * c):02x}" for c in encoded)


def _oklch_to_linear(lightness: float, chroma: float, hue: float) -> tuple[float, float, float]:
    """Björn Ottosson's OKLab (2020) to linear sRGB."""
    a, b = chroma * math.cos(math.radians(hue)), chroma * math.sin(math.radians(hue))
    long = (lightness + 0.3963377774 * a + 0.2158037573 * b) ** 3
    medium = (lightness - 0.1055613458 * a - 0.0638541728 * b) ** 3
    short = (lightness - 0.0894841775 * a - 1.2914855480 * b) ** 3
    return (
        4.0767416621 * long - 3.3077115913 * medium + 0.2309699292 * short,
        -1.2684380046 * long + 2.6097574011 * medium - 0.3413193965 * short,
        -0.0041960863 * long - 0.7034186147 * medium + 1.7076147010 * short,
    )


def _encode(channel: float) -> float:
    return 12.92 * channel if channel <= 0.0031308 else 1.055 * channel ** (1 / 2.4) - 0.055
