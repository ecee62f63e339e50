from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest

from longspan.models.mixers import registered
from longspan.report.arms import arrange
from longspan.report.data import ReportInput
from longspan.report.palette import (
    NAMES,
    contrast,
    letter_names,
    level_shades,
    mixer_shade,
    pattern_shades,
    split_layers,
)

# Full colour-vision deficiency in linear sRGB: Machado, Oliveira and Fernandes (2009).
DEFICIENCIES = {
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
}


def lab(colour: str, matrix: np.ndarray) -> np.ndarray:
    srgb = np.array([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    linear = np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)
    seen = np.clip(matrix @ linear, 0, 1)
    xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]) @ seen
    f = np.cbrt(xyz / np.array([0.9505, 1.0, 1.089]))
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


@pytest.mark.parametrize("deficiency", [*DEFICIENCIES, "none"])
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_mixers_and_a_hybrid_stay_apart_for_colour_blind_readers(deficiency: str, theme: str) -> None:
    shades = pattern_shades([4 * letter for letter in NAMES] + ["AMAM"])
    matrix = np.array(DEFICIENCIES.get(deficiency, np.eye(3)))
    seen = {p: lab(getattr(s, theme), matrix) for p, s in shades.items()}
    for a, b in itertools.combinations(seen, 2):
        assert np.linalg.norm(seen[a] - seen[b]) > 15, (a, b)


def test_a_pure_pattern_has_its_mixers_colour_whatever_else_is_in_the_report() -> None:
    assert pattern_shades(["MM", "AMAM", "AAAAAAAA"])["AAAAAAAA"] == mixer_shade("attention")
    assert pattern_shades(["AAAA"])["AAAA"] == mixer_shade("attention")


def test_many_hybrids_and_many_levels_have_colours_of_their_own() -> None:
    patterns = ["AAMMAAMMAA", "MAMMAMMMA", "AMAMAMAM", "MAMAMAMA", "AMMMMMMA", "AAMMMMAA", "AMMMMMA", "MMMMAAAA", "AMG"]
    assert len({s.light for s in pattern_shades(patterns).values()}) == len(patterns)
    assert len({s.light for s in level_shades([str(i) for i in range(12)]).values()}) == 12


@pytest.mark.parametrize(("theme", "paper"), [("light", "#ffffff"), ("dark", "#14171b")])
def test_ten_levels_are_clear_on_paper_and_apart_for_colour_blind_readers(theme: str, paper: str) -> None:
    shades = level_shades([str(i) for i in range(10)])
    colours = [getattr(shade, theme) for shade in shades.values()]
    assert min(contrast(colour, paper) for colour in colours) > (3 if theme == "dark" else 2)
    for deficiency, least in (("none", 10), ("protanopia", 7), ("deuteranopia", 7)):
        matrix = np.array(DEFICIENCIES.get(deficiency, np.eye(3)))
        for a, b in itertools.combinations(colours, 2):
            assert np.linalg.norm(lab(a, matrix) - lab(b, matrix)) > least, (deficiency, a, b)


def test_the_colour_follows_the_true_mixer_and_not_the_letter() -> None:
    bound = pattern_shades({"MM": ["gated_short_convolution"] * 2, "BB": ["attention"] * 2, "AA": ["attention"] * 2})
    assert bound["MM"] == mixer_shade("gated_short_convolution")
    assert bound["AA"] == mixer_shade("attention")
    assert bound["BB"] != bound["AA"]
    assert len({mixer_shade(name) for name in ("moving_average", "running_sum", "attention")}) == 3


def test_every_shipped_mixer_has_a_colour_of_its_own() -> None:
    shipped = {letter: mixer for letter, mixer in registered().items() if mixer.__module__.startswith("longspan.")}
    assert {letter: mixer.name for letter, mixer in shipped.items()} == NAMES
    assert len({mixer_shade(name).light for name in NAMES.values()}) == len(NAMES)


