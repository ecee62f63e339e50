"""Patterns read as written, and bad ones point at the offending character."""

from __future__ import annotations

import pytest

from longspan.foundation.errors import UserError
from longspan.models.config import ModelConfig
from longspan.models.pattern import letters_of, parse_pattern


@pytest.mark.parametrize(
    ("pattern", "layers"),
    [
        ("A", "A"),
        ("AAMM", "AAMM"),
        ("(AM)4", "AMAMAMAM"),
        ("M6A2", "MMMMMMAA"),
        ("((AM)2G)2", "AMAMGAMAMG"),
        ("A(M)3", "AMMM"),
        ("(A(MG)2)1M", "AMGMGM"),
        ("M12", "M" * 12),
        ("[AM]", "[AM]"),
        ("[AM]3", "[AM][AM][AM]"),
        ("([AM]M)2", "[AM]M[AM]M"),
        ("A[AAM]2[MG]", "A[AAM][AAM][MG]"),
    ],
)
def test_patterns_expand(pattern, layers):
    assert "".join(parse_pattern(pattern)) == layers


def test_a_group_is_one_layer():
    assert parse_pattern("M([AM]G)2[GGA]") == ["M", "[AM]", "G", "[AM]", "G", "[GGA]"]
    assert letters_of("[GGA]") == "GGA"
    assert letters_of("G") == "G"


@pytest.mark.parametrize(
    ("pattern", "at", "word"),
    [
        ("AM-A", 2, "no meaning"),
        ("(AM", 0, "never closed"),
        ("A(M(G)", 1, "never closed"),
        ("AM)2", 2, "never opened"),
        ("4A", 0, "repeats the layer"),
        ("A٣", 1, "no meaning"),
        ("A()", 1, "hold no layer"),
        ("AM0", 2, "cannot repeat 0"),
        ("A99999", 1, "cannot repeat 99999"),
        ("A[AM", 1, "never closed"),
        ("(A[MG)", 5, "`[` is still open"),
        ("AM]", 2, "never opened"),
        ("(AM]", 3, "never opened"),
        ("A[]", 1, "hold no mixer"),
        ("A[M]2", 1, "none at its side"),
        ("[A2M]", 2, "no number inside"),
        ("[2AM]", 1, "no number inside"),
        ("[A(MG)]", 2, "no brackets inside"),
        ("[A[MG]]", 2, "no brackets inside"),
        ("[A,M]", 2, "',' has no meaning"),
        ("[AZ]", 2, "no mixer has the letter `Z`"),
        ("[AM]0", 4, "cannot repeat 0"),
        ("(A64)65", 5, "this makes 4,160 layers"),
        ("A4096M", 5, "more than 4,096 layers here"),
        ("A M", 1, "no meaning"),
        ("AÄ", 1, "no meaning"),
        ("AZ", 1, "no mixer has the letter `Z`"),
    ],
)
def test_bad_patterns_point_at_the_character(pattern, at, word):
    with pytest.raises(UserError) as caught:
        parse_pattern(pattern, {"A", "M", "G"})
    problem, shown, caret = caught.value.given.split("\n")
    assert word in problem
    assert shown.strip() == pattern.strip()
    assert caret.index("^") - 4 == at


def test_a_long_pattern_is_shown_around_the_character_on_one_line():
    for at in (0, 20, 250, 499):
        pattern = "A" * at + "Z" + "M" * (499 - at)
        with pytest.raises(UserError) as caught:
            parse_pattern(pattern, {"A", "M"})
        problem, shown, caret = caught.value.given.split("\n")
        assert f"character {at + 1} of a pattern: no mixer" in problem
        assert shown[caret.index("^")] == "Z"
        assert len(shown) <= 70
        assert (shown.strip()[0] == "…", shown[-1] == "…") == (at > 32, at < 467)


@pytest.mark.parametrize("character", ["\n", "\t", "\x1b[31m"])
def test_what_does_not_print_moves_no_caret(character):
    with pytest.raises(UserError) as caught:
        parse_pattern(f"AM{character}Z")
    problem, shown, caret = caught.value.given.split("\n")
    assert shown.isprintable()
    assert shown[caret.index("^")] == "\N{REPLACEMENT CHARACTER}"
    assert repr(character[0]) in problem


@pytest.mark.parametrize("pattern", ["", "((((A4096)4096)4096)4096)4096", "A" * 5000])
def test_empty_and_endless_patterns_are_refused(pattern):
    with pytest.raises(UserError):
        parse_pattern(pattern)


def test_the_model_names_the_caret_too():
    with pytest.raises(UserError, match=r"model: pattern 'AQ': no mixer has the letter `Q`"):
        ModelConfig.parse({"pattern": "AQ", "width": 16, "heads": 2}, "model")


def test_the_pattern_written_out_reads_as_the_same_layers():
    layers = parse_pattern("([AM]M2)3(A[GM])2")
    assert parse_pattern("".join(layers)) == layers
