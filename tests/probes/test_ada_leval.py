"""Ada-LEval: the official rules with their defects, strict ones, likelihood over all answers, and nothing truncated."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from longspan.engines.base import UnusableAnswer
from longspan.foundation.errors import DataError, UserError
from longspan.probes.ada_leval.extraction import (
    ORDERS,
    follows_instruction,
    official_candidate,
    official_order,
    order_is_right,
    strict_candidate,
    strict_order,
)
from longspan.probes.ada_leval.items import best_answer_prompt, read_items
from longspan.probes.base import Probe, ProbeData, make_probe, reader

Ask = Callable[..., list[Any]]


def best_answer_rows() -> list[dict[str, Any]]:
    return [
        {
            "question_id": 100 + number,
            "question": f"How do I sort list {number}?",
            "all_answers": [f"Use way {k} of {number}." for k in range(1, 4 + number)],
            "answer": "A4" if number == 7 else f"A{1 + number % 3}",
            "tags": ["python"],
        }
        for number in range(8)
    ]


def tsort_rows() -> list[dict[str, Any]]:
    orders = [[4, 1, 3, 2], *[list(order) for order in list(permutations(range(1, 5)))[1:8]]]
    return [
        {
            "book_id": 7 + number // 2,
            "para_offset": [number, 4],
            "answer": order if number % 2 else json.dumps(order),
            "prompt": f"Order the pieces {' '.join(map(str, order))}. Format: Answer: [4, 1, 3, 2]",
        }
        for number, order in enumerate(orders)
    ]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("ada")
    for name, rows in (("best_answer", best_answer_rows()), ("tsort", tsort_rows())):
        (folder / f"{name}.json").write_text(json.dumps(rows), encoding="utf-8")
    return {name: folder / f"{name}.json" for name in ("best_answer", "tsort")}


@pytest.fixture
def probe(files: dict[str, Path]) -> Callable[..., Probe]:
    def make(task: str, **settings: Any) -> Probe:
        return make_probe("ada_leval", {"task": task, "files": {2000: str(files[task])}, **settings})

    return make


def by(summary: Any, metric: str) -> float:
    return next(m.value for m in summary.measurements if m.metric == metric)


# --- rules ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", [[], [2], [2, 1]])
def test_upstream_counts_an_order_that_ends_early_as_right(order: list[int]) -> None:
    text = f"Answer: {order}"
    read = official_order(text)
    assert order_is_right(read, [2, 1, 4, 3], "official")
    assert not order_is_right(read, [2, 1, 4, 3], "official_lengths")
    assert strict_order(text) is None


@pytest.mark.parametrize(
    ("text", "official", "strict"),
    [
        ("Answer: [2, 1, 4, 3]", [2, 1, 4, 3], [2, 1, 4, 3]),
        ("Answer: 2, 1, 4, 3", [2, 1, 4, 3], None),
        ("The order is [3,4,1,2].", [3, 4, 1, 2], [3, 4, 1, 2]),
        ("Answer: [1, 2, 3, 4] or [2, 1, 4, 3]", None, None),
        ("Answer: [1, 1, 2, 3]", [1, 1, 2, 3], None),
        ("<think>[1, 2, 3, 4]?</think>Answer: [2, 1, 4, 3]", [2, 1, 4, 3], [2, 1, 4, 3]),
        ("I do not know", None, None),
        ("Answer: {}", None, None),
    ],
)
def test_orders(text: str, official: list[int] | None, strict: list[int] | None) -> None:
    assert official_order(text) == official
    assert strict_order(text) == strict


@pytest.mark.parametrize(
    ("text", "official", "strict"),
    [
        ("A3", "A3", "A3"),
        ("A3 is better than A7", "A7", None),
        ("the 2nd of 14 answers", "A14", None),
        ("A12", "A12", "A12"),
        ("Answer A2, because A2 works", "A2", "A2"),
        ("A99", "A9", None),
        ("none of them", None, None),
    ],
)
def test_candidates(text: str, official: str | None, strict: str | None) -> None:
    assert official_candidate(text, 20) == official
    assert strict_candidate(text, 20) == strict


def test_following_the_instruction_needs_no_right_answer() -> None:
    assert follows_instruction("Answer: 1 2 3 4", None)
    assert not follows_instruction("Answer: [1, 2]", None)
    assert follows_instruction("A3 or A7", 8)
    assert not follows_instruction("A9", 8)


# --- items ------------------------------------------------------------------------------------------------------------


def test_ids_and_prompts_are_those_of_the_description(files: dict[str, Path]) -> None:
    best = read_items(files["best_answer"], "best_answer")
    assert best[0].id == "100_A1"
    assert (best[3].candidates, best[3].gold) == (6, "A1")
    prompt = best_answer_prompt("Why?", ["one", "two"])
    assert '"A4"' in prompt.split("\n\n")[0]
    assert (
        "The question is given below.\n\nWhy?\n\nPossible answers are given below.\n\nA1:\n\none\n\nA2:\n\ntwo\n\n"
        in prompt
    )
    assert prompt.endswith("MOST helpful answer.")
    tsort = read_items(files["tsort"], "tsort")
    assert tsort[0].id == "7_0_4"
    assert tsort[0].prompt == tsort_rows()[0]["prompt"]
    assert [each.gold for each in tsort[:2]] == [[4, 1, 3, 2], list(ORDERS[1])]


def test_a_row_whose_answer_cannot_be_is_refused(tmp_path: Path) -> None:
    for task, row in (
        ("best_answer", {**best_answer_rows()[0], "answer": "A9"}),
        ("tsort", {**tsort_rows()[0], "answer": "[1, 2, 3]"}),
    ):
        path = tmp_path / f"{task}.json"
        path.write_text(json.dumps([row]), encoding="utf-8")
        with pytest.raises(DataError, match="row 1"):
            read_items(path, task)  # type: ignore[arg-type]


def test_without_files_there_is_nothing_to_ask(data: ProbeData) -> None:
    with pytest.raises(UserError, match="no files"):
        make_probe("ada_leval", {}).items(data)


# --- asking -----------------------------------------------------------------------------------------------------------


def test_a_subject_that_copies_the_sample_is_found_out(
    probe: Callable[..., Probe], data: ProbeData, writing: Callable[..., Any], ask: Ask, read: Callable[..., Any]
) -> None:
    asked = probe("tsort")
    _, summary = read(asked, ask(asked, writing(lambda prompt: "Answer: [4, 1, 3, 2]"), data))
    assert by(summary, "copy_rate") == by(summary, "instruction_rate") == 1.0
    assert by(summary, "accuracy") == by(summary, "expectation") == 1 / 8
    assert by(summary, "chance") == pytest.approx(1 / 24)


def test_valid_replies_are_a_denominator_of_their_own(
    probe: Callable[..., Probe], data: ProbeData, writing: Callable[..., Any], ask: Ask, read: Callable[..., Any]
) -> None:
    asked = probe("best_answer", scorer="strict")
    engine = writing(lambda prompt: "A4" if "list 6" in prompt or "list 7" in prompt else "who knows")
    _, summary = read(asked, ask(asked, engine, data))
    assert by(summary, "copy_rate") == 0.25
    assert by(summary, "copy_rate_valid") == 1.0
    assert by(summary, "null_rate") == 0.75
    assert by(summary, "accuracy") == by(summary, "expectation") == 1 / 8
    assert by(summary, "chance") == pytest.approx(np.mean([1 / n for n in range(3, 11)]))


def test_records_are_read_by_another_rule_without_a_model(
    probe: Callable[..., Probe], data: ProbeData, writing: Callable[..., Any], ask: Ask, read: Callable[..., Any]
) -> None:
    official = probe("tsort")
    records = ask(official, writing(lambda prompt: "Answer: []"), data)
    assert by(read(official, records)[1], "accuracy") == 1.0
    assert by(read(reader(records[0].protocol, scorer="official_lengths"), records)[1], "accuracy") == 0.0
    assert by(read(reader(records[0].protocol, scorer="strict"), records)[1], "null_rate") == 1.0


def test_what_does_not_fit_is_left_out_and_never_cut(
    probe: Callable[..., Probe], data: ProbeData, writing: Callable[..., Any], ask: Ask, read: Callable[..., Any]
) -> None:
    asked = probe("best_answer", likelihood=False, max_new_tokens=8)
    everything = writing(lambda prompt: "A1")
    lengths = sorted(record.answer["prompt_tokens"] for record in ask(asked, everything, data))
    limit = lengths[3] + 8
    engine = writing(lambda prompt: "A1", limit=limit)
    records = ask(asked, engine, data)
    assert sorted(map(len, engine.prompts)) == lengths[:4]
    assert len(records) == 8
    observations, summary = read(asked, records)
    assert by(summary, "evaluable") == 0.5
    assert sum(seen.metric == "accuracy" for seen in observations) == 4


@pytest.mark.parametrize("task", ["best_answer", "tsort"])
def test_a_subject_to_which_all_is_alike_scores_at_chance_by_likelihood(
    task: str,
    probe: Callable[..., Probe],
    data: ProbeData,
    writing: Callable[..., Any],
    ask: Ask,
    read: Callable[..., Any],
) -> None:
    asked = probe(task, generate=False)
    engine = writing(lambda prompt: "", say=lambda tokens: np.full(len(tokens), 1.0 / len(tokens)))
    _, summary = read(asked, ask(asked, engine, data))
    assert by(summary, "likelihood_accuracy") == pytest.approx(by(summary, "chance"))
    assert not engine.prompts


def test_likelihood_finds_the_order_that_a_subject_believes_in(
    probe: Callable[..., Probe],
    data: ProbeData,
    writing: Callable[..., Any],
    ask: Ask,
    read: Callable[..., Any],
    tokenizer: Any,
) -> None:
    asked = probe("tsort", generate=False)
    wanted = tokenizer.encode(f"{[4, 1, 3, 2]}\n").tolist()
    engine = writing(lambda prompt: "", say=lambda t: np.full(len(t), 0.1 if t.tolist() == wanted else 1.0))
    records = ask(asked, engine, data)
    assert {len(record.answer["nll"]) for record in records} == {24}
    assert by(read(asked, records)[1], "likelihood_accuracy") == 1 / 8


def test_an_engine_that_only_scores_is_asked_for_likelihoods(
    probe: Callable[..., Probe], data: ProbeData, writing: Callable[..., Any], ask: Ask
) -> None:
    engine = writing(lambda prompt: "")
    engine.capabilities = frozenset({"score"})
    records = ask(probe("tsort"), engine, data)
    assert all("nll" in record.answer and "response" not in record.answer for record in records)
    with pytest.raises(UserError, match="cannot `generate`"):
        ask(probe("tsort", likelihood=False), engine, data)


def test_the_protocol_holds_what_the_files_hold(
    files: dict[str, Path], tmp_path: Path, probe: Callable[..., Probe]
) -> None:
    copy = tmp_path / "copy.json"
    copy.write_bytes(files["tsort"].read_bytes())
    assert probe("tsort", files={2000: str(copy)}).protocol() == probe("tsort").protocol()


def test_a_real_subject_scores_all_candidates(
    probe: Callable[..., Probe], data: ProbeData, subject: Callable[..., Any], ask: Ask
) -> None:
    records = ask(probe("best_answer", max_items=1, generate=False), subject("M"), data)
    assert [len(record.answer["nll"]) for record in records] == [3]


@pytest.mark.parametrize("bad", ["every answer", "the right answer", "a wrong answer"])
def test_nan_is_an_error_and_never_the_best_answer(
    bad: str, probe: Callable[..., Probe], data: ProbeData, writing: Callable[..., Any], ask: Ask, tokenizer: Any
) -> None:
    # An argmin would take the NaN for the least.
    right = tokenizer.encode("A1\n").tolist()
    hit = {"every answer": (True, False), "the right answer": (True,), "a wrong answer": (False,)}[bad]
    engine = writing(lambda prompt: "", say=lambda t: np.full(len(t), np.nan if (t.tolist() == right) in hit else 1.0))
    with pytest.raises(UnusableAnswer, match="the answers to 100_A1"):
        ask(probe("best_answer", generate=False), engine, data)
