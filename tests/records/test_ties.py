"""Ties: two subjects share a letter exactly where they cannot be told apart."""

from __future__ import annotations

from itertools import combinations

from hypothesis import given
from hypothesis import strategies as st

from longspan.records.ties import ranked_groups, tie_groups

NAMES = "abcdefgh"


@st.composite
def told_apart(draw: st.DrawFn) -> tuple[str, set[frozenset[str]]]:
    order = NAMES[: draw(st.integers(1, len(NAMES)))]
    pairs = [frozenset(pair) for pair in combinations(order, 2)]
    return order, {pair for pair in pairs if draw(st.booleans())}


@given(told_apart())
def test_two_share_a_group_exactly_where_they_cannot_be_told_apart(case: tuple[str, set[frozenset[str]]]) -> None:
    order, apart = case
    groups = tie_groups(order, lambda a, b: frozenset((a, b)) in apart)
    for a, b in combinations(order, 2):
        assert any(a in group and b in group for group in groups) == (frozenset((a, b)) not in apart)
    assert {subject for group in groups for subject in group} == set(order)
    assert len(set(groups)) == len(groups)


@given(told_apart())
def test_every_subject_stands_in_one_ranked_group_with_those_that_tie_with_its_best(
    case: tuple[str, set[frozenset[str]]],
) -> None:
    order, apart = case
    groups = ranked_groups(order, lambda a, b: frozenset((a, b)) in apart)
    assert sorted(subject for group in groups for subject in group) == sorted(order)
    rest = list(order)
    for best, *others in groups:
        assert best == rest[0]
        assert others == [each for each in rest[1:] if frozenset((best, each)) not in apart]
        rest = [each for each in rest if each not in (best, *others)]


def test_a_tie_with_the_best_across_a_subject_in_between_is_shown() -> None:
    # b differs from both; a and c cannot be told apart, so a does not stand alone.
    apart = {frozenset("ab"), frozenset("bc")}
    assert tie_groups("abc", lambda a, b: frozenset((a, b)) in apart) == [("a", "c"), ("b",)]
    assert ranked_groups("abc", lambda a, b: frozenset((a, b)) in apart) == [["a", "c"], ["b"]]


def test_forty_subjects_without_any_pattern_take_few_groups() -> None:
    order = [str(i) for i in range(40)]
    groups = tie_groups(order, lambda a, b: (int(a) * 7 + int(b) * 7) % 5 == 0)
    assert len(groups) <= 40 * 39 // 2
