"""Claims about suffix identification: fixed questions, fair wrong answers, and no credit for saying nothing."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable
from itertools import pairwise

import numpy as np
import pytest

from longspan.engines.native import NativeEngine
from longspan.foundation.errors import UserError
from longspan.probes.base import ProbeData, make_probe
from longspan.probes.suffix_identification import SuffixIdentification, spread, unigram_nll
from longspan.records.store import Record

Ask = Callable[..., list[Record]]


def probe_with(**settings: object) -> SuffixIdentification:
    probe = make_probe("suffix_identification", {"num_items": 40, "suffix": 8, "bins": 4, **settings})
    assert isinstance(probe, SuffixIdentification)
    return probe


def test_a_constant_subject_scores_chance_and_gains_nothing(
    data: ProbeData, fake: Callable[..., object], ask: Ask, read: Callable[..., object]
) -> None:
    probe = probe_with()
    _, summary = read(probe, ask(probe, fake(), data))  # type: ignore[misc]
    for measured in summary.measurements:
        assert measured.value == {"accuracy": 0.25, "long_range_gain": 0.0, "margin": 0.0}[measured.metric]
        if measured.metric == "accuracy":
            assert measured.low < 0.25 < measured.high
    assert probe.metrics[0].chance == 0.25
    assert probe_with(candidates=8).metrics[0].chance == 0.125


def test_a_subject_that_knows_the_documents_is_right_and_its_opposite_wrong(
    data: ProbeData, fake: Callable[..., object], ask: Ask, read: Callable[..., object]
) -> None:
    probe = probe_with(suffix=24, min_documents=4)
    truths = {bytes(probe.choices(i, data)[i.details["place"]].astype(np.int64)) for i in probe.items(data)}
    for sign, expected in ((-1.0, 1.0), (1.0, 0.0)):
        engine = fake(lambda tokens, sign=sign: 5.0 + sign * np.full(len(tokens), bytes(tokens) in truths))
        _, summary = read(probe, ask(probe, engine, data))  # type: ignore[misc]
        accuracies = [m.value for m in summary.measurements if m.metric == "accuracy"]
        assert accuracies == pytest.approx([expected] * len(accuracies))


def test_questions_are_the_same_at_every_context(
    data: ProbeData, subject: Callable[..., NativeEngine], ask: Ask
) -> None:
    probe = probe_with()
    records = ask(probe, subject(), data)
    assert {tuple(record.answer["scores"]) for record in records} == {("64", "128")}
    for item in probe.items(data):
        length = int(data.shards.lengths[item.document])
        assert 128 <= item.details["position"] <= length - 8


def test_wrong_candidates_come_from_other_documents_and_none_equals_another(data: ProbeData) -> None:
    probe = probe_with(suffix=4)
    for item in probe.items(data):
        assert all(document != item.document for document, _ in item.details["wrong"])
        choices = [choice.tobytes() for choice in probe.choices(item, data)]
        assert len(set(choices)) == 4
        position = item.details["position"]
        truth = data.shards.document(item.document)[position : position + 4]
        assert choices[item.details["place"]] == truth.tobytes()


def test_the_place_of_the_truth_is_shuffled(data: ProbeData) -> None:
    places = Counter(item.details["place"] for item in probe_with(num_items=200, suffix=2).items(data))
    assert set(places) == {0, 1, 2, 3}
    assert max(places.values()) < 0.5 * places.total()


def test_word_frequency_neither_gives_the_truth_away_nor_hides_it(data: ProbeData) -> None:
    """With few bins the candidates differ more; in any case a subject that knows frequencies alone guesses."""
    surprise = unigram_nll(data)

    def asked(bins: int) -> tuple[float, list[int]]:
        probe = probe_with(bins=bins, num_items=200, suffix=4)
        gaps: list[float] = []
        ranks = []
        for item in probe.items(data):
            scores = np.array([surprise[choice].sum() for choice in probe.choices(item, data)])
            truth = item.details["place"]
            gaps += np.abs(np.delete(scores, truth) - scores[truth]).tolist()
            ranks.append(int((scores < scores[truth]).sum()))
        return float(np.mean(gaps)), ranks

    (near, ranks), (far, _) = asked(4), asked(1)
    assert near < 0.7 * far
    least, most = (ranks.count(rank) / len(ranks) for rank in (0, 3))
    assert 0.1 < most < 0.4
    assert 0.1 < least < 0.5


def test_targets_of_a_document_never_overlap_and_documents_share_them_evenly(data: ProbeData) -> None:
    by_document = defaultdict(list)
    for item in probe_with(num_items=24).items(data):
        by_document[item.document].append(item.details["position"])
    for positions in by_document.values():
        assert all(b - a >= 8 for a, b in pairwise(positions))
    assert len(by_document) == 5
    assert spread(10, [1, 9, 2, 9]) == [1, 4, 2, 3]
    assert spread(100, [1, 2]) == [1, 2]
    assert spread(0, [3]) == [0]


def test_scores_equal_recomputing_the_context_for_every_candidate(
    data: ProbeData, subject: Callable[..., NativeEngine], ask: Ask
) -> None:
    probe, engine = probe_with(num_items=6), subject("AM")
    records = {record.item: record for record in ask(probe, engine, data)}
    for item in probe.items(data):
        for context, scores in records[item.id].answer["scores"].items():
            end = item.details["position"]
            before = data.shards.document(item.document)[end - int(context) : end]
            whole = [np.concatenate([before, choice]) for choice in probe.choices(item, data)]
            expected = [nll[-8:].sum() for nll in engine.nll(whole)]
            np.testing.assert_allclose(scores, expected, rtol=1e-5)


def test_gain_is_the_difference_to_64_tokens_on_the_same_questions(
    data: ProbeData, subject: Callable[..., NativeEngine], ask: Ask, read: Callable[..., object]
) -> None:
    probe = probe_with(contexts=[100, 120])
    observations, summary = read(probe, ask(probe, subject(), data))  # type: ignore[misc]
    values = {(m.metric, m.x): m.value for m in summary.measurements}
    for context in (100.0, 120.0):
        gain = values["accuracy", context] - values["accuracy", 64.0]
        assert values["long_range_gain", context] == pytest.approx(gain)
    assert ("long_range_gain", 64.0) not in values
    assert {o.cluster for o in observations} <= set(data.shards.ids)


def test_reading_records_by_sum_or_per_token_needs_no_new_answers(
    data: ProbeData, subject: Callable[..., NativeEngine], ask: Ask, read: Callable[..., object]
) -> None:
    by_sum, per_token = probe_with(), probe_with(score="per_token")
    assert by_sum.protocol() == per_token.protocol()
    records = ask(by_sum, subject(), data)
    assert read(by_sum, records) == read(per_token, records)


def test_a_subject_with_a_limit_answers_the_contexts_it_can(
    data: ProbeData, subject: Callable[..., NativeEngine], ask: Ask
) -> None:
    records = ask(probe_with(), subject("A", positions="learned", max_positions=100), data)
    assert {tuple(record.answer["scores"]) for record in records} == {("64",)}


def test_too_few_documents_are_refused_with_numbers_and_a_way_out(
    data: ProbeData, make_data: Callable[..., ProbeData]
) -> None:
    with pytest.raises(UserError, match=r"1 of 12 test documents have 256 \+ 8 tokens") as raised:
        probe_with(contexts=[256]).items(data)
    assert "ask for contexts up to 132" in str(raised.value)
    with pytest.raises(UserError, match="use more or longer test documents"):
        probe_with().items(make_data(30, 40))
    with pytest.raises(UserError, match="positive lengths"):
        probe_with(contexts=[0])


def test_text_without_variety_is_refused(data: ProbeData, make_data: Callable[..., ProbeData]) -> None:
    short = make_data(*([80] * 5))
    with pytest.raises(UserError, match="different spans of 1 tokens"):
        probe_with(suffix=1, candidates=64, min_documents=2).items(short)
