"""A study of two parts: the same patterns, on text and on a task, in one report."""

from __future__ import annotations

from pathlib import Path

import pytest

from longspan.engines.run_index import find_run
from longspan.foundation.errors import UserError
from longspan.report.arms import arrange
from longspan.report.content import lay_out
from longspan.report.data import load
from longspan.report.tables import summary_rows
from longspan.study.expand import expand
from longspan.study.run import run_study
from longspan.study.schema import load_study
from longspan.terminal import Terminal

STUDY = """
question: Who predicts, and who looks up?
corpus: {source: synthetic, max_documents: 60, splits: {train: 0.6, validation: 0.2, test: 0.2}, dedup: null}
tokenizer: {kind: byte_bpe, vocab_size: 300}
model: {width: 16, heads: 2, state: 4, mamba_head_dim: 8, mlp_width: 16, match: {non_embedding_parameters: AM}}
training: {context: 32, batch_tokens: 128, steps: 4, peak_lr: 1.0e-3, warmup: 1}
vary: {pattern: [AM, MM], seed: [0]}
probes:
  - perplexity: {max_documents: 8}
also:
  recall:
    corpus: {source: task, task: mqar, vocab_size: 18, length: 16, pairs: [1, 2]}
    tokenizer: null
    packing: {method: one_per_row}
    training: {context: 16, steps: 3}
    probes:
      - recall: {kind: mqar, strings: 6}
"""


@pytest.fixture
def study(tmp_path: Path) -> str:
    path = tmp_path / "parts.yaml"
    path.write_text(STUDY)
    return str(path)


def test_a_part_is_the_same_patterns_on_something_else(study: str) -> None:
    subjects = expand(load_study(study)).subjects
    assert [subject.label for subject in subjects] == ["AM", "MM", "recall · AM", "recall · MM"]
    assert [subject.factors["part"] for subject in subjects] == ["text", "text", "recall", "recall"]
    assert [subject.config.model.pattern for subject in subjects] == ["AM", "MM", "AM", "MM"]
    assert [subject.config.training.num_steps for subject in subjects] == [4, 4, 3, 3]
    assert [list(subject.config.probes) for subject in subjects] == [["perplexity"]] * 2 + [["recall"]] * 2


def test_what_a_part_sets_is_its_own_and_the_rest_is_the_studys(study: str) -> None:
    overrides = ["corpus.source=text", "corpus.path=texts", "steps=9", "width=32", "pattern=MM", "seed=[1, 2]"]
    subjects = expand(load_study(study, overrides)).subjects
    assert [(subject.label, subject.seed) for subject in subjects] == [
        ("MM", 1), ("MM", 2), ("recall · MM", 1), ("recall · MM", 2)
    ]  # fmt: skip
    assert [subject.config.training.num_steps for subject in subjects] == [9, 9, 3, 3]
    assert {subject.config.model.width for subject in subjects} == {32}
    assert subjects[-1].config.corpus.task.task == "mqar"


def test_parts_are_left_out_or_changed_by_name(study: str) -> None:
    alone = expand(load_study(study, ["also=null"])).subjects
    assert [(subject.label, subject.factors) for subject in alone] == [
        ("AM", {"pattern": "AM"}),
        ("MM", {"pattern": "MM"}),
    ]
    changed = expand(load_study(study, ["also.recall.training.steps=7"])).subjects
    assert [subject.config.training.num_steps for subject in changed] == [4, 4, 7, 7]
    with pytest.raises(UserError, match="traning"):
        expand(load_study(study, ["also.recall.traning.steps=7"]))


def test_both_parts_end_in_one_report(study: str, tmp_path: Path, no_page: None) -> None:
    outcome = run_study(study, [], tmp_path / "runs", until="report", terminal=Terminal(quiet=True))
    folder = Path(outcome.data["report"]).parent
    facts = load(folder / "report.json")
    by_kind = {section.kind: {m.subject for m in section.summary.measurements} for section in facts.probes}
    assert by_kind == {"perplexity": {"AM", "MM"}, "recall": {"recall · AM", "recall · MM"}}
    # One colour a pattern, whatever it was trained on.
    arms = arrange(facts)
    assert arms["AM"].variable == arms["recall · AM"].variable != arms["MM"].variable
    assert {arm.panel for arm in arms.arms.values()} == {"text", "recall"}
    assert [part.section.kind for part in lay_out(facts).quality] == ["perplexity", "recall"]
    table = summary_rows(facts)
    columns = [name.removeprefix("<") for name in table.columns]
    bits, accuracy = columns.index("Bits per byte"), columns.index("Accuracy, all cells")
    for row in table.rows:
        assert (row[bits] == "–") == row[0].startswith("recall")
        assert (row[accuracy] == "–") != row[0].startswith("recall")
    first, second = find_run(folder, {"pattern": "AM"}), find_run(folder, {"pattern": "AM", "part": "recall"})
    assert first != second
    assert find_run(folder, {"pattern": "AM", "part": "text"}) == first


def test_the_first_report_a_newcomer_sees_has_a_recall_task() -> None:
    subjects = expand(load_study("quickstart")).subjects
    assert {subject.config.model.pattern for subject in subjects if subject.factors["part"] == "recall"} == {
        "AAAA",
        "MMMM",
        "AMAM",
    }
