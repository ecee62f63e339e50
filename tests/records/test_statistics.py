"""Claims about intervals and tests: equal to scipy where it has them, and honest in simulation."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from longspan.foundation.errors import UserError
from longspan.records import statistics as s


@given(st.integers(1, 600), st.data())
def test_wilson_and_clopper_pearson_equal_scipy(trials: int, data: st.DataObject) -> None:
    successes = data.draw(st.integers(0, trials))
    reference = stats.binomtest(successes, trials)
    for ours, method in ((s.wilson, "wilson"), (s.clopper_pearson, "exact")):
        interval, theirs = ours(successes, trials), reference.proportion_ci(0.95, method=method)
        assert (interval.low, interval.high) == pytest.approx((theirs.low, theirs.high), abs=1e-9)
        assert 0 <= interval.low <= successes / trials <= interval.high <= 1


def test_wilson_half_widths_are_those_of_the_fact_sheet() -> None:
    for trials, half in ((503, 4.0), (311, 5.1), (215, 6.1), (108, 8.5), (50, 12.3)):
        interval = s.wilson(0.3 * trials, trials)
        assert (interval.high - interval.low) * 50 == pytest.approx(half, abs=0.06)


def test_impossible_counts_are_refused() -> None:
    with pytest.raises(UserError):
        s.wilson(3, 0)
    with pytest.raises(UserError):
        s.clopper_pearson(4, 3)


@pytest.mark.parametrize("method", [s.wilson, s.clopper_pearson])
def test_proportion_intervals_cover_exactly_computed(method: object) -> None:
    """Coverage is a finite sum over the binomial, so no simulation is needed."""
    coverages = []
    for trials in (20, 60, 200):
        intervals = [method(k, trials) for k in range(trials + 1)]  # type: ignore[operator]
        for truth in np.linspace(0.1, 0.9, 33):
            weight = stats.binom.pmf(np.arange(trials + 1), trials, truth)
            coverages.append(sum(w for w, i in zip(weight, intervals, strict=True) if i.low <= truth <= i.high))
    if method is s.wilson:
        assert np.mean(coverages) == pytest.approx(0.95, abs=0.01)
    else:
        assert min(coverages) >= 0.95


def test_one_trial_per_cluster_is_a_plain_sample_and_copies_add_nothing() -> None:
    right = np.array([1.0, 0.0] * 30)
    assert s.effective_trials(right, np.ones(60)) == 60
    copies = s.effective_trials(right * 4, np.full(60, 4.0))
    assert 50 < copies <= 60
    assert s.effective_trials(np.full(20, 3.0), np.full(20, 3.0)) == 20
    assert s.effective_trials(np.array([3.0, 0.0]), np.array([3.0, 3.0])) == 2
    independent = np.random.default_rng(0).binomial(5, 0.5, 200).astype(float)
    assert s.effective_trials(independent, np.full(200, 5.0)) > 800


def documents(rng: np.random.Generator, clusters: int) -> tuple[np.ndarray, np.ndarray]:
    """Skewed documents: log-normal lengths, gamma-distributed loss, shorter ones harder."""
    length = np.ceil(rng.lognormal(5.5, 0.8, clusters))
    loss = 3.5 + 0.4 * rng.gamma(2, 0.7, clusters) - 0.1 * (np.log(length) - 5.5)
    return length * loss, length


def coverage(draws: int, clusters: int, resamples: int = 2_000) -> float:
    big_numerator, big_denominator = documents(np.random.default_rng(0), 2_000_000)
    truth = big_numerator.sum() / big_denominator.sum()
    rng = np.random.default_rng(clusters)
    samples = [documents(rng, clusters) for _ in range(draws)]
    hits = 0
    for start in range(0, draws, 100):
        part = samples[start : start + 100]
        boots = s.cluster_bootstrap(
            np.stack([n for n, _ in part], 1), np.stack([d for _, d in part], 1), seed=start, resamples=resamples
        )
        hits += sum(b.interval.low <= truth <= b.interval.high for b in boots)
    return hits / draws


def false_positives(draws: int, clusters: int) -> float:
    """Share of p < 0.05 between two subjects that differ by noise only; document effects are shared."""
    rng = np.random.default_rng(clusters)
    hits = 0
    for start in range(0, draws, 100):
        a, b, d = [], [], []
        for _ in range(min(100, draws - start)):
            numerator, length = documents(rng, clusters)
            noise = rng.standard_t(5, (2, clusters)) * 0.05
            a.append(numerator + length * noise[0])
            b.append(numerator + length * noise[1])
            d.append(length)
        boots = s.paired_bootstrap(
            np.stack(a, 1), np.stack(d, 1), np.stack(b, 1), np.stack(d, 1), seed=start, resamples=2_000
        )
        hits += sum(boot.p < 0.05 for boot in boots)
    return hits / draws


def test_the_cluster_bootstrap_covers_the_truth() -> None:
    assert 0.925 <= coverage(1_000, clusters=25) <= 0.975


def test_the_paired_test_raises_few_false_alarms() -> None:
    assert false_positives(1_000, clusters=25) <= 0.065


@pytest.mark.slow
@pytest.mark.parametrize("clusters", [25, 60, 200])
def test_coverage_over_ten_thousand_draws(clusters: int) -> None:
    assert 0.94 <= coverage(10_000, clusters, resamples=4_000) <= 0.965


@pytest.mark.slow
@pytest.mark.parametrize("clusters", [8, 25, 100])
def test_false_positives_over_ten_thousand_draws(clusters: int) -> None:
    assert false_positives(10_000, clusters) <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / 10_000)


def test_the_bootstrap_is_deterministic_and_independent_of_the_block_size(monkeypatch: pytest.MonkeyPatch) -> None:
    numerator, denominator = (column[:, None] for column in documents(np.random.default_rng(1), 40))
    first = s.cluster_bootstrap(numerator, denominator, seed=3)
    assert first == s.cluster_bootstrap(numerator, denominator, seed=3)
    assert first != s.cluster_bootstrap(numerator, denominator, seed=4)
    monkeypatch.setattr(s, "_BLOCK_ELEMENTS", 40 * 7)
    (blocked,) = s.cluster_bootstrap(numerator, denominator, seed=3)
    assert blocked.multiplier == pytest.approx(first[0].multiplier)


def test_weights_are_multinomial() -> None:
    weights = np.concatenate(list(s.cluster_weights(30, 4_000, seed=0)))
    assert weights.shape == (4_000, 30)
    assert (weights.sum(1) == 30).all()
    assert weights.mean() == 1
    assert weights.var() == pytest.approx(29 / 30, abs=0.02)


def test_columns_do_not_influence_each_other_and_pairing_uses_the_same_documents() -> None:
    rng = np.random.default_rng(2)
    n1, d1 = documents(rng, 30)
    n2, d2 = documents(rng, 30)
    both = s.cluster_bootstrap(np.stack([n1, n2], 1), np.stack([d1, d2], 1), seed=0)
    (alone,) = s.cluster_bootstrap(n2[:, None], d2[:, None], seed=0)
    assert (both[1].estimate, both[1].error, both[1].multiplier) == pytest.approx(
        (alone.estimate, alone.error, alone.multiplier)
    )
    shifted = n1 + 0.01 * d1 * (1 + 0.1 * rng.standard_normal(30))
    (paired,) = s.paired_bootstrap(shifted[:, None], d1[:, None], n1[:, None], d1[:, None], seed=0)
    assert paired.estimate == pytest.approx(0.01, rel=0.1)
    assert paired.half_width() < 0.05 * both[0].half_width()
    assert paired.p < 1e-6


def test_different_denominators_give_the_general_path_with_the_same_answer() -> None:
    n, d = (column[:, None] for column in documents(np.random.default_rng(3), 30))
    other = n * 1.02
    (same,) = s.paired_bootstrap(other, d, n, d, seed=0)
    (scaled,) = s.paired_bootstrap(other * 2, d * 2, n, d, seed=0)
    assert scaled.estimate == pytest.approx(same.estimate)
    assert scaled.error == pytest.approx(same.error)
    assert scaled.multiplier == pytest.approx(same.multiplier, rel=1e-6)


def test_p_is_below_five_percent_exactly_where_the_interval_leaves_out_zero() -> None:
    rng = np.random.default_rng(4)
    differences = rng.normal(0.3, 1, (20, 200))
    one = np.ones_like(differences)
    for boot in s.cluster_bootstrap(differences, one, seed=0):
        assert (boot.p < 0.05) == (boot.interval.low > 0 or boot.interval.high < 0)
    half = s.Bootstrap(1.0, 0.3, 2.5, 20)
    assert half.half_width(0.99) > half.half_width() == pytest.approx(0.75)


def test_clusters_that_agree_exactly_have_no_width_and_the_sign_test_answers() -> None:
    one = np.ones((12, 1))
    (zero,) = s.cluster_bootstrap(0 * one, one, seed=0)
    assert (zero.estimate, zero.half_width(), zero.p) == (0, 0, 1)
    (shift,) = s.cluster_bootstrap(0.3 * one * 7, 7 * one, seed=0)
    assert shift.half_width() == 0
    assert shift.p == pytest.approx(2 * 0.5**12)


def test_very_many_clusters_are_grouped_without_changing_what_they_say(monkeypatch: pytest.MonkeyPatch) -> None:
    numerator, denominator = (column[:, None] for column in documents(np.random.default_rng(8), 3_000))
    (whole,) = s.cluster_bootstrap(numerator, denominator, seed=0)
    monkeypatch.setattr(s, "MOST_CLUSTERS", 500)
    (grouped,) = s.cluster_bootstrap(numerator, denominator, seed=0)
    assert grouped.clusters == 500
    assert grouped.estimate == pytest.approx(whole.estimate)
    assert grouped.half_width() == pytest.approx(whole.half_width(), rel=0.15)


def test_too_few_resamples_or_clusters_are_refused() -> None:
    one = np.ones((6, 1))
    with pytest.raises(UserError, match="resamples"):
        s.cluster_bootstrap(one, one, seed=0, resamples=100)
    with pytest.raises(UserError, match="1 cluster"):
        s.cluster_bootstrap(one[:1], one[:1], seed=0)


def test_seeds_add_their_spread_with_few_degrees_of_freedom() -> None:
    documents_only = s.Bootstrap(0.1, 0.02, 2.0, 200)
    assert s.seed_spread([1.0], [2.0]) == s.SeedSpread()
    assert s.combined_p(documents_only, s.SeedSpread()) == documents_only.p
    spread = s.seed_spread([1.0, 1.1, 1.2])
    assert spread.freedom == pytest.approx(2)
    assert spread.half_width() == pytest.approx(float(stats.t.ppf(0.975, 2)) * 0.1 / math.sqrt(3))
    assert s.combined_half_width(documents_only, spread) == pytest.approx(math.hypot(0.04, spread.half_width()))
    assert s.combined_p(documents_only, spread) > 0.05 > documents_only.p
    welch = s.seed_spread([1.0, 1.1, 1.2], [2.0, 2.1, 2.2])
    assert welch.freedom == pytest.approx(4)
    assert s.combined_p(s.Bootstrap(0.0, 0.02, 2.0, 200), spread) == 1.0
    assert s.combined_p(s.Bootstrap(1e9, 0.02, 2.0, 200), spread) == pytest.approx(0, abs=1e-6)


def test_intervals_over_documents_and_seeds_cover() -> None:
    rng = np.random.default_rng(5)
    draws, hits = 600, 0
    for _ in range(draws):
        document = rng.normal(0, 1, 40)
        seed_effect = rng.normal(0, 0.15, 3)
        answers = document[:, None] + seed_effect + rng.normal(0, 0.3, (40, 3))
        boot = s.Bootstrap(
            float(answers.mean()), float(answers.mean(1).std(ddof=1) / math.sqrt(40)), float(stats.t.ppf(0.975, 39)), 40
        )
        half = s.combined_half_width(boot, s.seed_spread(answers.mean(0).tolist()))
        hits += abs(answers.mean()) <= half
    assert 0.93 <= hits / draws <= 0.995


def test_mcnemar_reproduces_the_fact_sheet() -> None:
    for b, c, p in ((111, 78, 0.020), (120, 69, 0.0003), (112, 76, 0.011), (13, 10, 0.68), (40, 41, 1.0)):
        assert s.mcnemar(b, c) == pytest.approx(p, abs=0.006)
    assert s.mcnemar(0, 0) == 1


def test_holm_by_hand_and_its_order() -> None:
    assert s.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert s.holm([]) == []
    assert s.holm([0.9, 0.9]) == [1.0, 1.0]
    six = s.holm([0.29, 0.020, 0.0003, 0.011, 0.19, 0.17])
    assert [p < 0.05 for p in six] == [False, False, True, False, False, False]


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
def test_holm_keeps_order_and_is_between_p_and_bonferroni(p_values: list[float]) -> None:
    adjusted = s.holm(p_values)
    for p, q in zip(p_values, adjusted, strict=True):
        assert p <= q <= min(1.0, p * len(p_values)) + 1e-12 or q == max(adjusted)
    assert [adjusted[i] for i in np.argsort(p_values, kind="stable")] == sorted(adjusted)


def test_holm_keeps_the_family_wise_error() -> None:
    rng = np.random.default_rng(6)
    wrong = sum(min(s.holm(rng.uniform(size=10).tolist())) < 0.05 for _ in range(2_000))
    assert wrong / 2_000 <= 0.065


def test_minimum_detectable_effects_are_those_of_the_fact_sheet() -> None:
    for discordance, points in ((0.05, 2.8), (0.16, 5.0), (0.35, 7.4), (0.40, 7.9)):
        assert s.paired_proportion_mde(503, discordance) * 100 == pytest.approx(points, abs=0.06)
    assert s.paired_proportion_mde(3, 0.05) == float("inf")
    assert s.minimum_detectable_effect(1.96) == pytest.approx(2.80, abs=0.01)
    assert s.clusters_needed(100, 0.5, 1.0) == 400
    assert s.clusters_needed(100, 0.0, 1.0) is None


def test_the_minimum_detectable_effect_is_found_with_the_promised_power() -> None:
    rng = np.random.default_rng(7)
    clusters, sigma = 50, 1.0
    effect = s.minimum_detectable_effect(float(stats.t.ppf(0.975, clusters - 1)) * sigma / math.sqrt(clusters))
    answers = rng.normal(effect, sigma, (clusters, 1_000))
    boots = s.cluster_bootstrap(answers, np.ones_like(answers), seed=0, resamples=2_000)
    assert np.mean([boot.p < 0.05 for boot in boots]) == pytest.approx(0.8, abs=0.05)


def test_an_interval_of_few_discordant_pairs_is_finite_and_covers() -> None:
    generator = np.random.default_rng(0)
    inside, draws = 0, 2000
    for _ in range(draws):
        changed = generator.random(60) < 0.04
        signs = np.where(generator.random(60) < 0.75, 1.0, -1.0)
        interval = s.few_discordant_interval(changed * signs)
        assert interval.high - interval.low < 0.3
        inside += interval.low <= 0.04 * 0.5 <= interval.high
    assert inside / draws >= 0.94


def test_resamples_without_a_difference_tell_nothing_whatever_rounding_leaves() -> None:
    # Means over seeds are no whole numbers: among clusters that all agree their spread is rounding and not 0.
    numerator_a, numerator_b, ones = np.zeros((48, 1)), np.zeros((48, 1)), np.ones((48, 1))
    numerator_a[3], numerator_b[5] = 0.1, 1 / 3
    (found,) = s.paired_bootstrap(numerator_a, ones, numerator_b, ones, seed=0)
    assert found.multiplier == math.inf
