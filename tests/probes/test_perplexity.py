"""Claims about perplexity: token-weighted, every token but the first once, equal tokens for every subject."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from longspan.corpus.packing import PackingConfig
from longspan.corpus.tasks import make_task
from longspan.engines.native import NativeEngine
from longspan.foundation.errors import UserError
from longspan.probes.base import ProbeData, make_probe
from longspan.probes.perplexity import rolling_windows, windows
from longspan.records.store import Record

Ask = Callable[..., list[Record]]


@given(st.integers(2, 300), st.integers(2, 70), st.data())
def test_windows_score_every_token_but_the_first_once(tokens: int, context: int, data: st.DataObject) -> None:
    stride = data.draw(st.integers(1, context - 1))
    scored = []
    for start, first, end in windows(tokens, context, stride):
        assert start < first < end <= min(tokens, start + context)
        scored += range(first, end)
    assert scored == list(range(1, tokens))


def test_a_token_has_at_least_the_context_that_the_stride_leaves() -> None:
    for start, first, _ in itertools.islice(windows(500, 64, 16), 1, None):
        assert first - start == 48


def test_perplexity_is_token_weighted_by_hand(
    data: ProbeData, fake: Callable[..., object], ask: Ask, read: Callable[..., object]
) -> None:
    """A subject whose loss depends on the token: windows of unequal length must not be averaged as equals."""
    engine = fake(lambda tokens: 1.0 + tokens / 100)
    for settings in ({}, {"context": 32, "stride": 5}, {"context": 1_000}):
        probe = make_probe("perplexity", settings)
        _, summary = read(probe, ask(probe, engine, data))  # type: ignore[misc]
        scored = np.concatenate([document[1:].astype(np.int64) for document in data.shards])
        nats = (1.0 + scored / 100).sum()
        values = {m.metric: m.value for m in summary.measurements}
        assert values["nll_per_token"] == pytest.approx(nats / len(scored))
        assert values["perplexity"] == pytest.approx(math.exp(nats / len(scored)))
        size = data.tokenizer.token_bytes[scored].sum()
        assert values["bits_per_byte"] == pytest.approx(nats / math.log(2) / size)


def test_the_strings_of_a_task_are_no_text() -> None:
    probe = make_probe("perplexity")
    probe.check_task(None)
    with pytest.raises(UserError, match="bits per byte of a task"):
        probe.check_task(make_task({"task": "copy"}, ""))


def test_a_uniform_subject_has_the_vocabulary_as_perplexity(
    data: ProbeData, fake: Callable[..., object], ask: Ask, read: Callable[..., object]
) -> None:
    probe = make_probe("perplexity")
    _, summary = read(probe, ask(probe, fake(), data))  # type: ignore[misc]
    (measured,) = [m for m in summary.measurements if m.metric == "perplexity"]
    assert measured.value == pytest.approx(data.tokenizer.vocab_size)


@pytest.mark.parametrize("markers", [True, False])
def test_one_window_equals_the_model_on_the_whole_document(
    markers: bool, data: ProbeData, subject: Callable[..., NativeEngine], ask: Ask
) -> None:
    engine = subject("AM", markers=markers)
    probe = make_probe("perplexity", {"context": 1_000})
    for record in ask(probe, engine, data):
        document = data.shards.document(int(record.item.removeprefix("doc-")))
        (nll,) = engine.nll([np.concatenate([engine.document_prefix, document])])
        assert record.answer["nll"] == pytest.approx(nll[-(len(document) - 1) :].sum(), rel=1e-5)
        assert record.answer["tokens"] == len(document) - 1


def test_subjects_with_and_without_markers_are_scored_on_the_same_tokens(
    data: ProbeData, subject: Callable[..., NativeEngine], ask: Ask
) -> None:
    for mode in ("per_document", "as_trained"):
        probe = make_probe("perplexity", {"mode": mode})
        counted = []
        for markers, method in itertools.product((True, False), ("concat", "best_fit", "one_per_row", "chunks")):
            packed = ProbeData(data.shards, data.tokenizer, 64, PackingConfig(method=method, markers=markers))
            counted.append(
                [
                    (r.item, r.answer["tokens"], r.answer["bytes"])
                    for r in ask(probe, subject("A", markers=markers), packed)
                ]
            )
        assert all(counts == counted[0] for counts in counted)
        assert counted[0][0][1] == data.shards.lengths[0] - 1


def test_as_trained_sees_what_leaks_and_per_document_does_not(
    data: ProbeData, subject: Callable[..., NativeEngine], ask: Ask
) -> None:
    answers = {}
    for isolation in ("full", "none"):
        packing = PackingConfig(isolation=isolation)
        packed = ProbeData(data.shards, data.tokenizer, 64, packing)
        for mode in ("per_document", "as_trained"):
            records = ask(make_probe("perplexity", {"mode": mode}), subject("AM", isolation=isolation), packed)
            answers[isolation, mode] = np.array([record.answer["nll"] for record in records])
    np.testing.assert_allclose(answers["full", "per_document"], answers["none", "per_document"])
    assert np.abs(answers["full", "as_trained"] - answers["none", "as_trained"]).max() > 1e-4


def test_isolated_packing_scores_a_document_as_if_alone(
    make_data: Callable[..., ProbeData], subject: Callable[..., NativeEngine], ask: Ask
) -> None:
    """Two short documents in one row: isolated, each is what the model says of it alone."""
    data = make_data(20, 30, 10)
    engine = subject("AM")
    for record in ask(make_probe("perplexity", {"mode": "as_trained"}), engine, data):
        document = data.shards.document(int(record.item.removeprefix("doc-")))
        (nll,) = engine.nll([np.concatenate([engine.document_prefix, document])])
        if record.item != "doc-2":  # cut by the row's end
            assert record.answer["nll"] == pytest.approx(nll[1:].sum(), rel=1e-5)
        assert record.answer["tokens"] == len(document) - 1


def test_learned_positions_fit_the_default_window(
    data: ProbeData, subject: Callable[..., NativeEngine], ask: Ask
) -> None:
    for markers in (True, False):
        engine = subject("A", markers=markers, positions="learned", max_positions=64)
        for mode in ("per_document", "as_trained"):
            packed = ProbeData(data.shards, data.tokenizer, 64, PackingConfig(markers=markers))
            assert ask(make_probe("perplexity", {"mode": mode}), engine, packed)


def test_what_makes_no_sense_is_refused(make_data: Callable[..., ProbeData]) -> None:
    data = make_data(1, 1, 1)
    with pytest.raises(UserError, match="3 documents and none of 2 tokens"):
        make_probe("perplexity").items(data)
    with pytest.raises(UserError, match="stride 64"):
        make_probe("perplexity", {"stride": 64}).items(data)
    with pytest.raises(UserError, match="as_trained"):
        make_probe("perplexity", {"mode": "as_trained", "stride": 3})


def test_max_tokens_takes_the_beginning_of_every_document(
    make_data: Callable[..., ProbeData], subject: Callable[..., NativeEngine], ask: Ask
) -> None:
    data = make_data(40, 10, 25)
    engine = subject("AM")
    for record in ask(make_probe("perplexity", {"max_tokens": 20}), engine, data):
        document = data.shards.document(int(record.item.removeprefix("doc-")))[:20]
        (nll,) = engine.nll([np.concatenate([engine.document_prefix, document])])
        assert record.answer["tokens"] == len(document) - 1
        assert record.answer["nll"] == pytest.approx(nll[1:].sum(), rel=1e-5)


@given(st.integers(2, 300), st.integers(2, 70))
def test_rolling_windows_show_as_much_as_they_can(tokens: int, context: int) -> None:
    scored = []
    for start, first, end in rolling_windows(tokens, context):
        assert end - 1 - start == min(context, tokens - 1)
        assert start < first < end
        scored += range(first, end)
    assert scored == list(range(1, tokens))


@pytest.mark.parametrize("markers", [True, False])
def test_rolling_scores_every_token_after_the_boundary_token(
    markers: bool, make_data: Callable[..., ProbeData], subject: Callable[..., NativeEngine], ask: Ask
) -> None:
    data = make_data(40, 1, 17, 25)
    engine = subject("AM", markers=markers)
    boundary = data.tokenizer.special.boundary
    for record in ask(make_probe("perplexity", {"mode": "rolling", "context": 16}), engine, data):
        document = data.shards.document(int(record.item.removeprefix("doc-"))).astype(np.int64)
        whole = np.concatenate([[boundary], document])
        nats = 0.0
        for first in range(1, len(whole)):
            # Each of the first 16 tokens sees all before it, the others their window of 16.
            window = (first - 1) // 16
            start = window * 16 if first < (len(whole) - 1) // 16 * 16 + 1 else len(whole) - 1 - min(16, len(whole) - 1)
            nats += engine.nll([whole[start : first + 1]])[0][-1]
        assert record.answer["tokens"] == len(document)
        assert record.answer["bytes"] == data.tokenizer.token_bytes[document].sum()
        assert record.answer["nll"] == pytest.approx(nats, rel=1e-5)


def test_rolling_fits_learned_positions(data: ProbeData, subject: Callable[..., NativeEngine], ask: Ask) -> None:
    engine = subject("A", markers=False, positions="learned", max_positions=64)
    assert ask(make_probe("perplexity", {"mode": "rolling"}), engine, data)
    with pytest.raises(UserError, match="at most 64"):
        ask(make_probe("perplexity", {"mode": "rolling", "context": 65}), engine, data)
    with pytest.raises(UserError, match="stride 3 with mode rolling"):
        make_probe("perplexity", {"mode": "rolling", "stride": 3})
