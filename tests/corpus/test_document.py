"""Documents and the hash split."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from longspan.corpus.document import assign_split, check_split, content_id
from longspan.foundation.errors import UserError

RATIOS = {"train": 0.9, "validation": 0.05, "test": 0.05}


@given(st.lists(st.text(), unique=True), st.lists(st.text(), unique=True), st.integers())
def test_adding_documents_moves_none(ids: list[str], more: list[str], seed: int) -> None:
    before = {name: assign_split(name, RATIOS, seed) for name in ids}
    after = {name: assign_split(name, RATIOS, seed) for name in [*more, *reversed(ids)]}
    assert before.items() <= after.items()


@given(st.text(), st.floats(0, 0.5), st.integers())
def test_changing_the_validation_share_leaves_the_test_split_alone(name: str, validation: float, seed: int) -> None:
    ratios = {"train": 1 - validation - 0.2, "validation": validation, "test": 0.2}
    assert (assign_split(name, ratios, seed) == "test") == (
        assign_split(name, {"train": 0.8, "test": 0.2}, seed) == "test"
    )


def test_the_shares_are_reached_and_seeds_are_independent() -> None:
    splits = Counter(assign_split(str(i), RATIOS, 0) for i in range(20_000))
    assert splits["test"] == pytest.approx(1000, abs=120)
    assert splits["validation"] == pytest.approx(1000, abs=120)
    both = sum(assign_split(str(i), RATIOS, 0) == assign_split(str(i), RATIOS, 1) == "test" for i in range(20_000))
    assert both == pytest.approx(50, abs=30)


def test_the_split_is_the_same_on_every_machine() -> None:
    splits = [assign_split(str(i), {"train": 0.5, "validation": 0.25, "test": 0.25}, 7) for i in range(8)]
    assert splits == ["train", "test", "validation", "train", "validation", "test", "validation", "train"]


@pytest.mark.parametrize(
    "ratios", [{"train": 0.9}, {"train": 1.2, "test": -0.2}, {"train": 0.5, "dev": 0.5}, {"train": float("nan")}]
)
def test_shares_that_are_no_split_of_one_whole_are_refused(ratios: dict[str, float]) -> None:
    with pytest.raises(UserError, match="split"):
        assign_split("x", ratios, 0)


def test_an_unknown_split_is_refused_with_the_allowed_names() -> None:
    with pytest.raises(UserError, match=r"here: split 'dev'[\s\S]*train, validation, test"):
        check_split("dev", "here")


@given(st.text(), st.text())
def test_a_content_id_hangs_on_the_text_alone(a: str, b: str) -> None:
    assert (content_id(a) == content_id(b)) == (a == b)
