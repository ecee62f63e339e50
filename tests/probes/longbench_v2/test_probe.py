"""LongBench-v2 asked: every row at every context, what cannot be asked, the variants, and what records say."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from longspan.engines.base import UnusableAnswer
from longspan.foundation.errors import DataError, UserError
from longspan.probes.base import Probe, ProbeData, make_probe, reader
from longspan.probes.longbench_v2 import LongBenchV2
from longspan.probes.longbench_v2.nulls import CAUSES, null_cause
from longspan.probes.longbench_v2.prompts import ANSWER_PREFIX, render
from longspan.probes.longbench_v2.truncation import fit

from .conftest import Ask, by, know, rows


def test_every_row_is_asked_at_every_context_the_contexts_of_a_row_together(
    probe: Callable[..., Probe], data: ProbeData
) -> None:
    items = probe(contexts=[400, 4000]).items(data)
    assert [item.id for item in items[:4]] == ["id00@400", "id00@4000", "id01@400", "id01@4000"]
    assert len(items) == 24
    assert [item.id for item in probe(max_items=2).items(data)] == ["id00@64", "id01@64"]


def test_more_context_shows_more_of_the_document_and_scores_follow(
    probe: Callable[..., Probe], data: ProbeData, writing: Callable[..., Any], ask: Ask, read: Callable[..., Any]
) -> None:
    asked = probe(contexts=[600, 20_000])
    engine = writing(know)
    records = ask(asked, engine, data)
    assert max(map(len, engine.prompts)) <= 20_000 - 32
    _, summary = read(asked, records)
    assert by(summary, "accuracy", 20_000.0) == 1.0
    assert by(summary, "fully_visible", 20_000.0) == 1.0
    assert by(summary, "accuracy", 600.0) == 0.0
    assert by(summary, "null_rate", 600.0) == 1.0
    assert by(summary, "compensated", 600.0) == 0.25
    assert by(summary, "fully_visible", 600.0) == 0.0
    assert 0.2 < by(summary, "kept_fraction", 600.0) < 0.6
    short = next(record for record in records if record.item == "id05@600")
    assert short.answer["truncation"]["doc_tokens_kept"] < short.answer["truncation"]["doc_tokens_total"]
    assert {record.item for record in records if record.answer.get("substitution_differs")} == {
        "id03@600",
        "id03@20000",
    }


def test_a_prompt_and_its_reply_fit_the_context_and_sampling_is_the_official_one(
    probe: Callable[..., Probe], data: ProbeData, writing: Callable[..., Any], ask: Ask
) -> None:
    engine = writing(know)
    ask(probe(contexts=[500]), engine, data)
    assert all(len(prompt) <= 500 - 32 for prompt in engine.prompts)
    assert engine.samplings[0].temperature == 0.1
    assert make_probe("longbench_v2", {}).max_new_tokens == 128


def test_what_a_subject_cannot_take_is_not_evaluable_and_not_wrong(
    probe: Callable[..., Probe], data: ProbeData, writing: Callable[..., Any], ask: Ask, read: Callable[..., Any]
) -> None:
    asked = probe(contexts=[150, 600, 1000])
    records = ask(asked, writing(know, limit=700), data)
    reasons = {record.item: record.answer.get("not_evaluable") for record in records}
    assert reasons["id00@1000"] == "the subject takes 700 tokens"
    assert "the question alone has" in reasons["id00@150"]
    assert reasons["id00@600"] is None
    observations, _ = read(asked, records)
    assert {seen.x for seen in observations} == {600.0}


def test_reasoning_first_then_the_answer_without_the_document(
    probe: Callable[..., Probe], data: ProbeData, writing: Callable[..., Any], ask: Ask
) -> None:
    def write(prompt: str) -> str | tuple[str, str]:
        if "Based on the above" in prompt:
            assert "<text>" not in prompt
            assert "step by step: It is written there." in prompt
            return "The correct answer is (A)."
        return " It is written there. ", "length"

    engine = writing(write)
    records = ask(probe(contexts=[1000], variant="cot", reasoning_tokens=48, max_items=2), engine, data)
    assert [sampling.max_new_tokens for sampling in engine.samplings] == [48, 48, 32, 32]
    assert records[0].answer["reasoning_finish"] == "length"
    assert records[0].answer["response"] == "The correct answer is (A)."
    assert records[0].answer["finish_reason"] == "stop"


def test_without_context_nothing_of_the_document_is_shown(
    probe: Callable[..., Probe], data: ProbeData, writing: Callable[..., Any], ask: Ask
) -> None:
    engine = writing(lambda prompt: "The correct answer is (A).")
    records = ask(probe(contexts=[1000], variant="no_context"), engine, data)
    assert not any("In room" in engine.tokenizer.decode(prompt) for prompt in engine.prompts)
    assert "doc_tokens_total" not in records[0].answer["truncation"]


def test_the_likelihood_of_the_letters_needs_no_reply_and_has_no_nulls(
    probe: Callable[..., Probe],
    data: ProbeData,
    writing: Callable[..., Any],
    ask: Ask,
    read: Callable[..., Any],
    tokenizer: Any,
) -> None:
    likely = {int(tokenizer.encode(letter)[-1]): nll for letter, nll in zip("ABCD", (3.0, 1.0, 2.0, 4.0), strict=True)}
    engine = writing(lambda prompt: "", say=lambda tokens: np.array([likely.get(int(t), 9.0) for t in tokens]))
    asked = probe(contexts=[20_000])
    records = ask(asked, engine, data)
    assert records[0].answer["letters"] == [3.0, 1.0, 2.0, 4.0]
    _, summary = read(asked, records)
    assert by(summary, "letter_accuracy") == 0.25
    # Over an equal prior nothing is left, and all four share the point.
    assert by(summary, "letter_accuracy_calibrated") == 0.25
    assert by(summary, "null_rate") == 1.0


def test_slices_and_letters_add_up(
    probe: Callable[..., Probe], data: ProbeData, writing: Callable[..., Any], ask: Ask, read: Callable[..., Any]
) -> None:
    asked = probe(contexts=[20_000])
    records = ask(asked, writing(lambda prompt: "The correct answer is (C)."), data)
    _, summary = read(asked, records)
    assert by(summary, "accuracy") == 0.25
    assert by(summary, "said_C") == 1.0
    assert by(summary, "accuracy_easy") == 0.5
    assert by(summary, "accuracy_hard") == 0.0


def test_stored_answers_are_read_by_another_rule_without_a_model(
    probe: Callable[..., Probe], data: ProbeData, writing: Callable[..., Any], ask: Ask, read: Callable[..., Any]
) -> None:
    official = probe(contexts=[20_000])
    records = ask(official, writing(lambda prompt: "Answer: C"), data)
    assert by(read(official, records)[1], "null_rate") == 1.0
    robust = reader(records[0].protocol, scorer="robust")
    assert by(read(robust, records)[1], "null_rate") == 0.0
    assert official.protocol() == probe(contexts=[20_000], scorer="robust").protocol()


def test_the_protocol_holds_the_content_of_the_data_and_not_its_place(
    file: Path, tmp_path: Path, probe: Callable[..., Probe]
) -> None:
    copy = tmp_path / "elsewhere.json"
    copy.write_bytes(file.read_bytes())
    assert probe(data=str(copy)).protocol() == probe().protocol()
    copy.write_text(json.dumps(rows()[:3]), encoding="utf-8")
    assert probe(data=str(copy)).protocol() != probe().protocol()


def test_rows_about_one_document_are_one_cluster(
    tmp_path: Path, data: ProbeData, writing: Callable[..., Any], ask: Ask, read: Callable[..., Any]
) -> None:
    shared = [{**row, "context": rows()[number // 2]["context"]} for number, row in enumerate(rows())]
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in shared), encoding="utf-8")
    asked = make_probe("longbench_v2", {"data": str(path), "contexts": [20_000]})
    observations, _ = read(asked, ask(asked, writing(know), data))
    assert len({seen.cluster for seen in observations}) == 6


def test_letters_and_reply_come_of_one_prompt_that_is_computed_once(
    probe: Callable[..., Probe], data: ProbeData, subject: Callable[..., Any], ask: Ask
) -> None:
    engine = subject("AM")
    asked = probe(contexts=[500, 800], max_items=2, max_new_tokens=40)
    records = ask(asked, engine, data)
    # Four prompts, four prefixes for the letters of as many tokens and a few more, and four without the document.
    assert engine.shared_tokens > 0.4 * engine.asked_tokens
    assert sum(record.answer.get("shared_tokens", 0) for record in records) > 300
    for record in records:
        prompt = fit(engine, render("direct", rows()[int(record.answer["id"][2:])]), record.answer["context"] - 40)
        assert prompt is not None
        assert record.answer["truncation"] == prompt.ledger
        prefix = engine.encode_prompt(prompt.text, ANSWER_PREFIX)
        assert len(prefix) < record.answer["context"]
        cold = engine.score(prefix, [engine.tokenizer.encode(letter) for letter in "ABCD"])
        assert record.answer["letters"] == pytest.approx([float(nll.sum()) for nll in cold], abs=1e-4)


def test_the_contexts_of_a_row_are_asked_in_one_call(probe: Callable[..., Probe], data: ProbeData) -> None:
    asked = probe(contexts=[400, 100_000, 60_000], max_items=3)
    found = list(asked.batches(asked.items(data)))
    assert [[item.details["row"] for item in batch] for batch in found] == [[0] * 3, [1] * 3, [2] * 3]
    small = probe(contexts=[400, 600], max_items=3)
    assert [len(batch) for batch in small.batches(small.items(data))] == [6]


def test_every_missing_answer_has_one_cause_and_a_reader_sees_the_reply(
    probe: Callable[..., Probe], data: ProbeData, writing: Callable[..., Any], ask: Ask, read: Callable[..., Any]
) -> None:
    says = {"0": "", "1": "The correct answer is (B).", "2": ("Let me think", "length"), "3": "I cannot say.\n(*)"}
    asked = probe(contexts=[20_000], max_items=4)
    records = ask(asked, writing(lambda prompt: says[prompt.rsplit("in room ", 1)[1][0]]), data)
    _, summary = read(asked, records)
    causes = {m.metric: m.value for m in summary.measurements if m.metric.startswith("cause_")}
    assert len(causes) == len(CAUSES)
    assert {name for name, value in causes.items() if value} == {"cause_empty", "cause_token_limit", "cause_refusal"}
    assert sum(causes.values()) == by(summary, "null_rate") == 0.75
    assert [asked.reply(record).null for record in records] == ["empty", "", "token limit", "refusal"]
    assert asked.reply(records[1]).text == "The correct answer is (B)."
    again = probe(contexts=[20_000], max_items=1, re_ask=True)
    (record,) = ask(again, writing(lambda prompt: "A" if "<reply>" in prompt else "Hm."), data)
    assert again.reply(record).text == "Hm. [asked again:] A"


def test_bad_data_is_told_by_file_and_field(tmp_path: Path, data: ProbeData) -> None:
    path = tmp_path / "data.json"
    path.write_text(json.dumps([{"_id": "1"}]), encoding="utf-8")
    with pytest.raises(DataError, match="row 1 has no field `question`"):
        make_probe("longbench_v2", {"data": str(path)}).items(data)
    path.write_text("{", encoding="utf-8")
    with pytest.raises(DataError, match="is not JSON"):
        make_probe("longbench_v2", {"data": str(path)}).items(data)
    with pytest.raises(UserError, match=r"nowhere\.json is not there"):
        make_probe("longbench_v2", {"data": "nowhere.json"}).items(data)


def test_a_context_without_room_for_a_reply_is_refused() -> None:
    with pytest.raises(UserError, match=r"contexts = \[100\]"):
        LongBenchV2.parse({"kind": "longbench_v2", "contexts": [100]}, "probes.longbench_v2")
    assert make_probe("longbench_v2", {"contexts": [130]}).contexts == (130,)


def test_an_item_is_shown_with_its_choices(probe: Callable[..., Probe], data: ProbeData) -> None:
    asked = probe()
    shown = asked.describe(asked.items(data)[1], data)
    assert "Which word is in room 1?  (A) noA  (B) key1" in shown.asked
    assert shown.expected == "B"


def test_a_real_subject_answers(
    probe: Callable[..., Probe], data: ProbeData, subject: Callable[..., Any], ask: Ask
) -> None:
    records = ask(probe(contexts=[300], max_items=1, max_new_tokens=4), subject("M"), data)
    assert all(np.isfinite(record.answer["letters"]).all() for record in records)
    assert all(record.answer["new_tokens"] <= 4 for record in records)


@pytest.mark.parametrize("letters", ["ABCD", "A", "D"])
def test_nan_is_an_error_and_no_score(
    letters: str, probe: Callable[..., Probe], data: ProbeData, writing: Callable[..., Any], ask: Ask, tokenizer: Any
) -> None:
    bad = [tokenizer.encode(letter).tolist() for letter in letters]
    engine = writing(know, say=lambda tokens: np.full(len(tokens), np.nan if tokens.tolist() in bad else 1.0))
    with pytest.raises(UnusableAnswer, match="the letters of id00"):
        ask(probe(contexts=[2000], max_items=1), engine, data)


def test_a_failed_request_is_a_null_with_its_cause(
    probe: Callable[..., Probe], data: ProbeData, writing: Callable[..., Any], ask: Ask, read: Callable[..., Any]
) -> None:
    engine = writing(know)
    generate = engine.generate
    engine.generate = lambda prompts, sampling: [
        replace(each, text="", finish_reason="failed", failure="timeout", detail="no reply in 60 s")
        for each in generate(prompts, sampling)
    ]
    asked = probe(contexts=[20_000])
    records = ask(asked, engine, data)
    assert {record.answer["failure"] for record in records} == {"timeout"}
    assert null_cause(records[0].answer) == "transport_error"
    assert by(read(asked, records)[1], "accuracy") == 0.0


def test_an_interrupted_probe_goes_on_to_the_same_records(
    probe: Callable[..., Probe], data: ProbeData, writing: Callable[..., Any], ask: Ask
) -> None:
    asked = probe(contexts=[600, 50_000], max_items=4)
    items = asked.items(data)
    whole = {record.key: record.answer for record in ask(asked, writing(know), data)}
    batches = list(asked.ask(writing(know), items, data))
    assert len(batches) > 1
    for done in range(len(batches)):
        known = {answer.item for batch in batches[:done] for answer in batch}
        rest = [item for item in items if item.id not in known]
        later = [answer for batch in asked.ask(writing(know), rest, data) for answer in batch]
        assert {answer.item for answer in later}.isdisjoint(known)
        every = [*(answer for batch in batches[:done] for answer in batch), *later]
        assert {a.item: a.content for a in every} == {f"{r['id']}@{r['context']}": r for r in whole.values()}
