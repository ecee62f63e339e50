"""Items of LongBench-v2 without an answer are asked again."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from longspan.probes.base import Probe, ProbeData, make_probe, reader

from .conftest import Ask, by, know, rows


def stubborn(prompt: str) -> str:
    """Says nothing useful at first, and the right letter alone where it is asked again and sees the document."""
    if "<reply>" not in prompt:
        return "Let me think about the rooms." if "room 1?" not in prompt else know(prompt)
    assert "<reply>\nLet me think about the rooms.\n</reply>" in prompt
    number = prompt.rsplit("Which word is in room ", 1)[1].split("?")[0]
    return (
        prompt.rsplit(f") key{number}\n", 1)[0][-1] + "." if f"The word is key{number}." in prompt else "I cannot say."
    )


def test_an_item_without_an_answer_is_asked_again_with_its_document_beside_the_first_reply(
    probe: Callable[..., Probe], data: ProbeData, writing: Callable[..., Any], ask: Ask, read: Callable[..., Any]
) -> None:
    asked, engine = probe(contexts=[1_000, 20_000], re_ask=True), writing(stubborn)
    records = ask(asked, engine, data)
    _, summary = read(asked, records)
    assert (by(summary, "accuracy", 20_000.0), by(summary, "null_rate", 20_000.0)) == (1 / 12, 11 / 12)
    assert (by(summary, "accuracy_re_asked", 20_000.0), by(summary, "null_rate_re_asked", 20_000.0)) == (1.0, 0.0)
    answers = {record.item: record.answer for record in records}
    assert "re_asked" not in answers["id01@20000"]
    second = answers["id05@1000"]
    assert second["response"] == "Let me think about the rooms."
    again = second["re_asked"]
    # The document was cut once more, to fit with the first reply.
    assert 0 < again["truncation"]["doc_tokens_kept"] < second["truncation"]["doc_tokens_kept"]
    assert again["truncation"]["doc_tokens_total"] == second["truncation"]["doc_tokens_total"]
    assert again["prompt_tokens"] + again["max_new_tokens"] <= 1_000
    assert again["finish_reason"] == "stop"
    shown = [engine.tokenizer.decode(prompt) for prompt in engine.prompts]
    assert sum("<reply>" in prompt for prompt in shown) == 22
    assert all("<text>\nIn room" in prompt for prompt in shown if "<reply>" in prompt)


def test_asking_again_is_a_protocol_of_its_own_and_off_by_default(
    probe: Callable[..., Probe], data: ProbeData, writing: Callable[..., Any], ask: Ask, read: Callable[..., Any]
) -> None:
    once, twice = probe(contexts=[20_000]), probe(contexts=[20_000], re_ask=True)
    assert "re_ask" not in once.protocol()
    assert not [metric for metric in once.metrics if "re_asked" in metric.name]
    assert twice.protocol()["re_asked_under"] == "official"
    assert twice.protocol() != probe(contexts=[20_000], re_ask=True, scorer="robust").protocol()
    first = {record.item: record.answer for record in ask(once, writing(stubborn), data)}
    records = ask(twice, writing(stubborn), data)
    assert {r.item: {k: v for k, v in r.answer.items() if k != "re_asked"} for r in records} == first
    # Read again without a model, by a rule of which another first reply may hold an answer.
    again = reader(records[0].protocol, scorer="robust")
    assert by(read(again, records)[1], "accuracy_re_asked") == 1.0


def test_what_cannot_be_asked_again_says_why_and_stays_without_an_answer(
    probe: Callable[..., Probe], data: ProbeData, writing: Callable[..., Any], ask: Ask, read: Callable[..., Any]
) -> None:
    asked = probe(contexts=[520], re_ask=True, max_items=1)
    (record,) = ask(asked, writing(lambda prompt: "the house " * 30), data)
    assert "question and first reply have" in record.answer["re_asked"]["not_evaluable"]
    _, summary = read(asked, [record])
    assert by(summary, "null_rate_re_asked") == 1.0
    engine = writing(know)
    generate = engine.generate
    engine.generate = lambda prompts, sampling: [
        replace(each, text="", finish_reason="failed", failure="timeout") for each in generate(prompts, sampling)
    ]
    (record,) = ask(asked, engine, data)
    assert "re_asked" not in record.answer
    assert len(engine.prompts) == 1


@pytest.mark.parametrize("variant", ["cot", "no_context", "rag"])
def test_asking_again_shows_what_the_variant_showed(
    variant: str, tmp_path: Path, data: ProbeData, writing: Callable[..., Any], ask: Ask
) -> None:
    made = [{**row, "retrieved_context": [{"content": "a chunk", "c_idx": 0}]} for row in rows()[:1]]
    path = tmp_path / "data.json"
    path.write_text(json.dumps(made), encoding="utf-8")
    settings = {"data": str(path), "contexts": [3_000], "variant": variant, "re_ask": True, "max_new_tokens": 32}
    engine = writing(lambda prompt: "B" if "<reply>" in prompt else "First this, then that.")
    (record,) = ask(make_probe("longbench_v2", settings), engine, data)
    assert record.answer["re_asked"]["response"] == "B"
    shown = engine.tokenizer.decode(engine.prompts[-1])
    assert ("In room 0" in shown) == (variant == "cot")
    assert ("Retrieved chunk 1: a chunk" in shown) == (variant == "rag")
    assert shown.count("First this, then that.") == (2 if variant == "cot" else 1)
