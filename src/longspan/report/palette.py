"""One colour per mixer, the same in every chart and every report, told apart by colour-blind readers too.

Colours are set in OKLCH: attention is blue, state-space mixers orange and ochre, recurrent ones green, the delta rule
violet, convolutions grey; the colour of any other mixer is drawn from its name. A hybrid lies on the path between its
families (attention to SSM runs through violet and magenta) by the share of its layers; mixers side by side in a layer
have an equal part of it.
"""

from __future__ import annotations

import math
import re
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

NAMES: dict[str, str] = {
    "A": "attention",
    "S": "sliding_window_attention",
    "M": "mamba2",
    "m": "mamba1",
    "G": "gru",
    "L": "lstm",
    "D": "gated_deltanet",
    "C": "gated_short_convolution",
}
"""letter -> the mixer it stands for, where a report does not say."""

_MIXERS: dict[str, tuple[float, float, float]] = {
    "attention": (0.55, 0.135, 250.0),
    "sliding_window_attention": (0.42, 0.09, 255.0),
    "mamba2": (0.67, 0.155, 55.0),
    "mamba1": (0.48, 0.12, 70.0),
    "gru": (0.57, 0.115, 165.0),
    "lstm": (0.74, 0.15, 155.0),
    "gated_deltanet": (0.38, 0.18, 290.0),
    "gated_short_convolution": (0.32, 0.02, 250.0),
}
_FAMILIES = (
    ("attention", "attention"),
    ("mamba", "ssm"),
    ("ssm", "ssm"),
    ("gru", "recurrent"),
    ("lstm", "recurrent"),
    ("delta", "delta"),
    ("conv", "convolution"),
)
# Where hybrids of two families begin and end. Starting beyond blue keeps an even attention-SSM hybrid off the blues
# that red-blind readers see in violet.
_PATHS: dict[tuple[str, ...], tuple[float, float]] = {
    ("attention",): (250.0, 300.0),
    ("attention", "delta"): (250.0, 290.0),
    ("attention", "recurrent"): (250.0, 165.0),
    ("attention", "ssm"): (266.0, 415.0),
    ("delta",): (290.0, 340.0),
    ("delta", "recurrent"): (290.0, 165.0),
    ("delta", "ssm"): (290.0, 415.0),
    ("recurrent",): (165.0, 215.0),
    ("recurrent", "ssm"): (165.0, 55.0),
    ("ssm",): (55.0, 105.0),
}
_LEVELS = ((0.47, 0.14, 285.0), (0.68, 0.12, 200.0), (0.52, 0.15, 15.0), (0.75, 0.13, 95.0), (0.60, 0.13, 135.0))
_DARK_LIFT = 0.13
_DEEP_LEVEL_DARK = 0.80
_DEEP_STEPS = ((0.0, 0.0), (0.12, -38.0), (-0.13, 34.0), (-0.24, -6.0), (0.10, 40.0))
_LIGHT_STEPS = ((0.0, 0.0), (-0.15, -24.0), (-0.26, -36.0), (-0.07, 32.0), (-0.22, 22.0))
"""Lightness and hue of further patterns of one mixer, whose own lightness is low or high."""
HEAT_STEPS = 10
"""Colours of a sequential scale."""


@dataclass(frozen=True)
class Shade:
    """A colour on light and on dark paper, as `#rrggbb`."""

    light: str
    dark: str


def family(mixer: str) -> str:
    """The family that a mixer's true name tells."""
    return next((name for word, name in _FAMILIES if word in mixer.lower()), "other")


def mixer_shade(mixer: str) -> Shade:
    """The colour of a mixer by its true name; one that Longspan does not ship has the colour of its name's checksum."""
    return _variation(mixer, 0)


