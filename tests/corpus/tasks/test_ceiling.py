"""What so many bits allow: no rule is above it, and good ones come near."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from longspan.corpus.tasks.ceiling import most_right


def expected(sources: np.ndarray, codewords: np.ndarray) -> float:
    """Share of right answers of the best writer for these replies: for every source the reply that agrees most."""
    agree = (sources[:, None, :] == codewords[None, :, :]).mean(-1)
    return float(agree.max(1).mean())


@pytest.mark.parametrize(("values", "answers", "bits"), [(2, 2, 1), (2, 3, 1), (2, 4, 1), (3, 2, 1), (2, 3, 2)])
def test_the_best_of_all_codes_is_not_above_it(values: int, answers: int, bits: int) -> None:
    sources = np.array(list(itertools.product(range(values), repeat=answers)))
    best = max(expected(sources, sources[list(code)]) for code in itertools.combinations(range(len(sources)), 2**bits))
    ceiling = most_right(answers, values, answers * math.log2(values), bits)
    assert best <= ceiling
    # A bound that always said 1 would be kept, too.
    assert ceiling < best + 0.2


def test_the_best_code_for_distinct_answers_is_not_above_it() -> None:
    sources = np.array(list(itertools.permutations(range(4), 3)))
    every = np.array(list(itertools.product(range(4), repeat=3)))
    best = max(expected(sources, every[list(code)]) for code in itertools.combinations(range(len(every)), 2))
    assert best <= most_right(3, 4, math.log2(24), 1) < 0.9


@pytest.mark.parametrize("bits", [4, 8, 12])
def test_random_codes_come_near_it(bits: int) -> None:
    """2^B random replies to 16 questions of two values each: the longer, the nearer (Cover & Thomas 2006, 10.4)."""
    generator = np.random.default_rng(0)
    sources, codewords = generator.integers(2, size=(400, 16)), generator.integers(2, size=(2**bits, 16))
    ceiling = most_right(16, 2, 16, bits)
    assert ceiling - 0.08 < expected(sources, codewords) < ceiling + 0.01


@pytest.mark.parametrize("share", [0.0, 0.25, 0.5, 0.9])
def test_keeping_some_answers_whole_and_guessing_the_others_is_below_it(share: float) -> None:
    kept = share + (1 - share) / 16
    assert kept <= most_right(20, 16, 80, 80 * share) + 1e-9
    assert share in (0.0, 1.0) or kept < most_right(20, 16, 80, 80 * share) - 0.02


def test_every_answer_needs_every_bit_and_no_bit_leaves_guessing() -> None:
    assert most_right(16, 17, 16 * math.log2(17), 16 * math.log2(17)) == 1.0
    assert most_right(16, 17, 16 * math.log2(17), 60.0) < 1.0
    assert most_right(16, 17, 16 * math.log2(17), 0.0) == pytest.approx(1 / 17, abs=1e-6)
    falling = [most_right(16, 17, 65.4, bits) for bits in (64, 32, 16, 8)]
    assert falling == sorted(falling, reverse=True)
