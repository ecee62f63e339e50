"""Strings of a task asked two ways; where nothing goes wrong the two ways are one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from longspan.corpus.packing import IGNORE, PackingConfig
from longspan.corpus.tasks import Task, TaskBatches, make_task
from longspan.corpus.tasks.corpus import TaskCorpus, prepare_task
from longspan.engines.base import Engine, Generation, HandedOver, Sampling
from longspan.engines.native import NativeEngine
from longspan.foundation.errors import UserError
from longspan.models.language_model import LanguageModel, ModelConfig
from longspan.probes.base import ProbeData, make_probe
from longspan.probes.mqar import half_right
from longspan.records.observation import Measurement, Summary, summarise
from longspan.records.statistics import wilson
from longspan.records.store import Record

TASKS: dict[str, dict[str, Any]] = {
    "copy": {"task": "copy", "vocab_size": 2, "min_length": 1, "max_length": 4},
    "suffix_ngram": {"task": "suffix_ngram", "vocab_size": 6, "ngram": 1, "min_length": 2, "max_length": 4},
    "mqar": {"task": "mqar", "vocab_size": 18, "length": 16, "pairs": [1, 2, 4]},
    "selective_copy": {"task": "selective_copy", "vocab_size": 2, "tokens": 2, "min_length": 3, "max_length": 6},
}


def data_of(settings: dict[str, Any], folder: Path) -> ProbeData:
    corpus = TaskCorpus.parse({"source": "task", **settings}, "corpus")
    prepared = prepare_task(corpus, corpus.tokenizer(), folder)
    return ProbeData(prepared.shards["test"], prepared.tokenizer, 32, task=prepared.task)


def half_taught(task: Task, pattern: str, steps: int = 30, **more: Any) -> NativeEngine:
    """A subject that gets some strings right and some wrong."""
    config = ModelConfig(pattern=pattern, width=24, heads=2, state=8, mamba_head_dim=8, chunk=16, mlp_width=32, **more)
    tokenizer = task.tokenizer()
    model = LanguageModel(config, tokenizer.vocab_size)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _, batch in zip(range(steps), TaskBatches(task, PackingConfig(), context=32, rows=8, seed=0), strict=False):
        tokens, targets = (torch.from_numpy(part).long() for part in (batch.tokens, batch.targets))
        loss, count = model.loss(tokens, targets)
        (loss / count).backward()
        optimizer.step()
        optimizer.zero_grad()
    return NativeEngine(model, tokenizer, markers=True, isolation="full", fingerprint=pattern)


@pytest.mark.parametrize(
    ("name", "pattern"),
    [
        ("copy", "AA"),
        ("copy", "AM"),
        ("copy", "[AM]L"),
        ("suffix_ngram", "AM"),
        ("mqar", "AM"),
        ("selective_copy", "MA"),
    ],
)
def test_both_ways_agree_on_every_string(name: str, pattern: str, tmp_path: Path, ask: Any) -> None:
    data = data_of(TASKS[name], tmp_path)
    assert data.task is not None
    records = ask(make_probe("task", {"strings": 24}), half_taught(data.task, pattern), data)
    assert len(records) == 24 * len(data.task.sizes())
    whole = [all(record.answer["forced"]) for record in records]
    # A test of subjects that are always right or always wrong would show nothing.
    assert 0 < sum(whole) < len(whole)
    for record in records:
        forced, free = record.answer["forced"], record.answer["free"]
        assert all(forced) == all(free)
        first_mistake = forced.index(0) if 0 in forced else len(forced)
        assert free[: first_mistake + 1] == forced[: first_mistake + 1]
        if name in ("mqar", "selective_copy"):
            # Answers are not read back in, so nothing can differ.
            assert free == forced


BORDERED = {"task": "mqar", "vocab_size": 10, "length": 16, "pairs": [1, 2, 4], "border": 8, "distinct": False}


@pytest.mark.parametrize(("pattern", "graphs"), [("M", "auto"), ("A", "auto"), ("[AM]", "on")])
def test_both_ways_agree_where_the_state_is_handed_over_in_few_bits(
    pattern: str, graphs: str, tmp_path: Path, ask: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LONGSPAN_GRAPHS", graphs)
    data = data_of(BORDERED, tmp_path)
    assert data.task is not None
    engine = half_taught(data.task, pattern, 60, state_bits=2, handover=8)
    assert engine.handed_over is not None
    records = ask(make_probe("mqar", {"strings": 24}), engine, data)
    right = [share for record in records for share in record.answer["forced"]]
    assert 0 < sum(right) < len(right)
    for record in records:
        assert record.answer["free"] == record.answer["forced"]
        assert record.answer["state_bits"] == engine.handed_over.bits < 8 * engine.state_bytes(16)


def test_answers_are_held_against_the_most_that_the_bits_allow(tmp_path: Path, ask: Any) -> None:
    data = data_of(BORDERED, tmp_path)
    assert data.task is not None
    engine = half_taught(data.task, "M", 1, state_bits=1, handover=8)
    engine.handed_over = HandedOver(8, 5)
    probe = make_probe("mqar", {"strings": 4, "free_running": False})
    records = ask(probe, engine, data)
    seen = [each for record in records for each in probe.observe(record)]
    # One answer of 2.3 bits can be right, four of 9.3 bits cannot all be.
    most = {each.x: each.numerator for each in seen if each.metric == "ceiling"}
    assert list(most) == pytest.approx([100 * n * np.log2(5) / 5 for n in (1, 2, 4)], rel=0.01)
    assert list(most.values()) == [1.0, 1.0, pytest.approx(data.task.most_right(4, 5))]
    assert 0.5 < most[max(most)] < 0.9
    assert {each.x for each in seen if each.metric == "load"} == set(most)


@pytest.mark.parametrize(("border", "where"), [(None, "at no fixed place"), (10, "at 10")])
def test_questions_that_begin_elsewhere_than_the_state_is_handed_over_are_refused(
    border: int | None, where: str, tmp_path: Path, ask: Any
) -> None:
    data = data_of(BORDERED, tmp_path)
    assert data.task is not None
    engine = half_taught(data.task, "M", 1, state_bits=1, handover=8)
    with pytest.raises(UserError, match=f"begin {where}, of a subject whose state is handed over at 8"):
        ask(make_probe("mqar", {"strings": 2, "sizes": [1], "settings": {"border": border}}), engine, data)


class Parrot(Engine):
    """Says what stands there, and 0 where nothing does: right in one pass, wrong on its own after the first token."""

    capabilities = frozenset({"predict", "generate"})
    isolation = "full"
    context_limit = None
    fingerprint = name = "parrot"

    def __init__(self, data: ProbeData, limit: int | None = None) -> None:
        self.tokenizer, self.context_limit = data.tokenizer, limit

    def predict(self, sequences: Any, wanted: Any) -> list[np.ndarray]:
        return [np.append(sequence[1:], 0)[where] for sequence, where in zip(sequences, wanted, strict=True)]

    def generate(self, prompts: Any, sampling: Sampling, given: Any = None) -> list[Generation]:
        return [Generation(np.zeros(len(g) + 1, np.int64), "", "length", len(p), 0.1, 0.1)
                for p, g in zip(prompts, given, strict=True)]  # fmt: skip

    def nll(self, sequences: Any, doc_ids: Any = None) -> list[np.ndarray]:
        raise NotImplementedError

    def score_many(self, prefixes: Any, continuations: Any) -> list[list[np.ndarray]]:
        raise NotImplementedError

    def state_bytes(self, context: int) -> int:
        return 4 * context


def measured(probe: Any, records: Any) -> dict[tuple[str, float | None], Measurement]:
    observations = [seen for record in records for seen in probe.observe(record)]
    summary = summarise(observations, probe.metrics, resamples=2_000)
    found = (*summary.measurements, *probe.derive(summary))
    return {(m.metric, m.x): m for m in found if m.y is None}


def test_the_whole_answer_counts_and_its_end(tmp_path: Path, ask: Any) -> None:
    data = data_of({"task": "copy", "vocab_size": 2, "min_length": 1, "max_length": 2}, tmp_path)
    probe = make_probe("task", {"strings": 100})
    found = measured(probe, ask(probe, Parrot(data), data))
    assert found["string", 1.0].value == found["token", 2.0].value == 1.0
    # 0 is the letter `a`: half of the letters and never the end.
    assert found["free_string", 1.0].value == 0.0
    assert 0.35 < found["free_token", 1.0].value * 2 < 0.65
    assert found["string", 1.0].n == 100


def test_intervals_are_those_of_wilson_over_strings(tmp_path: Path, ask: Any) -> None:
    data = data_of({"task": "copy", "vocab_size": 2, "min_length": 1, "max_length": 1}, tmp_path)
    probe = make_probe("task", {"strings": 256})
    subject = half_taught(data.task, "AA", steps=12)
    records = ask(probe, subject, data)
    right = sum(all(record.answer["forced"]) for record in records)
    if 5 < right < 251:
        interval = wilson(right, 256)
        found = measured(probe, records)["string", 1.0]
        assert (found.low, found.high) == pytest.approx((interval.low, interval.high))


def test_256_strings_a_length_unless_told_otherwise(tmp_path: Path) -> None:
    """An earlier code asked twelve."""
    data = data_of(TASKS["copy"], tmp_path)
    items = make_probe("task").items(data)
    assert [sum(item.details["size"] == size for item in items) for size in (1, 2, 3, 4)] == [256] * 4
    assert len({item.id for item in items}) == len(items)


def test_items_are_the_same_for_every_subject_and_seed(tmp_path: Path) -> None:
    one, two = data_of(TASKS["copy"], tmp_path / "a"), data_of(TASKS["copy"], tmp_path / "b")
    probe = make_probe("task", {"sizes": [3], "strings": 8})
    texts = [[probe.describe(item, data).asked for item in probe.items(data)] for data in (one, two)]
    assert texts[0] == texts[1]
    assert len(set(texts[0])) > 4


def test_strings_longer_than_training_are_asked(tmp_path: Path, ask: Any) -> None:
    data = data_of(TASKS["copy"], tmp_path)
    probe = make_probe("task", {"sizes": [4, 40], "strings": 3})
    lengths = {record.answer["context"] for record in ask(probe, Parrot(data), data)}
    assert lengths == {11, 83}


def test_a_subject_that_cannot_take_a_length_is_not_asked_it(tmp_path: Path, ask: Any) -> None:
    data = data_of(TASKS["copy"], tmp_path)
    probe = make_probe("task", {"sizes": [4, 40], "strings": 3})
    records = ask(probe, Parrot(data, limit=20), data)
    assert {seen.x for record in records for seen in probe.observe(record) if seen.metric == "string"} == {4.0}


def curve(*values: tuple[float, float, float]) -> Summary:
    made = [
        Measurement("string", "S", 10.0 * (i + 1), v, low, high, 256, 1, 256) for i, (v, low, high) in enumerate(values)
    ]
    return Summary(tuple(made), (), ())


def test_reach_is_the_longest_before_the_first_failure() -> None:
    probe = make_probe("task")
    (found,) = probe.derive(curve((1.0, 0.98, 1.0), (0.92, 0.88, 0.95), (0.88, 0.84, 0.91), (0.95, 0.92, 0.97)))
    assert (found.low, found.value, found.high) == (10.0, 20.0, 40.0)
    (none,) = probe.derive(curve((0.5, 0.4, 0.6)))
    assert (none.low, none.value, none.high) == (0.0, 0.0, 0.0)
    (whole,) = probe.derive(curve((1.0, 0.98, 1.0)))
    assert whole.note == "longest asked: 10"


def test_another_task_is_asked_of_the_same_subject(tmp_path: Path) -> None:
    data = data_of({"task": "copy", "min_length": 5, "max_length": 9}, tmp_path)
    probe = make_probe("task", {"sizes": [4, 30], "strings": 2, "settings": {"task": "duplicate_ngram", "ngram": 2}})
    asked = probe.describe(probe.items(data)[-1], data)
    string = asked.asked.removesuffix("|")
    assert len(string) == 30
    assert asked.expected == f"{string}."


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"sizes": [0]}, "positive sizes"),
        ({"sizes": []}, "positive sizes"),
        ({"settings": {"vocab_size": 5}}, "change the vocabulary"),
        ({"settings": {"lenght": 5}}, "lenght"),
    ],
)
def test_what_cannot_be_asked_is_refused(settings: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=words):
        make_probe("task", settings).items(data_of(TASKS["copy"], tmp_path))


def test_text_has_no_task(data: ProbeData) -> None:
    with pytest.raises(UserError, match="with text as the corpus"):
        make_probe("task").items(data)


def test_too_many_pairs_are_refused_before_training(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="5 pairs in 16 positions"):
        make_probe("task", {"sizes": [5]}).items(data_of(TASKS["mqar"], tmp_path))


def test_ignored_places_are_what_the_model_ignores() -> None:
    task = make_task(TASKS["copy"], "task")
    assert set(task.example(np.random.default_rng(0), 2).labels[:3].tolist()) == {IGNORE}


def test_mqar_is_asked_cell_by_cell_and_against_the_state(tmp_path: Path, ask: Any) -> None:
    data = data_of(TASKS["mqar"], tmp_path)
    probe = make_probe("mqar", {"sizes": [1, 2, 3, 4], "lengths": [8, 16], "strings": 8, "free_running": False})
    records = ask(probe, Parrot(data), data)
    cells = {(record.answer["length"], record.answer["size"]) for record in records}
    # 4 x pairs <= length.
    assert cells == {(8, 1), (8, 2), (16, 1), (16, 2), (16, 3), (16, 4)}
    assert all(len(record.answer["forced"]) == record.answer["size"] for record in records)
    one = next(record for record in records if (record.answer["length"], record.answer["size"]) == (16, 2))
    # Two values out of nine; the parrot holds four bytes a token.
    assert one.answer["bits"] == pytest.approx(2 * np.log2(9))
    (load,) = [seen.x for seen in probe.observe(one) if seen.metric == "load"]
    assert load == pytest.approx(100 * 2 * np.log2(9) / (8 * 4 * 16), rel=0.01)
    found = measured(probe, records)
    assert found["accuracy", 4.0].n == 8
    assert found["accuracy", 1.0].n == 16


def test_a_curriculum_of_training_is_nothing_to_a_probe(tmp_path: Path, ask: Any) -> None:
    # The probe asks for one pair only where the curriculum begins with two, and a range that the curriculum exceeds.
    grown = {**TASKS["mqar"], "curriculum": {"kind": "grow", "short": 2, "steps": 10}}
    data = data_of(grown, tmp_path)
    probe = make_probe("mqar", {"sizes": [1, 4], "lengths": [8, 16], "strings": 2, "free_running": False})
    assert len(ask(probe, Parrot(data), data)) == 6


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"sizes": [5], "lengths": [16]}, r"\[5\] pairs in rows of \[16\]"),
        # A size that fits no row is never left out in silence.
        ({"sizes": [2, 500], "lengths": [8, 16]}, r"\[500\] pairs in rows of \[8, 16\]"),
        ({"lengths": [20]}, "vocab_size = 18 for rows of 20"),
    ],
)
def test_mqar_that_cannot_be_is_refused(settings: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=words):
        make_probe("mqar", settings).items(data_of(TASKS["mqar"], tmp_path))


def test_mqar_of_another_task_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="with the task copy"):
        make_probe("mqar").items(data_of(TASKS["copy"], tmp_path))


@pytest.mark.parametrize(
    ("rights", "expected"),
    [
        ([1.0, 0.9, 0.3], (10 * 2 ** (2 / 3), 0)),
        # Fewer pairs than in training can be answered worse; they are not the load that a state breaks under.
        ([0.3, 0.5, 0.1], (10.0, 0)),
        ([0.4, 0.3, 0.2], (5.0, -1)),
        ([0.9, 0.8, 0.7], (20.0, 1)),
    ],
)
def test_half_right_is_the_last_load_with_half(rights: list[float], expected: tuple[float, int]) -> None:
    assert half_right(list(zip((5.0, 10.0, 20.0), rights, strict=True))) == (pytest.approx(expected[0]), expected[1])


def recalling(subject: str, seed: int, kept: int) -> list[Record]:
    """Rows of a subject that keeps some pairs and no more, with a state of 4,000 bits."""
    answers = [
        {"size": size, "bits": 5.0 * size, "state_bits": 4000, "forced": [int(i < kept) for i in range(size)]}
        for size in (1, 2, 4, 8, 16)
    ]
    return [
        Record(key="", probe="mqar", protocol={}, item=f"{answer['size']}", subject=subject, seed=seed, fingerprint="",
               answer=answer, seconds=0.0)
        for answer in answers
    ]  # fmt: skip


def test_a_subject_holds_the_median_of_its_seeds() -> None:
    runs = [recalling("small", seed, kept) for seed, kept in enumerate((2, 4, 1))] + [recalling("large", 0, 16)]
    found = {(m.metric, m.subject): m for m in make_probe("mqar").derive_of_runs(runs)}
    small, large = found["half", "small"], found["half", "large"]
    # What keeps k pairs of n answers half of 2k.
    assert (small.low, small.value, small.high) == pytest.approx((10.0, 20.0, 40.0))
    assert (small.seeds, small.note) == (3, "")
    assert (large.value, large.note) == (80.0, "1 of 1 seeds above half at the most asked")
    assert found["state_bits", "small"].value == 4000.0


@pytest.mark.parametrize(
    ("kept", "beyond"), [((4, 16), True), ((2, 4, 16), False), ((2, 16, 16), True), ((2, 4, 16, 16), True)]
)
def test_a_median_is_not_known_where_half_of_the_seeds_are_not(kept: tuple[int, ...], beyond: bool) -> None:
    runs = [recalling("a", seed, pairs) for seed, pairs in enumerate(kept)]
    half = next(m for m in make_probe("mqar").derive_of_runs(runs) if m.metric == "half")
    assert half.beyond == beyond
