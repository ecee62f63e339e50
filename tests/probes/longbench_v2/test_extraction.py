"""Extraction: the rules with their defects, the one without, and every stored prediction and table of real answers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from longspan.commands.recorded_runs import keep
from longspan.probes.longbench_v2.extraction import earlier, first_pass, official, robust
from longspan.probes.longbench_v2.nulls import null_cause, repeated_share
from longspan.probes.longbench_v2.recorded import origin_of, read_longbench
from longspan.probes.longbench_v2.scores import score

RULES = {"repo": "earlier", "official": "official", "first_pass": "first_pass"}
POLICIES = {"all": "all", "keep_first": "first", "drop_all_duplicated_ids": "drop"}


@pytest.fixture(scope="module")
def golden(shared_data: Path) -> dict[str, Any]:
    folder = shared_data / "longbench_v2_answers"
    numbers = json.loads((folder / "golden_numbers.json").read_text())
    return {"folder": folder, **numbers}


def test_every_stored_prediction_comes_out_again(golden: dict[str, Any]) -> None:
    for name, facts in golden["files"].items():
        path = golden["folder"] / name
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        assert [earlier(row["response"]) for row in rows] == [row["pred"] for row in rows]
        assert all((row["pred"] == row["answer"]) == row["judge"] for row in rows)
        imported = read_longbench(path, "ssm-experiment", origin_of(path))
        assert imported.disagreeing == 0
        assert (imported.rows, imported.reprompted) == (facts["rows"], facts["reprompted_rows"])
        assert imported.rows - sum(imported.duplicated.values()) + len(imported.duplicated) == facts["unique_ids"]


def test_every_recorded_table_comes_out_again(golden: dict[str, Any]) -> None:
    checked = 0
    for name, facts in golden["files"].items():
        path = golden["folder"] / name
        records = read_longbench(path, "ssm-experiment", origin_of(path)).records
        for theirs, ours in POLICIES.items():
            kept = [record.answer for record in keep(records, ours)]
            for rule, scorer in RULES.items():
                found = score(kept, scorer)
                groups = {each.group.replace("domain: ", "dom:"): each for each in found.groups}
                for group, (correct, n, nulls) in facts[theirs][rule].items():
                    each = groups[group]
                    assert (each.correct, each.n, each.nulls) == (correct, n, nulls), (name, theirs, rule, group)
                    checked += 1
                if rule == "official":
                    compensated = 100 * groups["all"].compensated
                    assert compensated == pytest.approx(facts[theirs]["official_compensated_pct"], abs=6e-5)
    assert checked == 3 * 3 * 3 * 12


def test_the_constant_letter_scores_what_it_is_known_to(golden: dict[str, Any]) -> None:
    path = golden["folder"] / "Llama-3.1-8B-Instruct__ctx65536__rep1.jsonl"
    answers = [record.answer for record in read_longbench(path, "ssm-experiment", origin_of(path)).records]
    letter, share = score(answers, "official").constant
    assert (letter, round(share, 4)) == ("C", 0.2942)


@pytest.mark.parametrize(
    ("reply", "read_official", "read_robust"),
    [
        ("The correct answer is (C).", "C", "C"),
        ("**The correct answer is (C)**", "C", "C"),
        ("The correct answer is Both of them.", "B", None),
        ("The correct answer is based on the text.", None, None),
        ("the correct answer is (A)", None, "A"),
        ("The correct answer is A, because", "A", "A"),
        ("The correct answer is (insert answer here)", None, None),
        ("D.", None, "D"),
        (" C. ", None, "C"),
        ("(D", None, "D"),
        ("(B) The second one", None, "B"),
        ("B. The second one\nbecause it is", None, "B"),
        ("A combination of both", None, None),
        ("Answer: B", None, "B"),
        ("Final answer: X (X is B).\nThe correct answer is (B).", "B", "B"),
        ("The correct answer is (A). The correct answer is (B).", "A", None),
        ("The answer is (A). On second thought it is late.\nFinal answer: B", None, "B"),
        ("<think>The correct answer is (A)?</think>The correct answer is (B).", "A", "B"),
        ("<think>The correct answer is (A) or", "A", None),
        ("The correct answer is (B).\nUser: and the next?\nThe correct answer is (C).", "B", "B"),
        (r"The answer is \boxed{D}.", None, "D"),
        ("The correct answer is (E).", None, None),
        ("", None, None),
    ],
)
def test_official_keeps_its_defects_and_robust_means_what_it_reads(
    reply: str, read_official: str | None, read_robust: str | None
) -> None:
    assert official(reply) == read_official
    assert robust(reply) == read_robust


@pytest.mark.parametrize(
    ("reply", "read"),
    [
        ("The correct answer is based on the text.", "B"),
        ("The correct answer is a combination.", "A"),
        ("Final answer: AC", "A"),
        ("D.", None),
        ("(D", None),
        ("It is\nD", "D"),
        ("The correct answer is (A). " + "So it goes. " * 100, None),
        ("nothing\n\n[REPROMPT]\nB", "B"),
        ("Answer: A\n\n[REPROMPT]\nB", "A"),
    ],
)
def test_the_earlier_rule_keeps_its_defects(reply: str, read: str | None) -> None:
    assert earlier(reply) == read


def test_the_first_pass_leaves_the_second_question_out() -> None:
    assert first_pass("nothing\n\n[REPROMPT]\nB") is None


@pytest.mark.parametrize(
    ("answer", "cause"),
    [
        ({"response": "", "failure": "transport error"}, "transport_error"),
        ({"response": "", "finish_reason": "failed", "failure": "timeout"}, "transport_error"),
        ({"response": "", "finish_reason": "failed", "failure": "context overflow"}, "context_overflow"),
        ({"response": "", "finish_reason": "failed", "failure": "empty reply"}, "empty"),
        ({"response": "", "finish_reason": "context"}, "context_overflow"),
        ({"response": " \n"}, "empty"),
        ({"response": "To find it, let us", "finish_reason": "length"}, "token_limit"),
        ({"response": "the cat sat on the mat and " * 20}, "repetition"),
        ({"response": "The answer is (A). No, the answer is (B)."}, "several_answers"),
        ({"response": "The text does not provide any information about that."}, "refusal"),
        ({"response": "The correct answer is (E)."}, "other_label"),
        ({"response": "It is the second of the four."}, "no_format"),
    ],
)
def test_every_null_has_its_cause(answer: dict[str, Any], cause: str) -> None:
    assert null_cause(answer) == cause


def test_the_first_cause_that_applies_counts() -> None:
    loop = {"response": "The answer is (A). The answer is (B). " * 20}
    assert null_cause(loop) == "repetition"
    assert null_cause({**loop, "finish_reason": "length"}) == "token_limit"


def test_prose_is_no_loop() -> None:
    assert repeated_share(" ".join(f"word{n}" for n in range(100))) == 0.0
    assert repeated_share("again and again") == 0.0


def test_an_answer_without_difficulty_counts_in_no_slice() -> None:
    found = score([{"id": "1", "gold": "A", "response": "A."}], "robust")
    assert [each.group for each in found.groups] == ["all"]
