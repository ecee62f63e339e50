"""How the arms of a study share a chart: one factor is the colour, the others are panels and dashes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from longspan.report import palette
from longspan.report.data import ReportInput, SubjectFacts

DASHES: tuple[tuple[int, ...], ...] = ((1, 0), (6, 3), (2, 2), (8, 3, 2, 3), (12, 3))
SHAPES = ("circle", "square", "diamond", "triangle-up", "triangle-down")
MOST_TOGETHER = 8
"""Subjects of colours of their own that one panel holds."""
_STYLES = {str(style): dash for style, dash in enumerate(DASHES)}
"""`Arm.stroke` -> dashes, where no factor is shown as dashes."""


@dataclass(frozen=True)
class Arm:
    """One subject's place in every chart.

    Attributes:
        colour: level of the factor shown as colour; the direct label of its line.
        panel: levels of the factors shown as panels, empty where one panel holds all.
        dash: level of the factor shown as dashes, empty where there is none.
        variable: CSS variable of its colour, e.g. `--s0`.
        style: its number among the colours of the same mixers, which lie near each other: the shape of its points, and
            its dashes where no factor is shown as dashes.
    """

    label: str
    colour: str
    panel: str
    dash: str
    variable: str
    letters: str
    style: int = 0

    @property
    def shape(self) -> str:
        """Of its points."""
        return SHAPES[self.style]

    @property
    def stroke(self) -> str:
        """The name of its dashes."""
        return self.dash or str(self.style)

    @property
    def short(self) -> str:
        """The label inside one panel."""
        return f"{self.colour} · {self.dash}" if self.dash else self.colour


@dataclass(frozen=True)
class Arms:
    """All subjects of a report, in their order.

    Attributes:
        columns: panels per row where the width allows it.
        colour_by: name of the factor shown as colour, empty where every subject has its own.
        shades: CSS variable -> colour.
        dashes: `Arm.stroke` -> lengths of dashes and gaps.
    """

    arms: dict[str, Arm]
    panels: tuple[str, ...]
    columns: int
    colour_by: str
    dashes: dict[str, tuple[int, ...]]
    shades: dict[str, palette.Shade]

    def __getitem__(self, label: str) -> Arm:
        return self.arms[label]

    def __contains__(self, label: object) -> bool:
        return label in self.arms

    def __len__(self) -> int:
        return len(self.arms)

    def in_one_panel(self) -> Arms:
        """The same colours without panels and dashes, for quantities that the other factors do not change."""
        arms = {label: replace(arm, panel="", dash="") for label, arm in self.arms.items()}
        return replace(self, arms=arms, panels=("",), columns=1, dashes=_STYLES)

    @property
    def labels(self) -> list[str]:
        """Every subject's label in order."""
        return list(self.arms)


def arrange(report: ReportInput) -> Arms:
    """Give every subject its colour, panel and dash; the pattern is the colour wherever it varies."""
    subjects = report.subjects
    levels = _levels(subjects)
    colour_by = _colour_factor(subjects, levels)
    others = sorted((name for name in levels if name != colour_by), key=lambda name: (-len(levels[name]), name))
    colours = {s.label: s.factors[colour_by] if colour_by else s.label for s in subjects}
    if len({(colours[s.label], *(s.factors.get(name, "") for name in others)) for s in subjects}) < len(subjects):
        colours, colour_by, others = {s.label: s.label for s in subjects}, "", []
    one_each = len(others) == 1 and len(levels[others[0]]) == len(subjects)
    if not colour_by and (one_each or len(subjects) <= MOST_TOGETHER):
        # Every subject has its own colour already: apart they could not be compared.
        others = []
    dash_by = others.pop() if len(others) >= 2 and len(levels[others[-1]]) < len(DASHES) else ""
    panel_of = {s.label: " · ".join(_level_text(name, s.factors[name]) for name in others) for s in subjects}
    dash_of = {s.label: s.factors[dash_by] if dash_by else "" for s in subjects}
    shades = _shades(subjects, colours)
    variables = {colour: f"--s{index}" for index, colour in enumerate(shades)}
    styles = _styles(subjects, colours)
    arms = {
        s.label: Arm(
            s.label,
            colours[s.label],
            panel_of[s.label],
            dash_of[s.label],
            variables[colours[s.label]],
            s.letters,
            styles[colours[s.label]],
        )
        for s in subjects
    }
    panels = tuple(sorted({a.panel for a in arms.values()}, key=_panel_order(subjects, others, levels, panel_of)))
    dashes = {level: DASHES[i] for i, level in enumerate(levels[dash_by])} if dash_by else _STYLES
    columns = _columns(len(panels), len(levels[others[-1]]) if len(others) >= 2 else 0)
    return Arms(arms, panels, columns, colour_by, dashes, {variables[c]: shades[c] for c in shades})


def _styles(subjects: list[SubjectFacts], colours: dict[str, str]) -> dict[str, int]:
    """Colour -> its number among those of the same mixers."""
    alike: dict[frozenset[str], list[str]] = {}
    for subject in subjects:
        members = alike.setdefault(frozenset(subject.mixers), [])
        if subject.mixers and colours[subject.label] not in members:
            members.append(colours[subject.label])
    found = {colour: number % len(SHAPES) for members in alike.values() for number, colour in enumerate(members)}
    return {colour: found.get(colour, 0) for colour in colours.values()}


def _levels(subjects: list[SubjectFacts]) -> dict[str, list[str]]:
    """Factor -> its levels in order of appearance, for factors that every subject has and that vary."""
    names = [name for name in (subjects[0].factors if subjects else {}) if all(name in s.factors for s in subjects)]
    levels = {name: list(dict.fromkeys(s.factors[name] for s in subjects)) for name in names}
    return {name: found for name, found in levels.items() if len(found) > 1}


def _colour_factor(subjects: list[SubjectFacts], levels: dict[str, list[str]]) -> str:
    for name in levels:
        if name.rsplit(".", 1)[-1] == "pattern":
            return name
    if len({s.letters for s in subjects}) > 1:
        # The patterns differ without being a factor, e.g. among pretrained subjects: every subject its own colour.
        return ""
    return max(levels, key=lambda name: (len(levels[name]) <= 5, len(levels[name])), default="")


def _shades(subjects: list[SubjectFacts], colours: dict[str, str]) -> dict[str, palette.Shade]:
    patterns = {colours[s.label]: s.letters for s in subjects}
    if all(patterns.values()) and len(set(patterns.values())) == len(patterns):
        by_pattern = palette.pattern_shades({s.letters: s.mixers for s in subjects})
        return {colour: by_pattern[pattern] for colour, pattern in patterns.items()}
    return palette.level_shades(list(patterns))


def _level_text(name: str, level: str) -> str:
    short = name.rsplit(".", 1)[-1].replace("_", " ")
    if short == "part":
        # The parts of a study have names of their own.
        return level
    # A switch carries its name in its level: `markers`, `no markers`.
    return level if level.replace("_", " ") in (short, f"no {short}") else f"{short} {level}"


def _panel_order(
    subjects: list[SubjectFacts], names: list[str], levels: dict[str, list[str]], panel_of: dict[str, str]
) -> Callable[[str], tuple[int, ...]]:
    """The last factor varies fastest, so that panels fall into a grid."""
    order = {panel_of[s.label]: tuple(levels[name].index(s.factors[name]) for name in names) for s in subjects}
    return order.__getitem__


def _columns(panels: int, inner: int) -> int:
    if panels <= 4:
        return max(1, panels)
    return inner if 2 <= inner <= 4 else 3
