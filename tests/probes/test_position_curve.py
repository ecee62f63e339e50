"""Claims about the position curve: the same documents in every bin, and the same targets at every context."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import numpy as np
import pytest

from longspan.engines.native import NativeEngine
from longspan.foundation.errors import UserError
from longspan.probes.base import ProbeData, make_probe
from longspan.records.store import Record

Ask = Callable[..., list[Record]]
SETTINGS = {"length": 128, "min_documents": 5, "targets": 20}


def test_every_bin_and_context_holds_the_same_documents(
    data: ProbeData, subject: Callable[..., NativeEngine], ask: Ask, read: Callable[..., object]
) -> None:
    probe = make_probe("position_curve", SETTINGS)
    observations, summary = read(probe, ask(probe, subject(), data))  # type: ignore[misc]
    expected = {f"doc-{i}" for i, n in enumerate(data.shards.lengths) if n >= 128}
    for metric in ("nll_by_position", "nll_by_context"):
        xs = {o.x for o in observations if o.metric == metric}
        assert len(xs) > 2
        for x in xs:
            assert {o.item for o in observations if o.metric == metric and o.x == x} == expected
    covered = sum(o.denominator for o in observations if o.metric == "nll_by_position")
    assert covered == 127 * len(expected)
    assert {m.n for m in summary.measurements} == {len(expected)}


@pytest.mark.parametrize("markers", [True, False])
def test_bins_and_contexts_hold_the_likelihoods_of_the_model(
    markers: bool, data: ProbeData, subject: Callable[..., NativeEngine], ask: Ask
) -> None:
    engine = subject("AM", markers=markers)
    record = ask(make_probe("position_curve", SETTINGS), engine, data)[0]
    document = data.shards.document(0)[:128]
    prefix = engine.document_prefix
    (whole,) = engine.nll([np.concatenate([prefix, document])])
    whole = whole[len(prefix) :]
    assert [low for low, _, _ in record.answer["positions"]] == [1, 2, 4, 8, 16, 32, 64]
    for low, high, nll in record.answer["positions"]:
        assert nll == pytest.approx(whole[low - 1 : high - 1].sum(), rel=1e-5)
    assert [context for context, _ in record.answer["contexts"]] == [16, 64, 108]
    for context, nll in record.answer["contexts"]:
        (cut,) = engine.nll([document[128 - 20 - context :]])
        if context < 108:
            assert nll == pytest.approx(cut[-20:].sum(), rel=1e-5)
        else:
            assert nll == pytest.approx(whole[-20:].sum(), rel=1e-5)


def test_a_subject_that_uses_no_context_gains_nothing_from_it(
    data: ProbeData, fake: Callable[..., object], ask: Ask, read: Callable[..., object]
) -> None:
    probe = make_probe("position_curve", SETTINGS)
    engine = fake(lambda tokens: 1.0 + tokens / 100)
    observations, _ = read(probe, ask(probe, engine, data))  # type: ignore[misc]
    gains = [o.numerator for o in observations if o.metric == "context_benefit"]
    assert gains
    assert np.abs(gains).max() < 1e-9


def test_a_subject_with_a_limit_leaves_out_what_it_cannot_take(
    data: ProbeData, subject: Callable[..., NativeEngine], ask: Ask, read: Callable[..., object]
) -> None:
    probe = make_probe("position_curve", SETTINGS)
    limited = ask(probe, subject("A", positions="learned", max_positions=64), data, "limited")
    free = ask(probe, subject("A"), data, "free")
    assert [high for _, high, _ in limited[0].answer["positions"]][-1] <= 64
    assert [context for context, _ in limited[0].answer["contexts"]] == [16]
    _, summary = read(probe, limited + free)  # type: ignore[misc]
    assert {c.x for c in summary.comparisons if c.metric == "nll_by_context"} == {16.0}


def test_the_default_length_is_the_longest_that_enough_documents_reach(data: ProbeData) -> None:
    def length(**settings: object) -> int:
        return int(make_probe("position_curve", settings).items(data)[0].details["length"])

    assert length(min_documents=2) == 128
    assert length(min_documents=1) == 256
    assert length(min_documents=8) == 64
    assert len(make_probe("position_curve", {"length": 64, "max_documents": 3, "min_documents": 2}).items(data)) == 3


def test_too_short_documents_are_refused_with_the_numbers_and_what_would_do(data: ProbeData) -> None:
    with pytest.raises(UserError, match=r"1 of 12 test documents have 256") as raised:
        make_probe("position_curve", {"length": 256, "min_documents": 3}).items(data)
    assert "3 documents have 175 tokens or more" in str(raised.value)
    with pytest.raises(UserError, match="0 of 12"):
        make_probe("position_curve", {"length": 1_000}).items(data)


def test_bins_cover_every_position_once() -> None:
    for per_octave in (1, 2, 5):
        probe = make_probe("position_curve", {"bins_per_octave": per_octave})
        for length in (32, 100, 128, 1_000):
            bins = probe._bins(length)  # type: ignore[attr-defined]
            assert bins[0][0] == 1
            assert bins[-1][1] == length
            assert all(a[1] == b[0] for a, b in pairwise(bins))
            assert all(low < high for low, high in bins)
