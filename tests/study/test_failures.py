"""A subject that diverges: the others go on, the report names it, and it does not fail twice."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from longspan.foundation.errors import LongspanError, MachineError, SubjectError
from longspan.report.data import load
from longspan.study.failures import standing
from longspan.study.jobs import Job
from longspan.study.run import report_only, run_study
from longspan.study.stages import STAGES
from longspan.terminal import Terminal

STUDY = """
question: Who copies?
corpus: {source: task, task: copy, vocab_size: 3, min_length: 1, max_length: 3}
packing: {isolation: none}
model: {pattern: AA, width: 16, heads: 2, mlp_width: 16}
training: {context: 24, batch_tokens: 192, steps: 8, clip: null, warmup: 2, evaluate_every: 4}
vary:
  training.peak_lr: [1.0e+30, 6.0e-3]
primary: copying.overall
probes:
  - copying: {kind: task, sizes: [1, 3], strings: 8}
"""
FAILED = "train 1e+30 seed 0"


@pytest.fixture
def study(tmp_path: Path, no_page: None) -> str:
    path = tmp_path / "diverges.yaml"
    path.write_text(STUDY)
    return str(path)


class Heard(Terminal):
    """Keeps the lines."""

    def __init__(self) -> None:
        super().__init__(quiet=True)
        self.lines: list[str] = []

    def line(self, text: str) -> None:
        self.lines.append(text)


@pytest.mark.parametrize("side_by_side", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_the_others_go_on_and_the_report_names_the_one_that_failed(
    side_by_side: int, study: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("longspan.study.run.devices", lambda side_by_side=1: ["cpu"] * side_by_side)
    outcome = run_study(study, [], tmp_path, until="report", terminal=Heard(), side_by_side=side_by_side)
    assert outcome.error is not None
    assert outcome.error.exit_code == 1
    assert f"{FAILED}: training stopped at step" in str(outcome.error)
    assert list(outcome.data["failed"]) == [FAILED]
    facts = load(Path(outcome.data["report"]).with_name("report.json"))
    assert [subject.label for subject in facts.subjects] == ["0.006"]
    assert [section.kind for section in facts.probes] == ["copying"]
    assert facts.notes[0].startswith(f"Failed, so not in this report: {FAILED} (training stopped")
    assert [entry.level for entry in facts.ledger if FAILED in entry.text] == ["warning"]
    again = report_only(study, [], tmp_path)
    assert again.error is None
    assert not any("Unfinished" in note for note in load(Path(again.data["report"]).with_name("report.json")).notes)


def test_it_is_tried_again_where_something_else_may_come_of_it(
    study: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = []

    def diverge(job: Job, *arguments: object) -> None:
        tried.append(job.title)
        raise SubjectError("diverged")

    monkeypatch.setitem(STAGES, "train", diverge)
    for _ in range(2):
        with pytest.raises(LongspanError, match=r"2 of the study's jobs failed[^$]*failed\.json"):
            run_study(study, [], tmp_path, until="report", terminal=Heard())
    assert tried == [FAILED, "train 0.006 seed 0"]
    monkeypatch.setattr("longspan.study.failures.versions", lambda: {"longspan": "another"})
    assert run_study(study, [], tmp_path, until="train", terminal=Heard()).error is not None
    assert len(tried) == 4


def test_what_concerns_everything_still_stops_at_once(
    study: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = []

    def no_room(job: Job, *arguments: object) -> None:
        tried.append(job.title)
        raise MachineError("no space left", "a disk with room", "free some")

    monkeypatch.setitem(STAGES, "train", no_room)
    with pytest.raises(MachineError, match="no space left"):
        run_study(study, [], tmp_path, until="report", terminal=Heard())
    assert tried == [FAILED]


def test_the_command_ends_in_the_message_and_its_code(
    run_longspan: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    (tmp_path / "diverges.yaml").write_text(STUDY)
    result = run_longspan(tmp_path, "train", "diverges.yaml", "--json", check=False)
    assert result.returncode == 1
    assert [job["job"] for job in json.loads(result.stdout)["jobs"]] == ["prepare corpus", "train 0.006 seed 0"]
    assert f"error: 1 of the study's jobs failed; all that does not need them is done\n  {FAILED}:" in result.stderr


def test_jobs_that_need_a_failed_one_are_left_out() -> None:
    train = Job("train", "train AA", {})
    probe = Job("probe", "copying AA", {}, needs=(train.key,))
    other = Job("train", "train MM", {"pattern": "MM"})
    assert standing([train, probe, other], [train.key]) == [other]
