"""A study on a task, from its file to its report, also while it is not finished."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from longspan.engines.loading import load as load_engine
from longspan.foundation.errors import Stopped, UserError
from longspan.foundation.progress import Progress
from longspan.records.store import RecordStore
from longspan.report.data import ReportInput, load
from longspan.study.budget_table import budget_table
from longspan.study.environment import devices
from longspan.study.expand import expand
from longspan.study.jobs import Job
from longspan.study.plan import make_plan
from longspan.study.predicted_time import ASSUMED_EFFICIENCY
from longspan.study.run import is_timed, report_only, run_study
from longspan.study.schema import load_study
from longspan.terminal import Terminal

STUDY = """
question: Who copies?
corpus: {source: task, task: copy, vocab_size: 3, min_length: 1, max_length: 3}
packing: {isolation: none}
model: {width: 16, heads: 2, state: 4, mamba_head_dim: 8, mlp_width: 16}
training: {context: 24, batch_tokens: 192, steps: 12, peak_lr: 6.0e-3, warmup: 2, evaluate_every: 4, mastery: 0.99}
vary:
  pattern: {attention: AA, Mamba-2: MM}
primary: copying.overall
probes:
  - copying: {kind: task, sizes: [1, 3, 6], strings: 16}
"""


@pytest.fixture
def study(tmp_path: Path, no_page: None) -> str:
    path = tmp_path / "task.yaml"
    path.write_text(STUDY)
    return str(path)


def facts_of(page: str) -> ReportInput:
    return load(Path(page).with_name("report.json"))


def test_a_study_on_a_task_ends_in_a_report(study: str, tmp_path: Path) -> None:
    outcome = run_study(study, [], tmp_path / "runs", until="report", terminal=Terminal(quiet=True))
    facts = facts_of(outcome.data["report"])
    for folder in (tmp_path / "runs/jobs").glob("train-*"):
        engine = load_engine(folder)
        assert engine.tokenizer.decode(sorted(engine.end_tokens)) == "."
    assert [subject.label for subject in facts.subjects] == ["attention", "Mamba-2"]
    assert [subject.factors for subject in facts.subjects] == [{"pattern": "attention"}, {"pattern": "Mamba-2"}]
    (section,) = facts.probes
    measured = {(m.metric, m.subject, m.x) for m in section.summary.measurements}
    for metric in ("string", "free_string", "token", "free_token"):
        assert {(metric, who, x) for who in ("attention", "Mamba-2") for x in (1.0, 3.0, 6.0)} <= measured
    assert {("reach", "attention", None), ("overall", "Mamba-2", None)} <= measured
    assert (section.mark, section.asked_context) == (3.0, 15)
    assert all(m.n == 16 for m in section.summary.measurements if m.metric == "string")
    assert [curve.mastery for curve in facts.training] == [0.99, 0.99]
    assert all(line["string_accuracy"] is not None for curve in facts.training for line in curve.validation)
    assert any("Strings of a task" in entry.text for entry in facts.ledger)
    assert facts.items[0].expected.endswith(".")
    # Sizes of strings are no contexts.
    assert facts.items[0].x is None


RECALL = """
question: Who recalls?
corpus: {source: task, task: mqar, vocab_size: 10, length: 16, pairs: [2, 4], border: 8, distinct: false}
packing: {method: one_per_row}
model: {pattern: M, width: 8, heads: 2, state: 4, mamba_head_dim: 8, mlp: none, state_bits: 2}
training: {context: 16, batch_tokens: 64, steps: 4, peak_lr: 6.0e-3, warmup: 2, evaluate_every: 4}
vary:
  pattern: {attention: A, Mamba-2: M}
primary: recall.overall
probes:
  - recall: {kind: mqar, strings: 8}
