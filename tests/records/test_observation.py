"""Claims about summaries: made from observations alone, paired, honest where there is little data."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest

from longspan.foundation.errors import DataError
from longspan.records import statistics
from longspan.records.observation import Comparison, Measurement, Metric, Observation, Summary, summarise

BPB = Metric("bits_per_byte", "Bits per byte", "bits/byte", "ratio", "lower")
PPL = Metric("perplexity", "Perplexity", "", "ratio", "lower", transform="exp", compare=False)
ACC = Metric("accuracy", "Accuracy", "", "proportion", "higher", x_name="context", chance=0.25)
GAIN = Metric("gain", "Gain", "", "difference", "higher", x_name="context")


def losses(
    subjects: dict[str, float], documents: int = 30, seeds: tuple[int, ...] = (0,), noise: float = 0.01
) -> Iterator[Observation]:
    rng = np.random.default_rng(0)
    length = rng.integers(50, 400, documents)
    hardness = rng.gamma(4, 0.2, documents)
    for subject, offset in subjects.items():
        for seed in seeds:
            luck = rng.normal(0, 0.02) if len(seeds) > 1 else 0.0
            for i in range(documents):
                value = length[i] * (hardness[i] + offset + luck + rng.normal(0, noise))
                yield Observation(
                    subject, seed, f"d{i}", f"d{i}", "bits_per_byte", None, float(value), float(length[i])
                )


def answers(subject: str, rights: list[float], x: float = 64, per_document: int = 1) -> list[Observation]:
    return [
        Observation(subject, 0, f"i{i}", f"d{i // per_document}", "accuracy", x, right, 1.0)
        for i, right in enumerate(rights)
    ]


def of(summary: Summary, subject: str) -> Measurement:
    return next(m for m in summary.measurements if m.subject == subject)


def test_the_value_is_the_ratio_of_sums_and_the_interval_is_around_it() -> None:
    observations = list(losses({"A": 0.0}))
    (measured,) = summarise(observations, [BPB]).measurements
    expected = sum(o.numerator for o in observations) / sum(o.denominator for o in observations)
    assert measured.value == pytest.approx(expected)
    assert measured.low is not None
    assert measured.high is not None
    assert measured.low < measured.value < measured.high
    assert (measured.n, measured.seeds, measured.items) == (30, 1, 30)


def test_pairing_finds_a_small_difference_that_unpaired_intervals_hide() -> None:
    summary = summarise(losses({"A": 0.0, "M": 0.02}), [BPB])
    a, m = of(summary, "A"), of(summary, "M")
    assert a.high is not None
    assert m.low is not None
    assert a.high > m.low
    (comparison,) = summary.comparisons
    assert comparison.difference == pytest.approx(a.value - m.value)
    assert comparison.difference == pytest.approx(-0.02, abs=0.006)
    assert comparison.decided
    assert comparison.mde is not None
    assert comparison.mde < 0.02
    assert summary.ties[0].groups == (("A",), ("M",))


def test_what_cannot_be_told_apart_is_one_group_and_says_how_much_would_be_needed() -> None:
    summary = summarise(losses({"A": 0.0, "M": 0.001, "G": 0.3}, noise=0.02), [BPB])
    assert [set(group) for group in summary.ties[0].groups] == [{"A", "M"}, {"G"}]
    comparison = next(c for c in summary.comparisons if {c.a, c.b} == {"A", "M"})
    assert not comparison.decided
    assert comparison.needed is not None
    assert comparison.needed > 30


def test_overlapping_ties_are_shown_as_overlapping() -> None:
    metric = Metric("m", "m", "", "ratio", "lower")
    rng = np.random.default_rng(1)
    noise = rng.normal(0, 1, (3, 60))
    noise -= noise.mean(1, keepdims=True)
    observations = [
        Observation(s, 0, f"d{i}", f"d{i}", "m", None, float(offset + noise[k, i] * 0.5), 1.0)
        for k, (s, offset) in enumerate({"A": 0.0, "B": 0.17, "C": 0.34}.items())
        for i in range(60)
    ]
    assert summarise(observations, [metric]).ties[0].groups == (("A", "B"), ("B", "C"))


def test_perplexity_is_the_exponential_of_the_ratio_and_of_its_interval() -> None:
    observations = [
        Observation("A", 0, f"d{i}", f"d{i}", "perplexity", None, 10.0 * (3 + i / 10), 10.0) for i in range(10)
    ]
    (measured,) = summarise(observations, [PPL]).measurements
    assert measured.value == pytest.approx(math.exp(3.45))
    assert measured.low is not None
    assert measured.high is not None
    assert measured.high / measured.value == pytest.approx(measured.value / measured.low)


def test_holm_covers_all_pairs_and_places_of_one_metric() -> None:
    rng = np.random.default_rng(2)
    observations = [
        o
        for x in (64.0, 256.0)
        for s, share in (("A", 0.9), ("M", 0.5), ("G", 0.5))
        for o in answers(s, (rng.random(60) < share).astype(float).tolist(), x)
    ]
    summary = summarise(observations, [ACC])
    assert len(summary.comparisons) == 6
    assert {c.method for c in summary.comparisons} == {"exact McNemar"}
    # Connor 1987: beside McNemar's test, from as many discordant items as there were.
    assert {round(c.mde or 0, 3) for c in summary.comparisons} <= {
        round(statistics.paired_proportion_mde(60, k / 60), 3) for k in range(1, 61)
    }
    smallest = min(summary.comparisons, key=lambda c: c.p or 1)
    assert smallest.p_holm == pytest.approx(6 * (smallest.p or 1))
    assert [t.x for t in summary.ties] == [64.0, 256.0]


def test_several_items_of_one_document_widen_the_interval_and_forbid_mcnemar() -> None:
    rights = [float(i // 4 % 2) for i in range(80)]
    alone = of(summarise(answers("A", rights), [ACC]), "A")
    clustered = summarise(answers("A", rights, per_document=4) + answers("M", rights[::-1], per_document=4), [ACC])
    wide = of(clustered, "A")
    assert alone.low is not None
    assert wide.low is not None
    assert wide.low < alone.low
    assert wide.n == 20
    assert wide.items == 80
    assert clustered.comparisons[0].method == "paired cluster bootstrap"


@pytest.mark.parametrize("documents", [1, 2, 4])
def test_few_documents_give_no_interval_for_a_ratio_and_say_why(documents: int) -> None:
    summary = summarise(losses({"A": 0.0, "M": 0.5}, documents=documents), [BPB])
    measured, (comparison,) = of(summary, "A"), summary.comparisons
    assert (measured.low, measured.high, comparison.low, comparison.p, comparison.p_holm) == (None,) * 5
    assert f"{documents} documents" in measured.note
    assert comparison.note == measured.note
    assert not comparison.decided
    assert len(summary.ties[0].groups) == 1


def test_few_documents_give_a_wide_interval_for_a_proportion() -> None:
    measured = of(summarise(answers("A", [1.0, 1.0, 0.0]), [ACC]), "A")
    assert measured.low is not None
    assert measured.high is not None
    assert measured.low < 0.15
    assert measured.high > 0.95
    perfect = of(summarise(answers("A", [1.0] * 40, per_document=20), [ACC]), "A")
    assert perfect.low is not None
    assert perfect.low < 0.2


def test_answers_that_never_differ_leave_room_for_doubt() -> None:
    observations = [Observation("A", 0, f"i{i}", f"d{i}", "gain", 256, 0.0, 1.0) for i in range(30)]
    measured = of(summarise(observations, [GAIN]), "A")
    assert measured.value == 0
    assert measured.high == pytest.approx(1 - 0.025 ** (1 / 30))


def test_comparisons_are_made_on_common_items_only() -> None:
    observations = [*answers("A", [1.0] * 20), *answers("M", [1.0] * 10 + [0.0] * 5)]
    summary = summarise(observations, [ACC])
    assert summary.comparisons[0].n == 15
    assert of(summary, "A").n == 20
    nothing = [*answers("A", [1.0, 0.0]), Observation("M", 0, "other", "other", "accuracy", 64, 1.0, 1.0)]
    assert summarise(nothing, [ACC]).comparisons == ()


def test_one_seed_is_said_and_more_seeds_widen() -> None:
    one = summarise(losses({"A": 0.0, "M": 0.05}), [BPB])
    assert sum("one training seed" in note for note in one.notes) == 2
    three = summarise(losses({"A": 0.0, "M": 0.05}, seeds=(0, 1, 2)), [BPB])
    assert three.notes == ()
    assert of(three, "A").seeds == 3
    narrow, wide = one.comparisons[0], three.comparisons[0]
    assert narrow.mde is not None
    assert wide.mde is not None
    assert wide.mde > 2 * narrow.mde
    assert "seeds" in wide.method


def test_items_missing_for_one_seed_are_left_out_and_counted() -> None:
    observations = [o for o in losses({"A": 0.0}, seeds=(0, 1)) if not (o.seed == 1 and o.item == "d3")]
    summary = summarise(observations, [BPB])
    assert of(summary, "A").items == 29
    assert "1 items are missing" in summary.notes[0]


def test_medians_and_exact_numbers_are_not_tested() -> None:
    speed = Metric("prefill", "Prefill", "tok/s", "median", "higher", x_name="context")
    size = Metric("state", "State", "B", "exact", "lower", x_name="context")
    observations = [
        *[Observation("A", 0, f"r{i}", f"r{i}", "prefill", 64, 100.0, 1.0 + i) for i in range(5)],
        Observation("A", 0, "s", "s", "state", 64, 4096.0, 1.0),
    ]
    summary = summarise(observations, [speed, size])
    fast, big = summary.measurements
    assert (fast.low, fast.value, fast.high) == pytest.approx((25.0, 100 / 3, 50.0))
    assert (big.low, big.value, big.high) == (4096.0, 4096.0, 4096.0)
    assert summary.comparisons == ()


@pytest.mark.parametrize(("numerator", "denominator"), [(math.nan, 1.0), (math.inf, 1.0), (1.0, 0.0), (1.0, -1.0)])
def test_numbers_that_cannot_be_used_are_refused_by_name(numerator: float, denominator: float) -> None:
    bad = Observation("MMMM", 3, "d7", "d7", "bits_per_byte", None, numerator, denominator)
    with pytest.raises(DataError, match=r"MMMM \(seed 3\) on item d7"):
        summarise([bad], [BPB])


def test_an_undeclared_metric_is_refused() -> None:
    with pytest.raises(DataError, match="nonsense"):
        summarise([Observation("A", 0, "i", "i", "nonsense", None, 1.0, 1.0)], [BPB])


def test_nothing_observed_is_an_empty_summary() -> None:
    assert summarise([], [BPB, ACC]) == Summary((), (), ())


def test_a_summary_survives_json_and_does_not_depend_on_the_run() -> None:
    observations = list(losses({"A": 0.0, "M": 0.02, "G": 0.5}, documents=3)) + answers("A", [1.0, 0.0, 1.0])
    summary = summarise(observations, [BPB, ACC], seed=5)
    text = json.dumps(summary.to_json(), allow_nan=False)
    assert Summary.from_json(json.loads(text)) == summary
    assert summarise(observations, [BPB, ACC], seed=5) == summary


def test_main_effects_average_over_the_other_factors() -> None:
    offsets = {"A full": 0.0, "A none": 0.1, "M full": 0.5, "M none": 0.64}
    factors = {name: dict(zip(("pattern", "isolation"), name.split(), strict=True)) for name in offsets}
    summary = summarise(losses(offsets), [BPB], factors=factors)
    effects = {(c.a, c.b): c for c in summary.comparisons if "=" in c.a}
    assert set(effects) == {("pattern=A", "pattern=M"), ("isolation=full", "isolation=none")}
    assert effects["isolation=full", "isolation=none"].difference == pytest.approx(-0.12, abs=0.01)
    assert all(isinstance(effect, Comparison) and effect.decided for effect in effects.values())


def test_a_main_effect_uses_only_arms_that_exist_on_both_sides() -> None:
    offsets = {"A full": 0.0, "A none": 0.1, "M full": 5.0}
    factors = {name: dict(zip(("pattern", "isolation"), name.split(), strict=True)) for name in offsets}
    effects = {c.a: c for c in summarise(losses(offsets), [BPB], factors=factors).comparisons if "=" in c.a}
    assert effects["isolation=full"].difference == pytest.approx(-0.1, abs=0.01)
    single = {name: {"pattern": name} for name in ("A", "M")}
    assert not [c for c in summarise(losses({"A": 0.0, "M": 1.0}), [BPB], factors=single).comparisons if "=" in c.a]


DEEP = Metric("accuracy", "Accuracy", "", "proportion", "higher", x_name="context", chance=0.25, y_name="depth")


def test_a_cell_is_measured_beside_the_whole_of_its_x() -> None:
    shallow = [replace(o, y=0.0) for o in answers("A", [1.0] * 20)]
    deep = [replace(o, y=1.0, item=f"deep-{o.item}", cluster=f"deep-{o.cluster}") for o in answers("A", [0.0] * 20)]
    summary = summarise([*shallow, *deep], [DEEP], resamples=2_000)
    found = {m.y: m for m in summary.measurements}
    assert {y: (m.value, m.n, m.items) for y, m in found.items()} == {
        None: (0.5, 40, 40),
        0.0: (1.0, 20, 20),
        1.0: (0.0, 20, 20),
    }
    assert (found[0.0].low, found[0.0].high) == (statistics.clopper_pearson(20, 20).low, 1.0)
    assert found[None].low == pytest.approx(statistics.wilson(20, 40).low)
    assert Summary.from_json(json.loads(json.dumps(summary.to_json()))) == summary


def test_questions_of_one_item_add_up_over_an_x_and_stay_apart_in_their_cells() -> None:
    seen = [replace(o, y=y) for y, right in ((0.0, 1.0), (1.0, 0.0)) for o in answers("A", [right] * 10)]
    found = {m.y: m for m in summarise(seen, [DEEP], resamples=2_000).measurements}
    assert {y: m.value for y, m in found.items()} == {None: 0.5, 0.0: 1.0, 1.0: 0.0}
    assert found[None].items == 10


def test_subjects_are_compared_at_each_x_and_never_in_a_cell() -> None:
    seen = [replace(o, y=float(i % 2)) for s, rights in (("A", [1.0] * 20), ("B", [0.0] * 20))
            for i, o in enumerate(answers(s, rights))]  # fmt: skip
    summary = summarise(seen, [DEEP], resamples=2_000)
    (comparison,) = summary.comparisons
    assert (comparison.x, comparison.n, comparison.decided) == (64, 20, True)
    assert [t.x for t in summary.ties] == [64]


def test_a_y_that_the_metric_does_not_declare_is_refused() -> None:
    with pytest.raises(DataError, match="at y = 0"):
        summarise([replace(o, y=0.0) for o in answers("A", [1.0])], [ACC], resamples=2_000)
