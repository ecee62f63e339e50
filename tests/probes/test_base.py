"""Claims about every probe: same items for all, exact resumption, one file to add one."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from longspan.engines.base import UnusableAnswer
from longspan.engines.native import NativeEngine
from longspan.foundation.errors import UserError
from longspan.foundation.plugins import load_file
from longspan.probes.base import Probe, ProbeData, credit, make_probe, registered
from longspan.records.store import Record, RecordStore

ALL = {
    "perplexity": {},
    "position_curve": {"length": 128, "min_documents": 5},
    "suffix_identification": {"num_items": 12},
    "efficiency": {"contexts": [8, 16], "repeats": 3, "warm_ups": 0, "new_tokens": 2},
}
Ask = Callable[..., list[Record]]


def test_the_probes_of_this_package_are_found_by_themselves() -> None:
    assert set(ALL) <= set(registered())
    for kind in ALL:
        probe = make_probe(kind)
        assert probe.kind == kind
        assert probe.metrics
        assert probe.title
        assert make_probe(kind, probe.model_dump(mode="json")) == probe


def test_a_study_may_call_a_probe_otherwise() -> None:
    probe = make_probe("perplexity_as_trained", {"kind": "perplexity", "mode": "as_trained"})
    assert make_probe("perplexity_as_trained", probe.model_dump(mode="json")) == probe
    assert probe.protocol()["mode"] == "as_trained"


def test_unknown_names_and_settings_name_the_nearest() -> None:
    with pytest.raises(UserError, match="did you mean `perplexity`"):
        make_probe("perplexty")
    with pytest.raises(UserError, match="did you mean `stride`"):
        make_probe("perplexity", {"strid": 3})


@pytest.mark.parametrize("kind", list(ALL))
def test_items_depend_on_the_data_and_the_seed_alone(kind: str, data: ProbeData) -> None:
    probe = make_probe(kind, ALL[kind])
    items = probe.items(data)
    assert items == probe.items(data)
    assert len({item.id for item in items}) == len(items)
    text = probe.describe(items[0], data)
    assert text.asked
    assert len(text.asked) < 1_000


@pytest.mark.parametrize("kind", ["perplexity", "position_curve", "suffix_identification"])
def test_an_interrupted_probe_ends_with_the_same_bytes(
    kind: str,
    data: ProbeData,
    subject: Callable[..., NativeEngine],
    ask: Ask,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    probe, engine = make_probe(kind, ALL[kind]), subject("AM")
    monkeypatch.setattr(type(probe), "batch_tokens", 700)
    whole = ask(probe, engine, data)
    items = probe.items(data)
    assert [record.item for record in whole] == [item.id for item in items]
    for kept in (1, 3, len(items) - 1):
        store = RecordStore(tmp_path / f"{kept}.jsonl")
        store.append(whole[:kept])
        missing = [item for item in items if item.id not in {record.item for record in whole[:kept]}]
        answers = [answer for batch in probe.ask(engine, missing, data) for answer in batch]
        assert [(a.item, a.content) for a in answers] == [(r.item, r.answer) for r in whole[kept:]]


@pytest.mark.parametrize("kind", ["perplexity", "position_curve", "suffix_identification"])
def test_nan_is_refused_by_every_probe(
    kind: str, data: ProbeData, subject: Callable[..., NativeEngine], ask: Ask
) -> None:
    import torch

    engine = subject("M", seed=9)
    with torch.no_grad():
        engine._model.norm.weight.fill_(torch.nan)
    with pytest.raises(UnusableAnswer):
        ask(make_probe(kind, ALL[kind]), engine, data)


def test_records_can_be_read_again_without_a_model(
    data: ProbeData, subject: Callable[..., NativeEngine], ask: Ask, read: Callable[..., object], tmp_path: Path
) -> None:
    for kind, settings in ALL.items():
        probe = make_probe(kind, settings)
        records = ask(probe, subject("A"), data, "A") + ask(probe, subject("M"), data, "M")
        store = RecordStore(tmp_path / f"{kind}.jsonl")
        store.append(records)
        again = list(RecordStore(store.path))
        assert again == records
        assert read(probe, again) == read(probe, records)


def test_an_engine_that_cannot_is_refused(data: ProbeData, fake: Callable[..., object], ask: Ask) -> None:
    engine = fake()
    engine.capabilities = frozenset({"generate"})  # type: ignore[attr-defined]
    with pytest.raises(UserError, match="cannot `nll`"):
        ask(make_probe("perplexity"), engine, data)


PLUGIN = """
from longspan.probes.base import Probe, register
from longspan.probes.base import Item
from longspan.records.observation import Metric


@register("second_token")
class SecondToken(Probe):
    title = "Second token"
    explanation = "How well the second token follows from the first."

    weight: float = 1.0

    @property
    def metrics(self):
        return (Metric("nll", "NLL", "nats", "ratio", "lower"),)

    def items(self, data):
        return [Item(data.shards.ids[i], i, 2) for i in range(len(data.shards)) if data.shards.lengths[i] > 1]

    def answer(self, engine, items, data):
        return [{"nll": float(n[0])} for n in engine.nll([data.shards.document(i.document)[:2] for i in items])]

    def observe(self, record):
        yield self.observation(record, "nll", self.weight * record.answer["nll"], 1.0, cluster=record.item)
"""


@pytest.mark.usefixtures("plugins_forgotten")
def test_a_strangers_probe_is_one_file(
    tmp_path: Path, data: ProbeData, subject: Callable[..., NativeEngine], ask: Ask, read: Callable[..., object]
) -> None:
    path = tmp_path / "second_token.py"
    path.write_text(PLUGIN)
    load_file(path)
    load_file(path)
    probe = make_probe("second_token", {"weight": 2.0})
    _, summary = read(probe, ask(probe, subject("A"), data, "A") + ask(probe, subject("M"), data, "M"))  # type: ignore[misc]
    assert summary.measurements[0].low is not None
    assert len(summary.comparisons) == 1


def test_a_taken_name_is_refused(tmp_path: Path) -> None:
    thief = tmp_path / "thief.py"
    thief.write_text(PLUGIN.replace("second_token", "perplexity"))
    with pytest.raises(UserError, match="second probe called 'perplexity'"):
        load_file(thief)


def test_every_probe_is_a_probe() -> None:
    assert all(issubclass(probe, Probe) for probe in registered().values())
    assert np.all([probe.batch_tokens > 0 for probe in registered().values()])


def test_nan_scores_are_refused() -> None:
    with pytest.raises(UnusableAnswer, match="nan"):
        credit(np.array([math.nan] * 4), 0)
    with pytest.raises(UnusableAnswer):
        credit(np.array([1.0, math.inf, 2.0]), 0)


def test_credit_is_split_among_equals() -> None:
    assert credit(np.array([1.0, 2.0, 3.0]), 0) == 1
    assert credit(np.array([1.0, 2.0, 3.0]), 1) == 0
    assert credit(np.array([1.0, 1.0 + 1e-8, 3.0]), 1) == 0.5
    assert credit(np.array([5.0] * 4), 3) == 0.25
    assert credit(np.array([1.0, 1.001]), 1) == 0