"""


@pytest.mark.usefixtures("no_page")
def test_a_state_of_few_bits_is_held_against_its_ceiling_in_the_report(tmp_path: Path) -> None:
    path = tmp_path / "recall.yaml"
    path.write_text(RECALL)
    outcome = run_study(str(path), [], tmp_path / "runs", until="report", terminal=Terminal(quiet=True))
    (section,) = facts_of(outcome.data["report"]).probes
    found = {(m.metric, m.subject, m.x): m for m in section.summary.measurements}
    # 16 x 4 numbers of two bits; keys and values of 8 positions.
    assert found["state_bits", "Mamba-2", None].value == 2 * 16 * 4
    assert found["state_bits", "attention", None].value == 2 * 2 * 8 * 8
    for n in (2, 4):
        load = float(f"{100 * n * math.log2(5) / 128:.3g}")
        assert found["ceiling", "Mamba-2", load].value == 1.0
        assert ("load", "Mamba-2", load) in found


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        (", border: 8", "", r"state_bits = 2 with the task mqar as it is set\n.*begin at the same place"),
        (
            RECALL[RECALL.index("corpus:") : RECALL.index("packing:")],
            "corpus: {source: task, task: copy}\n",
            "state_bits = 2 with the task copy as it is set",
        ),
        ("state_bits: 2", "state_bits: 2, handover: 6", "model.handover = 6 of rows whose questions begin at 8"),
        ("state_bits: 2", "state_bits: 0", "model.state_bits = 0"),
        ("method: one_per_row", "method: concat", "state_bits = 2 with packing.method = concat"),
        ("attention: A,", "convolution: C,", "state_bits = 2 with the pattern C"),
    ],
)
def test_a_state_that_cannot_be_handed_over_is_refused(old: str, new: str, words: str, tmp_path: Path) -> None:
    assert old in RECALL
    path = tmp_path / "recall.yaml"
    path.write_text(RECALL.replace(old, new))
    with pytest.raises(UserError, match=words):
        make_plan(load_study(str(path)), tmp_path / "runs")


@pytest.mark.parametrize("until", ["train", "probe"])
def test_what_is_finished_is_reported_and_what_is_missing_is_said(until: str, study: str, tmp_path: Path) -> None:
    runs = tmp_path / "runs"

    class Impatient(Terminal):
        """Stops the study in the middle of the second subject."""

        def observe(self, job: Job, progress: Progress) -> None:
            if job.kind == {"train": "train", "probe": "probe"}[until] and "Mamba-2" in job.title:
                raise Stopped("enough")

    with pytest.raises(Stopped):
        run_study(study, [], runs, until="report", terminal=Impatient(quiet=True))
    outcome = report_only(study, [], runs)
    facts = facts_of(outcome.data["report"])
    trained = ["attention"] if until == "train" else ["attention", "Mamba-2"]
    assert [subject.label for subject in facts.subjects] == trained
    (section,) = facts.probes
    assert {measured.subject for measured in section.summary.measurements} == {"attention"}
    missing = "train Mamba-2 seed 0" if until == "train" else "copying Mamba-2 seed 0"
    assert facts.notes[0].startswith("Unfinished: ")
    assert missing in facts.notes[0]
    assert outcome.lines[0] == facts.notes[0]
    run_study(study, [], runs, until="report", terminal=Terminal(quiet=True))
    whole = facts_of(report_only(study, [], runs).data["report"])
    assert len(whole.subjects) == 2
    assert not any(note.startswith("Unfinished") for note in whole.notes)


def test_a_subject_is_asked_before_the_next_is_trained_and_seconds_are_measured_alone(
    study: str, tmp_path: Path
) -> None:
    plan = make_plan(load_study(study, ["probes=[task, efficiency]", "primary=task.overall"]), tmp_path)
    jobs = plan.jobs_until("report")
    assert [job.kind for job in jobs] == ["prepare", *["train", "probe", "probe"] * 2]
    assert [job.specification["name"] for job in jobs if is_timed(job)] == ["efficiency"] * 2
    assert [job.kind for job in plan.jobs_until("train")] == ["prepare", "train", "train"]


def test_the_predicted_time_counts_validation(study: str, tmp_path: Path) -> None:
    plan = make_plan(load_study(study, ["pattern=Mamba-2"]), tmp_path)
    # 1,024 strings of 5, 7 or 9 positions, three times; 12 steps of 192 positions, each counted three times.
    assert plan.subjects[0].validation_share(tmp_path) == pytest.approx(3 * 1024 * 7 / (3 * 12 * 192))
    (note,) = [note for note in plan.notes if note.startswith("training")]
    assert note.startswith("training and validation need")
    assert note.endswith("; probes come on top")
    often = make_plan(load_study(study, ["pattern=Mamba-2", "evaluate_every=1"]), tmp_path)
    assert often.subjects[0].validation_share(tmp_path) == pytest.approx(12 * 1024 * 7 / (3 * 12 * 192))


def test_the_budget_counts_validation(study: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("longspan.study.budget_table.matmul_rate", lambda: 1e9)
    overrides = ["vary.evaluate_every=[12, 4, 1]", "pattern=Mamba-2"]
    rows = budget_table(load_study(study, overrides), tmp_path)
    share = 1024 * 7 / (3 * 12 * 192)
    (trained,) = {each.training_flops / (1e9 * ASSUMED_EFFICIENCY) for each in rows.subjects}
    assert [each.seconds / trained for each in rows.subjects] == pytest.approx([1 + n * share for n in (1, 3, 12)])
    assert rows.notes[-1].endswith("; validation is counted, probes come on top")


def test_more_jobs_at_a_time_than_cores_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    monkeypatch.setattr("longspan.study.environment.available_cores", lambda: 2)
    assert devices() == ["cpu"]
    assert devices(2) == ["cpu", "cpu"]
    with pytest.raises(UserError, match=r"--jobs 3\n.*at most one job a core \(2 here\)\n.*use --jobs 2"):
        devices(3)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    with pytest.raises(UserError, match=r"one job a GPU \(1 here\)"):
        devices(2)


@pytest.mark.slow
def test_two_jobs_at_a_time_answer_as_one_does(study: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("longspan.study.run.devices", lambda side_by_side=1: ["cpu"] * side_by_side)
    answers = []
    for side_by_side in (1, 2):
        runs = tmp_path / str(side_by_side)
        quiet = Terminal(quiet=True)
        run_study(study, ["seed=[0, 1]"], runs, until="report", terminal=quiet, side_by_side=side_by_side)
        answers.append(
            {
                path.parent.name: [record.answer for record in RecordStore(path)]
                for path in runs.glob("jobs/probe-*/records.jsonl")
            }
        )
    assert len(answers[0]) == 4
    assert answers[0] == answers[1]


def test_nothing_to_report_is_refused(study: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="a study with a subject that is trained"):
        report_only(study, [], tmp_path / "runs")


def test_named_levels_are_chosen_by_their_names(study: str) -> None:
    both = expand(load_study(study)).subjects
    assert [subject.config.model.pattern for subject in both] == ["AA", "MM"]
    (one,) = expand(load_study(study, ["pattern=Mamba-2"])).subjects
    assert (one.label, one.config.model.pattern) == ("Mamba-2", "MM")
    (listed,) = expand(load_study(study, ["pattern=[attention]"])).subjects
    assert (listed.label, listed.config.model.pattern) == ("attention", "AA")
    with pytest.raises(UserError, match="can mean two things"):
        load_study(study, ["pattern=[AM]"])
    (other,) = expand(load_study(study, ["pattern=AM"])).subjects
    assert (other.label, other.config.model.pattern) == ("AM", "AM")
    named = expand(load_study(study, ["vary.pattern={short: A, long: AAA}"])).subjects
    assert [(subject.label, subject.config.model.pattern) for subject in named] == [("short", "A"), ("long", "AAA")]
    mixed = expand(load_study(study, ["pattern=[Mamba-2, AM]"])).subjects
    assert [(subject.label, subject.config.model.pattern) for subject in mixed] == [("Mamba-2", "MM"), ("AM", "AM")]
    with pytest.raises(UserError, match="did you mean `Mamba-2`"):
        load_study(study, ["pattern=Mamba2"])


def test_a_size_without_a_string_is_refused_before_anything_is_prepared(study: str, tmp_path: Path) -> None:
    overrides = ["probes.copying.sizes=[0, 4]"]
    with pytest.raises(UserError, match=r"^probes.copying: sizes"):
        make_plan(load_study(study, overrides), tmp_path)
    with pytest.raises(UserError, match=r"^probes.copying: sizes"):
        budget_table(load_study(study, overrides), tmp_path)


def test_the_vocabulary_is_the_tasks(study: str, tmp_path: Path) -> None:
    plan = make_plan(load_study(study), tmp_path)
    assert {planned.vocab_size for planned in plan.subjects} == {7}
    wider = make_plan(load_study(study, ["corpus.vocab_size=5"]), tmp_path)
    assert {planned.vocab_size for planned in wider.subjects} == {9}
    assert wider.subjects[0].prepare.key != plan.subjects[0].prepare.key


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["context=8", "batch_tokens=64"], r"training.context = 8 for copy of length up to 3\n.*at least 9 positions"),
        (["tokenizer.vocab_size=300"], "a task brings its own"),
        (["corpus.max_length=0"], "max_length"),
        (["corpus.max_lenght=4"], "unknown key `corpus.max_lenght`(.|\n)*did you mean `max_length`"),
        (["corpus.task=copi"], "^corpus: no task is called 'copi'(.|\n)*did you mean `copy`"),
        (["corpus.min_length=4"], "no length lies between"),
        (["packing.method=best_fit"], "packing.method = best_fit"),
        (["corpus.task=duplicate_ngram", "corpus.min_length=4", "corpus.max_length=5"], "for asking only"),
        (["corpus.source=synthetic"], "no `tokenizer` section"),
        (["mastery=1.5"], "mastery"),
    ],
)
def test_what_cannot_be_trained_is_refused(overrides: list[str], words: str, study: str) -> None:
    with pytest.raises(UserError, match=words):
        expand(load_study(study, overrides))


def test_mastery_of_text_is_refused() -> None:
    with pytest.raises(UserError, match="mastery"):
        expand(load_study("quickstart", ["mastery=0.9"]))


def test_another_source_takes_the_settings_of_the_task_away(study: str) -> None:
    overrides = ["corpus.source=synthetic", "tokenizer.vocab_size=300", "mastery=null", "probes=[perplexity]"]
    (subject, *_) = expand(load_study(study, overrides)).subjects
    assert subject.config.corpus.source.source == "synthetic"
    back = load_study("quickstart", ["corpus.source=task", "corpus.task=copy", "tokenizer=null", "probes=[task]"])
    assert expand(back).subjects[0].config.corpus.task.task == "copy"