def _variation(mixer: str, index: int) -> Shade:
    """Further patterns of one mixer turn to both sides of its hue and away from its lightness."""
    drawn = zlib.crc32(mixer.encode())
    drawn_from_name = (0.45 + 0.07 * (drawn % 5), 0.10, 360.0 * (drawn // 5 % 997) / 997)
    lightness, chroma, hue = _MIXERS.get(mixer, drawn_from_name)
    steps = _DEEP_STEPS if lightness < 0.6 else _LIGHT_STEPS
    change, turn = steps[index % len(steps)]
    around = hue + turn + 12.0 * (index // len(steps))
    # A deep colour that is nearly black on white is nearly white on black.
    dark = lightness + _DARK_LIFT + (-change if lightness < 0.6 else change)
    return Shade(_hex(lightness + change, chroma, around), _hex(min(0.92, max(0.56, dark)), 0.92 * chroma, around))


def split_layers(letters: str) -> list[str]:
    """The layers of an expanded pattern: `A`, `[AM]` and `M` of `A[AM]M`."""
    return re.findall(r"\[[^\]]*\]|.", letters)


def letter_names(letters: str, mixers: Sequence[str]) -> dict[str, str]:
    """letter -> true mixer name, from a pattern and the names of its layers (`[attention+mamba2]` of `[AM]`)."""
    names: dict[str, str] = {}
    for index, layer in enumerate(split_layers(letters)):
        inside = layer.strip("[]")
        branches = mixers[index].strip("[]").split("+") if index < len(mixers) else []
        for at, letter in enumerate(inside):
            name = branches[at] if len(branches) == len(inside) else NAMES.get(letter, letter)
            names.setdefault(letter, name)
    return names


def pattern_shades(patterns: Mapping[str, Sequence[str]] | Sequence[str]) -> dict[str, Shade]:
    """A colour for each pattern: its mixer's if it has one mixer, else one between its families.

    Further patterns of the same one mixer (other depths, other settings) are variations of it. Hybrids of the same
    families whose shares are too alike are spread along the path and alternate in lightness.

    Args:
        patterns: expanded pattern -> true mixer name of every layer; patterns alone take the usual meaning of letters.
    """
    shades: dict[str, Shade] = {}
    pure: dict[str, list[str]] = {}
    mixed: dict[tuple[str, ...], dict[str, dict[str, float]]] = {}
    for pattern in dict.fromkeys(patterns):
        names = letter_names(pattern, patterns[pattern] if isinstance(patterns, Mapping) else ())
        if len(names) == 1 and "[" not in pattern:
            pure.setdefault(names[pattern[0]], []).append(pattern)
        else:
            shares = _shares(pattern, names)
            mixed.setdefault(tuple(sorted(shares)), {})[pattern] = shares
    for mixer, members in pure.items():
        # The letter that a mixer is known by comes first: another letter is the mixer with other settings.
        ordered = sorted(members, key=lambda p: NAMES.get(p[0]) != mixer)
        shades |= {p: _variation(mixer, index) for index, p in enumerate(ordered)}
    for families, hybrids in mixed.items():
        shades |= _mixed_shades(families, hybrids)
    return shades


def _shares(pattern: str, names: Mapping[str, str]) -> dict[str, float]:
    """family -> its share of the layers."""
    layers = [layer.strip("[]") for layer in split_layers(pattern)]
    shares: dict[str, float] = {}
    for letters in layers:
        for letter in letters:
            name = family(names[letter])
            shares[name] = shares.get(name, 0.0) + 1 / len(letters) / len(layers)
    return shares


def level_shades(levels: Sequence[str]) -> dict[str, Shade]:
    """Colours for the levels of a factor that is not the pattern; none of them is a family's colour."""
    return {
        level: _level_shade(
            base[0] - 0.12 * (index // len(_LEVELS) % 2), base[1], base[2] + 25.0 * (index // len(_LEVELS))
        )
        for index, level in enumerate(dict.fromkeys(levels))
        for base in (_LEVELS[index % len(_LEVELS)],)
    }


def _level_shade(lightness: float, chroma: float, hue: float) -> Shade:
    shade = _shade(lightness, chroma, hue)
    # A deep colour that is nearly black on white is nearly white on black, and clear of its lighter neighbour.
    deep = lightness + _DARK_LIFT < 0.56
    return Shade(shade.light, _hex(_DEEP_LEVEL_DARK, 0.92 * chroma, hue)) if deep else shade


def heat_name(step: int) -> str:
    """CSS variable (without dashes) of one colour of the sequential scale."""
    return f"heat{step}"


def heat_ink_name(step: int) -> str:
    """CSS variable (without dashes) of the text on that colour."""
    return f"on-heat{step}"


def heat_shades() -> dict[str, Shade]:
    """CSS variable -> colour: a sequential scale from the paper's side to its opposite, and the text on each step.

    Lightness rises or falls steadily, which is what colour-blind readers and grey printers see; the hue turns from
    yellow to blue beside it.
    """
    shades: dict[str, Shade] = {}
    for step in range(HEAT_STEPS):
        share = step / (HEAT_STEPS - 1)
        chroma = 0.03 + 0.09 * math.sin(math.pi * (0.15 + 0.75 * share))
        light = _hex(0.965 - 0.635 * share, chroma, 105.0 + 160.0 * share)
        dark = _hex(0.275 + 0.63 * share, chroma, 265.0 - 160.0 * share)
        shades[heat_name(step)] = Shade(light, dark)
        inks = [max(("#14171b", "#ffffff"), key=lambda ink: contrast(ink, paper)) for paper in (light, dark)]
        shades[heat_ink_name(step)] = Shade(*inks)
    return shades


def contrast(one: str, other: str) -> float:
    """The contrast ratio of two `#rrggbb` (WCAG 2): 1 to 21."""
    high, low = sorted((_luminance(one), _luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def _luminance(colour: str) -> float:
    channels = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def _mixed_shades(families: tuple[str, ...], members: Mapping[str, Mapping[str, float]]) -> dict[str, Shade]:
    if families not in _PATHS:
        return {p: _shade(0.42 + 0.1 * (i % 4), 0.05, 60.0 + 70.0 * i) for i, p in enumerate(members)}
    start, end = _PATHS[families]
    shares = {p: share[families[-1]] if len(families) == 2 else 0.5 for p, share in members.items()}
    ordered = sorted(members, key=lambda p: (shares[p], p))
    hues = [start + (end - start) * shares[p] for p in ordered]
    if any(abs(b - a) < 14 for a, b in pairwise(hues)):
        margin = 0.16 * (end - start)
        steps = max(1, len(ordered) - 1)
        hues = [start + margin + (end - start - 2 * margin) * i / steps for i in range(len(ordered))]
        lightness = [0.50 + 0.17 * (i % 2) for i in range(len(ordered))]
    else:
        lightness = [0.69] * len(ordered)
    return {p: _shade(light, 0.13, hue) for p, light, hue in zip(ordered, lightness, hues, strict=True)}


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