def test_side_by_side_mixers_share_their_layer() -> None:
    assert split_layers("A[AM]M[MGA]") == ["A", "[AM]", "M", "[MGA]"]
    names = letter_names("M[BM]", ["mamba2", "[attention+mamba2]"])
    assert names == {"M": "mamba2", "B": "attention"}
    alone, even = pattern_shades(["[AM][AM]"])["[AM][AM]"], pattern_shades(["AM"])["AM"]
    assert alone == even
    together = pattern_shades(["[AM][AM]", "AMAM", "[AA][AA]", "AAAA"])
    assert len({shade.light for shade in together.values()}) == 4


def test_crossed_factors_become_colours_and_panels(leakage_report: ReportInput) -> None:
    arms = arrange(leakage_report)
    assert arms.colour_by == "pattern"
    assert arms.panels == ("isolation full", "isolation attention", "isolation state", "isolation none")
    assert arms["MMMM/full"].short == "MMMM"
    assert arms["MMMM/full"].variable == arms["MMMM/none"].variable


@pytest.mark.parametrize("number", [4, 6, 12])
def test_subjects_that_share_no_panel_are_compared_in_one(quickstart_report: ReportInput, number: int) -> None:
    one = quickstart_report.subjects[0]
    kinds = [("attention", "AA"), ("mamba2", "MM"), ("gated_deltanet", "DD")]
    subjects = [
        replace(one, label=f"v{n}", letters=letters, mixers=(mixer, mixer), factors={"variant": f"v{n}"})
        for n, (mixer, letters) in zip(range(number), kinds * number, strict=False)
    ]
    arms = arrange(replace(quickstart_report, subjects=subjects))
    assert len(arms.panels) == 1
    assert len({arms[subject.label].variable for subject in subjects}) == number
    # Where a panel holds several of very many, there are panels.
    crossed = [
        replace(each, label=f"{each.label} {size}", factors={**each.factors, "width": size})
        for each in subjects
        for size in ("8", "16")
    ]
    assert (len(arrange(replace(quickstart_report, subjects=crossed)).panels) > 1) == (2 * number > 8)


COPYING = {"AA": "attention", "HH": "attention", "BB": "attention", "RR": "attention", "NN": "attention",
           "MM": "mamba2", "LL": "lstm", "mm": "mamba1", "MH": "mamba2 attention"}  # fmt: skip
RECALL = {"AA": "attention", "MM": "mamba2", "PP": "mamba2", "QQ": "mamba2", "mm": "mamba1", "DD": "gated_deltanet",
          "LL": "lstm", "AM": "attention mamba2"}  # fmt: skip


@pytest.mark.parametrize("mixers", [COPYING, RECALL], ids=["copying", "recall"])
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_one_mixer_with_several_settings_has_colours_apart(mixers: dict[str, str], theme: str) -> None:
    named = {pattern: (2 * names.split())[:2] for pattern, names in mixers.items()}
    shades = pattern_shades(named)
    paper = {"light": "#ffffff", "dark": "#14171b"}[theme]
    assert all(contrast(getattr(shade, theme), paper) > 2 for shade in shades.values())
    for deficiency, least in (("none", 15), ("protanopia", 7), ("deuteranopia", 7)):
        matrix = np.array(DEFICIENCIES.get(deficiency, np.eye(3)))
        seen = {p: lab(getattr(s, theme), matrix) for p, s in shades.items()}
        for a, b in itertools.combinations(seen, 2):
            assert np.linalg.norm(seen[a] - seen[b]) > least, (deficiency, a, b)


def test_subjects_of_the_same_mixers_differ_in_dashes_and_points_too(quickstart_report: ReportInput) -> None:
    one = quickstart_report.subjects[0]
    alike = [replace(one, label=name, letters=2 * name, factors={"pattern": name}, mixers=("attention",) * 2)
             for name in "AHB"]  # fmt: skip
    other = replace(one, label="M", letters="MM", factors={"pattern": "M"}, mixers=("mamba2",) * 2)
    arms = arrange(replace(quickstart_report, subjects=[*alike, other]))
    assert len({arms.dashes[arms[name].stroke] for name in "AHB"}) == 3
    assert len({arms[name].shape for name in "AHB"}) == 3
    assert arms["M"].style == 0
