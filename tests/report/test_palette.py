from __future__ import annotations

import itertools

import numpy as np
import pytest

from longspan.report.arms import arrange
from longspan.report.data import ReportInput
from longspan.report.palette import letter_shade, level_shades, pattern_shades

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


@pytest.mark.parametrize("deficiency", DEFICIENCIES)
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_families_and_their_hybrid_stay_apart_for_colour_blind_readers(deficiency: str, theme: str) -> None:
    shades = pattern_shades(["AAAA", "MMMM", "GGGG", "AMAM"])
    seen = {p: lab(getattr(s, theme), np.array(DEFICIENCIES[deficiency])) for p, s in shades.items()}
    for a, b in itertools.combinations(seen, 2):
        assert np.linalg.norm(seen[a] - seen[b]) > 15, (a, b)


def test_a_pure_pattern_has_its_mixers_colour_whatever_else_is_in_the_report() -> None:
    assert pattern_shades(["MM", "AMAM", "AAAAAAAA"])["AAAAAAAA"] == letter_shade("A")
    assert pattern_shades(["AAAA"])["AAAA"] == letter_shade("A")


def test_many_hybrids_and_many_levels_have_colours_of_their_own() -> None:
    patterns = ["AAMMAAMMAA", "MAMMAMMMA", "AMAMAMAM", "MAMAMAMA", "AMMMMMMA", "AAMMMMAA", "AMMMMMA", "MMMMAAAA", "AMG"]
    assert len({s.light for s in pattern_shades(patterns).values()}) == len(patterns)
    assert len({s.light for s in level_shades([str(i) for i in range(12)]).values()}) == 12


def test_crossed_factors_become_colours_and_panels(leakage_report: ReportInput) -> None:
    arms = arrange(leakage_report)
    assert arms.colour_by == "pattern"
    assert arms.panels == ("isolation full", "isolation attention", "isolation state", "isolation none")
    assert arms["MMMM/full"].short == "MMMM"
    assert arms["MMMM/full"].variable == arms["MMMM/none"].variable
