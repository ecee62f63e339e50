"""Answers in, scored again, compared: `longspan import`, `rescore` and `compare` on rows as others write them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from scipy import stats

from longspan.probes.longbench_v2.recorded import Origin, origin_of, read_longbench
from longspan.records.store import Record, RecordStore

Longspan = Callable[..., int]


def row(name: int | str, answer: str, reply: str, **more: Any) -> dict[str, Any]:
    facts = {"domain": "Single-Document QA", "sub_domain": "Legal", "difficulty": "easy", "length": "short"}
    return {"_id": f"item-{name}", **facts, "answer": answer, "response": reply, **more}


def said(letter: str) -> str:
    return f"The correct answer is ({letter})."


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(each) + "\n" for each in rows), encoding="utf-8")
    return path


@pytest.fixture
def asked(longspan: Longspan, capsys: pytest.CaptureFixture[str]) -> Callable[..., dict[str, Any]]:
    """The JSON that a command prints."""

    def run(*arguments: str) -> dict[str, Any]:
        capsys.readouterr()
        assert longspan(*arguments, "--json") == 0
        return json.loads(capsys.readouterr().out)

    return run


def only(found: dict[str, Any], group: str = "all") -> tuple[int, int, int]:
    (result,) = found["results"]
    (score,) = [each for each in result["groups"] if each["group"] == group]
    return score["correct"], score["n"], score["null"]


def test_the_real_answers_give_the_recorded_tables(
    shared_data: Path, tmp_path: Path, asked: Callable[..., dict[str, Any]]
) -> None:
    folder = shared_data / "longbench_v2_answers"
    golden = json.loads((folder / "golden_numbers.json").read_text())["files"]
    policies = {"all": "all", "first": "keep_first", "drop": "drop_all_duplicated_ids"}
    for name, facts in golden.items():
        run = str(tmp_path / name)
        asked("import", str(folder / name), "--format", "ssm-experiment", "--to", run)
        for policy, theirs in policies.items():
            for scorer, rule in {"official": "official", "earlier": "repo", "first_pass": "first_pass"}.items():
                found = asked("rescore", run, "--scorer", scorer, "--duplicates", policy)
                assert only(found) == tuple(facts[theirs][rule]["all"])
                assert only(found, "hard") == tuple(facts[theirs][rule]["hard"])


def test_contexts_of_one_model_are_compared_as_the_published_answers_allow(
    shared_data: Path, tmp_path: Path, asked: Callable[..., dict[str, Any]]
) -> None:
    folder = shared_data / "longbench_v2_answers"
    runs = []
    for name in ("Llama-3.1-8B-Instruct__ctx65536__rep1.jsonl", "Llama-3.1-8B-Instruct__ctx8192__rep1.jsonl"):
        runs.append(str(tmp_path / name[:-6]))
        asked("import", str(folder / name), "--format", "ssm-experiment", "--to", runs[-1])
    found = asked("compare", *runs, "--scorer", "earlier", "--metric", "accuracy")
    (pair,) = found["comparisons"]
    assert (pair["a"], pair["b"]) == ("Llama-3.1-8B-Instruct @ 65,536", "Llama-3.1-8B-Instruct @ 8,192")
    # 158 and 161 right of the same 503.
    assert pair["items"] == 503
    assert pair["only_a"] - pair["only_b"] == 158 - 161
    assert pair["difference"] == pytest.approx(-3 / 503)
    expected = stats.binomtest(pair["only_a"], pair["only_a"] + pair["only_b"]).pvalue
    assert pair["mcnemar_p"] == pytest.approx(expected)
    assert pair["low"] < pair["difference"] < pair["high"]
    assert not pair["decided"]


def test_duplicated_ids_are_reported_and_every_policy_counts_its_own(
    tmp_path: Path, longspan: Longspan, capsys: pytest.CaptureFixture[str], asked: Callable[..., dict[str, Any]]
) -> None:
    rows = [row(1, "A", said("A")), row(2, "B", said("C")), row(1, "A", said("D")), row(3, "C", "")]
    file = write(tmp_path / "model__ctx8192__rep1.jsonl", rows)
    run = str(tmp_path / "run")
    assert longspan("import", str(file), "--format", "ssm-experiment", "--to", run) == 0
    shown = capsys.readouterr().out
    assert "1 ids occur more than once (1 of 4 rows are copies): item-1 (2x); policy `all`" in shown
    assert only(asked("rescore", run, "--duplicates", "all")) == (1, 4, 1)
    assert only(asked("rescore", run, "--duplicates", "first")) == (1, 3, 1)
    found = asked("rescore", run, "--duplicates", "drop")
    assert only(found) == (0, 2, 1)
    assert "1 items were answered more than once; policy `drop`" in found["notes"][0]
    assert found["results"][0]["causes"] == {"empty": 1}
    assert found["results"][0]["letters"] == {"A": 0, "B": 0, "C": 1, "D": 0, "null": 1}


def test_importing_again_adds_only_what_is_new(tmp_path: Path, asked: Callable[..., dict[str, Any]]) -> None:
    file, run = tmp_path / "model__ctx8192__rep1.jsonl", str(tmp_path / "run")
    command = ("import", str(file), "--format", "ssm-experiment", "--to", run)
    write(file, [row(1, "A", said("A"))])
    assert asked(*command)["files"][0]["added"] == 1
    write(file, [row(1, "A", said("A")), row(2, "A", said("B"))])
    (again,) = asked(*command)["files"]
    assert (again["added"], again["known"]) == (1, 1)
    assert len(RecordStore(tmp_path / "run" / "records.jsonl")) == 2


def test_an_answer_that_contradicts_an_imported_one_is_refused(
    tmp_path: Path, longspan: Longspan, capsys: pytest.CaptureFixture[str]
) -> None:
    file, run = tmp_path / "model.jsonl", str(tmp_path / "run")
    command = ("import", str(file), "--format", "longbench", "--to", run)
    write(file, [row(1, "A", said("A"))])
    assert longspan(*command) == 0
    write(file, [row(1, "A", said("B"))])
    assert longspan(*command) == 1
    assert "the answer to item-1 differs from the one imported before" in capsys.readouterr().err
    assert longspan(*command, "--subject", "another") == 0


def test_both_protocols_are_scored_where_items_were_asked_again(
    tmp_path: Path, longspan: Longspan, capsys: pytest.CaptureFixture[str], asked: Callable[..., dict[str, Any]]
) -> None:
    def record(number: int, gold: str, first: str, second: str | None = None) -> Record:
        answer: dict[str, Any] = {"id": f"item-{number}", "gold": gold, "context": 8192, "response": first}
        if second is not None:
            answer["re_asked"] = {"response": second, "finish_reason": "stop"}
        return Record.make(
            probe="longbench_v2",
            protocol={"kind": "longbench_v2", "variant": "direct", "re_ask": True, "re_asked_under": "official"},
            item=f"item-{number}@8192",
            subject="model",
            seed=0,
            fingerprint="f",
            answer=answer,
        )

    run = tmp_path / "records.jsonl"
    with RecordStore(run) as store:
        store.append([record(1, "A", said("A")), record(2, "B", "B?", "B"), record(3, "C", "", "(D)")])
        store.append([record(4, "D", "Hm.", "I cannot say."), record(5, "A", said("C"))])
    found = asked("rescore", str(run))
    assert only(found) == (1, 5, 3)
    (result,) = found["results"]
    assert result["asked_again"] == 3
    assert [(each["correct"], each["n"], each["null"]) for each in result["re_asked"]] == [(2, 5, 1)]
    assert longspan("rescore", str(run)) == 0
    assert "3 without an answer asked again (another protocol)" in capsys.readouterr().out
    (plain,) = asked("rescore", str(run), "--scorer", "robust")["results"]
    assert plain["groups"][0]["null"] == 3


def test_longbench_names_say_the_variant(tmp_path: Path) -> None:
    rows = [row(1, "A", said("A"), response_cot="First, …", context="a document", pred="A", judge=True)]
    file = write(tmp_path / "Llama-3.1-8B-Instruct_cot.jsonl", rows)
    origin = origin_of(file)
    assert origin == Origin("Llama-3.1-8B-Instruct", variant="cot")
    (record,) = read_longbench(file, "longbench", origin).records
    assert record.answer["reasoning"] == "First, …"
    assert len(record.answer["document"]) == 16
    assert "context" not in record.answer


def test_items_about_one_document_are_one_cluster(tmp_path: Path, asked: Callable[..., dict[str, Any]]) -> None:
    for model, letter in (("left", "A"), ("right", "B")):
        rows = [
            row(n, "A" if n % 3 else "B", said(letter if n % 5 else "C"), context=f"document {n // 2}")
            for n in range(60)
        ]
        write(tmp_path / f"{model}.jsonl", rows)
        asked("import", str(tmp_path / f"{model}.jsonl"), "--format", "longbench", "--to", str(tmp_path / model))
    found = asked("compare", str(tmp_path / "left"), str(tmp_path / "right"), "--metric", "accuracy")
    (pair,) = found["comparisons"]
    assert (pair["items"], pair["n"]) == (60, 30)
    assert "bootstrap" in pair["method"]
    assert pair["mcnemar_p"] == pytest.approx(stats.binomtest(pair["only_a"], pair["only_a"] + pair["only_b"]).pvalue)


def sample(number: int, right: float, **more: Any) -> dict[str, Any]:
    return {
        "doc_id": number,
        "doc": {"q": str(number)},
        "target": "7",
        "resps": [["7"]],
        "filtered_resps": ["7"],
        "filter": "none",
        "metrics": ["exact_match"],
        "doc_hash": f"hash{number}",
        "exact_match": right,
        **more,
    }


def test_samples_of_the_harness_are_compared_item_by_item(tmp_path: Path, asked: Callable[..., dict[str, Any]]) -> None:
    right = {"one": [1.0, 1.0, 1.0, 0.0, 1.0, 1.0, 1.0, 0.0], "two": [0.0, 1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 1.0]}
    runs = []
    for model, scores in right.items():
        folder = tmp_path / model
        folder.mkdir()
        file = write(
            folder / "samples_gsm8k_2026-01-01T00-00-00.jsonl", [sample(n, score) for n, score in enumerate(scores)]
        )
        runs.append(str(tmp_path / f"run-{model}"))
        (imported,) = asked("import", str(file), "--format", "lm-eval", "--to", runs[-1])["files"]
        assert (imported["subject"], imported["added"]) == (model, 8)
    (pair,) = asked("compare", *runs)["comparisons"]
    assert (pair["metric"], pair["only_a"], pair["only_b"], pair["items"]) == ("exact_match", 4, 1, 8)
    assert pair["p"] == pytest.approx(stats.binomtest(4, 5).pvalue)
    (result, _) = asked("rescore", runs[0])["results"], None
    assert result[0]["measurements"][0]["value"] == pytest.approx(6 / 8)


def test_perplexities_of_the_harness_weigh_by_their_counts(
    tmp_path: Path, asked: Callable[..., dict[str, Any]]
) -> None:
    rows = [
        sample(n, 0.0, metrics=["word_perplexity"], word_perplexity=[-10.0 * (n + 1), 5 * (n + 1)]) for n in range(6)
    ]
    file = write(tmp_path / "samples_wikitext_2026-01-01T00-00-00.jsonl", rows)
    asked("import", str(file), "--format", "lm-eval", "--to", str(tmp_path / "run"), "--subject", "m")
    (result,) = asked("rescore", str(tmp_path / "run"))["results"]
    assert result["measurements"][0]["value"] == pytest.approx(2.0)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("import", "{file}", "--format", "lm_eval", "--to", "{run}"), "lm-eval (samples_*.jsonl"),
        (("import", "nowhere.jsonl", "--format", "longbench", "--to", "{run}"), "nowhere.jsonl is not there"),
        (("import", ".", "--format", "longbench", "--to", "{run}"), ". is a folder"),
        (("import", "{file}", "--format", "lm-eval", "--to", "{run}"), "no `doc_id` and `target`"),
        (("rescore", "nowhere"), "nowhere holds no records"),
        (("rescore", "{run}", "--scorer", "strict"), "longbench_v2: official, earlier, first_pass, robust"),
        (("rescore", "{run}", "--duplicates", "last"), "all, first, drop"),
        (("compare", "{run}"), "nothing to compare"),
    ],
)
def test_wrong_use_is_told(
    arguments: tuple[str, ...], words: str, tmp_path: Path, longspan: Longspan, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write(tmp_path / "model.jsonl", [row(1, "A", said("A"))])
    run = str(tmp_path / "run")
    assert longspan("import", str(file), "--format", "longbench", "--to", run) == 0
    capsys.readouterr()
    assert longspan(*(word.format(file=file, run=run) for word in arguments)) in (1, 2)
    error = capsys.readouterr().err
    assert words in error
    assert [line.split(":")[0] for line in error.splitlines()] == ["error", "  allowed", "  fix"]


def test_a_damaged_record_is_refused_by_line(
    tmp_path: Path, longspan: Longspan, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write(tmp_path / "model.jsonl", [row(n, "A", said("A")) for n in range(3)])
    run = tmp_path / "run"
    longspan("import", str(file), "--format", "longbench", "--to", str(run))
    lines = (run / "records.jsonl").read_text().splitlines()
    (run / "records.jsonl").write_text("\n".join([lines[0], lines[1].replace("item-1", "item-9"), lines[2], ""]))
    assert longspan("rescore", str(run)) == 1
    assert "records.jsonl:2 was altered" in capsys.readouterr().err


def test_a_variant_is_an_arm_of_its_own(tmp_path: Path, asked: Callable[..., dict[str, Any]]) -> None:
    write(tmp_path / "model.jsonl", [row(n, "A", said("A" if n < 20 else "B")) for n in range(40)])
    write(tmp_path / "model_cot.jsonl", [row(n, "A", said("A" if n < 30 else "B")) for n in range(40)])
    files = [str(tmp_path / name) for name in ("model.jsonl", "model_cot.jsonl")]
    asked("import", *files, "--format", "longbench", "--to", str(tmp_path / "run"))
    (pair,) = asked("compare", str(tmp_path / "run"), "--metric", "accuracy")["comparisons"]
    assert {pair["a"], pair["b"]} == {"model", "model (cot)"}
    assert (pair["items"], abs(pair["only_a"] - pair["only_b"])) == (40, 10)
    assert len(asked("rescore", str(tmp_path / "run"))["results"]) == 2


def test_one_question_at_two_lengths_is_no_duplicate(tmp_path: Path, asked: Callable[..., dict[str, Any]]) -> None:
    def answer(length: int) -> Record:
        content = {"id": "7_A1", "document": "7", "gold": "A1", "candidates": 3, "length": length, "response": "A1"}
        return Record.make(
            probe="ada_leval", protocol={"kind": "ada_leval", "task": "best_answer"}, item=f"7_A1@{length}",
            subject="m", seed=0, fingerprint="f", answer={**content, "right": 0},
        )  # fmt: skip

    with RecordStore(tmp_path / "records.jsonl") as store:
        store.append([answer(1000), answer(2000)])
    found = asked("rescore", str(tmp_path), "--duplicates", "drop", "--scorer", "strict")
    assert found["records"] == 2
    measured = [each for each in found["results"][0]["measurements"] if each["metric"] == "accuracy"]
    assert [(each["x"], each["value"]) for each in measured] == [(1000.0, 1.0), (2000.0, 1.0)]
