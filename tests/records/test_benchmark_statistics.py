"""Intervals and tests on data shaped like LongBench-v2's: right or wrong answers, several items about one document."""

from __future__ import annotations

import math
from itertools import combinations

import numpy as np
import pytest

from longspan.records import statistics as s

DRAWS = 10_000
BY_CHANCE = 2 * math.sqrt(0.05 * 0.95 / DRAWS)
"""Two standard errors of a rate of 5 % over so many draws."""
SIZES = np.array([1] * 415 + [2] * 23 + [3] * 5 + [6] * 2 + [15])
"""Items of each of 446 documents, 503 in all, the largest 15: as LongBench-v2 shares its documents."""


def logistic(value: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-value))


class Population:
    """Documents of differing difficulty with items of differing difficulty; subjects answer each on their own."""

    def __init__(self, skills: tuple[float, ...], *, document: float = 1.0, item: float = 1.0) -> None:
        self.skills, self.document, self.item = skills, document, item
        rng = np.random.default_rng(0)
        effects = rng.normal(0, document, 400_000) + rng.normal(0, item, 400_000)
        self.truth = [float(logistic(skill + effects).mean()) for skill in skills]

    def draw(self, rng: np.random.Generator, sizes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Right answers (items, subjects) and the document of each item; documents have sizes drawn anew."""
        drawn = rng.choice(sizes, size=len(sizes))
        owner = np.repeat(np.arange(len(sizes)), drawn)
        effects = rng.normal(0, self.document, len(sizes))[owner] + rng.normal(0, self.item, len(owner))
        chances = logistic(np.array(self.skills) + effects[:, None])
        return (rng.random(chances.shape) < chances).astype(float), owner


def by_document(values: np.ndarray, owner: np.ndarray, documents: int) -> np.ndarray:
    return np.bincount(owner, weights=values, minlength=documents)


def accuracy_coverage(draws: int, sizes: np.ndarray, skill: float) -> float:
    population = Population((skill,))
    rng = np.random.default_rng(len(sizes))
    hits = 0
    for _ in range(draws):
        right, owner = population.draw(rng, sizes)
        trials = by_document(np.ones(len(owner)), owner, len(sizes))
        interval = s.proportion_interval(by_document(right[:, 0], owner, len(sizes)), trials)
        hits += interval.low <= population.truth[0] <= interval.high
    return hits / draws


def differences(draws: int, sizes: np.ndarray, skills: tuple[float, float], seed: int) -> tuple[float, float]:
    """Coverage of the paired difference's interval, and the share of p < 0.05."""
    population = Population(skills)
    truth = population.truth[0] - population.truth[1]
    rng = np.random.default_rng(seed)
    covered = found = 0
    for start in range(0, draws, 100):
        columns: list[list[np.ndarray]] = [[], [], []]
        for _ in range(100):
            right, owner = population.draw(rng, sizes)
            for side in (0, 1):
                columns[side].append(by_document(right[:, side], owner, len(sizes)))
            columns[2].append(by_document(np.ones(len(owner)), owner, len(sizes)))
        a, b, trials = (np.stack(each, 1) for each in columns)
        for boot in s.paired_bootstrap(a, trials, b, trials, seed=start, resamples=2_000):
            covered += boot.interval.low <= truth <= boot.interval.high
            found += boot.p < 0.05
    return covered / draws, found / draws


def mcnemar_alarms(draws: int, items: int, subjects: int) -> tuple[float, float]:
    """Share of p < 0.05 between the first two of equal subjects, and of draws with any pair below 5 % after Holm."""
    population = Population((-0.9,) * subjects)
    rng = np.random.default_rng(items)
    alarms = family = 0
    for _ in range(draws):
        right, _ = population.draw(rng, np.ones(items, dtype=int))
        p = [
            s.mcnemar(int((right[:, a] > right[:, b]).sum()), int((right[:, b] > right[:, a]).sum()))
            for a, b in combinations(range(subjects), 2)
        ]
        alarms += p[0] < 0.05
        family += min(s.holm(p)) < 0.05
    return alarms / draws, family / draws


def test_in_small_intervals_and_tests_hold() -> None:
    assert 0.92 <= accuracy_coverage(500, SIZES[::4], -0.9) <= 0.98
    covered, _ = differences(300, SIZES[::4], (-0.6, -0.9), 1)
    assert 0.91 <= covered <= 0.98
    assert mcnemar_alarms(300, 120, 2)[0] <= 0.08


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sizes", "skill"),
    [(SIZES, -0.9), (np.ones(503, dtype=int), -0.9), (np.ones(108, dtype=int), -0.9), (np.ones(503, dtype=int), -2.5)],
    ids=["documents", "items", "long", "null-rate"],
)
def test_accuracy_intervals_cover_over_ten_thousand_draws(sizes: np.ndarray, skill: float) -> None:
    found = accuracy_coverage(DRAWS, sizes, skill)
    print(f"coverage {found:.4f}")
    assert 0.94 <= found <= 0.96


@pytest.mark.slow
@pytest.mark.parametrize("skills", [(-0.6, -0.9), (-0.9, -0.9)], ids=["different", "equal"])
@pytest.mark.parametrize("sizes", [SIZES, np.ones(108, dtype=int)], ids=["documents", "long"])
def test_paired_differences_over_ten_thousand_draws(sizes: np.ndarray, skills: tuple[float, float]) -> None:
    covered, found = differences(DRAWS, sizes, skills, 2)
    print(f"coverage {covered:.4f}, p < 0.05 in {found:.4f}")
    assert 0.94 <= covered <= 0.96
    if skills[0] == skills[1]:
        assert found <= 0.05 + BY_CHANCE


@pytest.mark.slow
@pytest.mark.parametrize("items", [108, 503])
def test_mcnemar_and_holm_raise_few_false_alarms_over_ten_thousand_draws(items: int) -> None:
    alarms, family = mcnemar_alarms(DRAWS, items, 4)
    print(f"McNemar {alarms:.4f}, any of 6 pairs after Holm {family:.4f}")
    assert alarms <= 0.05 + BY_CHANCE
    assert family <= 0.05 + BY_CHANCE
