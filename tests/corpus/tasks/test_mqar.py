"""MQAR is Zoology's: who asks for what, where, and what cannot be asked."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longspan.corpus.packing import IGNORE
from longspan.foundation.errors import UserError

from .tiny_tasks import draw, task_of


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), filler=st.sampled_from([0, 16]))
def test_mqar_is_that_of_zoology(seed: int, filler: int) -> None:
    task = task_of("mqar", filler=filler)
    example = draw(task, seed)
    n = example.slices["pairs"]
    keys, values = example.inputs[0 : 2 * n : 2], example.inputs[1 : 2 * n : 2]
    assert len(set(keys)) == len(set(values)) == n
    assert keys.min() >= 1
    assert keys.max() < 64
    assert values.min() >= 64
    assert values.max() < 128
    places = np.flatnonzero(example.labels != IGNORE)
    assert len(places) == n
    assert np.all(places % 2 == 0)
    assert places.min() >= 2 * n
    # Every key once, with the value that stood beside it.
    of = dict(zip(keys.tolist(), values.tolist(), strict=True))
    assert sorted(example.inputs[places]) == sorted(keys)
    assert all(of[int(example.inputs[p])] == example.labels[p] for p in places)
    rest = np.delete(example.inputs[2 * n :], places - 2 * n)
    assert np.all(rest == 0) if filler == 0 else np.all(rest >= 128)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), size=st.sampled_from([1, 4, 12]))
def test_with_a_border_every_row_of_mqar_turns_at_the_same_place(seed: int, size: int) -> None:
    task = task_of("mqar", pairs=[1, 4, 12], border=30)
    example = draw(task, seed, size)
    keys, values = example.inputs[30 - 2 * size : 30 : 2], example.inputs[31 - 2 * size : 30 : 2]
    assert np.all(example.inputs[: 30 - 2 * size] == 0)
    assert np.all(example.labels[:30] == IGNORE)
    asked = np.flatnonzero(example.labels != IGNORE)
    of = dict(zip(keys.tolist(), values.tolist(), strict=True))
    assert sorted(example.inputs[asked]) == sorted(keys)
    assert all(of[int(example.inputs[p])] == example.labels[p] for p in asked)
    assert task.handover() == 30
    assert task_of("mqar").handover() is None


def test_rows_of_every_number_of_pairs_ask_as_many_questions_where_that_is_asked_for() -> None:
    task, generator = task_of("mqar", pairs=[1, 4, 16], balance="questions"), np.random.default_rng(0)
    drawn = np.array([task.draw_size(generator, 0) for _ in range(4000)])
    for size in (1, 4, 16):
        assert abs(drawn[drawn == size].sum() / drawn.sum() - 1 / 3) < 0.04
    grown = task_of("mqar", pairs=[1, 4, 16], balance="questions", curriculum={"kind": "grow", "short": 4, "steps": 9})
    assert {grown.draw_size(generator, 0) for _ in range(40)} == {1, 4}


def test_values_of_mqar_that_are_drawn_by_themselves_are_all_equally_likely() -> None:
    task = task_of("mqar", vocab_size=10, pairs=[4], length=16, distinct=False)
    drawn = np.array([draw(task, seed).answer for seed in range(2000)])
    assert set(np.unique(drawn)) == {5, 6, 7, 8, 9}
    # Four values of five are distinct in 19 % of all rows, and the bits are all there.
    alone = np.mean([len(set(row)) == 4 for row in drawn.tolist()])
    assert abs(alone - 120 / 625) < 0.04
    assert task.bits(4) == 4 * math.log2(5)
    assert task.most_right(4, task.bits(4)) == 1.0
    assert task.most_right(4, task.bits(4) - 1) < 1.0
    # Distinct ones are less to remember.
    exact = math.log2(math.perm(64, 8))
    assert task_of("mqar").most_right(8, exact - 0.1) < 1.0 == task_of("mqar").most_right(8, exact + 1e-9)
    assert exact < task_of("mqar").bits(8)


def test_gaps_of_mqar_follow_the_power_law() -> None:
    task = task_of("mqar", pairs=[1])
    firsts = [int(np.flatnonzero(draw(task, seed).labels != IGNORE)[0]) for seed in range(2000)]
    gaps = (np.array(firsts) - 2) // 2
    shares = 0.01 * np.arange(1, 32) ** (0.01 - 1)
    shares /= shares.sum()
    for gap in (0, 1, 5):
        assert abs((gaps == gap).mean() - shares[gap]) < 4 * math.sqrt(shares[gap] / 2000)


def test_filler_comes_from_the_given_generator() -> None:
    """The published code of MQAR draws it from a global one."""
    task = task_of("mqar", filler=16)
    assert np.array_equal(draw(task, 3).inputs, draw(task, 3).inputs)
    assert not np.array_equal(draw(task, 3).inputs, draw(task, 4).inputs)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"pairs": [17]}, r"17 pairs in 64 positions\n.*4 x pairs <= length: at most 16"),
        ({"vocab_size": 64}, "vocab_size = 64 for rows of 64"),
        ({"length": 63}, "an even number of positions"),
        ({"pairs": []}, "one or more numbers of pairs"),
        ({"border": 31}, r"border = 31 in rows of 64\n.*an even number below the length"),
        ({"border": 64}, "border = 64 in rows of 64"),
        ({"border": 14}, r"8 pairs with the border at 14 of 64 positions\n.*at most 7 pairs"),
        ({"border": 50}, "8 pairs with the border at 50 of 64 positions"),
        ({"vocab_size": 17, "distinct": False}, "vocab_size = 17 for rows of 64"),
    ],
)
def test_pairs_that_do_not_fit_are_refused_with_the_rule(given: dict[str, object], words: str) -> None:
    with pytest.raises(UserError, match=words):
        task_of("mqar", **given)


def test_more_pairs_than_a_row_holds_are_refused() -> None:
    with pytest.raises(UserError, match="17 pairs in 64 positions"):
        draw(task_of("mqar"), 0, size=17)
