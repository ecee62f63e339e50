"""A study from raw text to a report, as a user runs it: in processes, killed and started again."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

STUDY = """
question: Does attention or Mamba-2 learn this faster?
corpus: {source: synthetic, max_documents: 120, splits: {train: 0.6, validation: 0.2, test: 0.2}, dedup: null}
tokenizer: {kind: byte_bpe, vocab_size: 320}
model:
  {width: 32, heads: 2, state: 8, mamba_head_dim: 16, mlp_width: 48, match: {non_embedding_parameters: AM}}
training:
  context: 64
  batch_tokens: 256
  tokens: 5_120
  peak_lr: 3.0e-3
  warmup: 3
  evaluate_every: 10
  checkpoint_every: 4
  log_every: 5
vary: {pattern: [AM, MM]}
probes:
  - perplexity
  - position_curve
  - suffix_identification: {contexts: [16, 32], suffix: 4, num_items: 20}
"""


Run = Callable[..., subprocess.CompletedProcess[str]]


def results(folder: Path) -> dict[str, str]:
    """What must not depend on interruptions: weights, metrics without timings, answers."""
    found = {}
    for path in sorted((folder / "runs" / "jobs").rglob("*")):
        name = str(path.relative_to(folder))
        if path.name == "model.safetensors" or path.suffix == ".bin":
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
        elif path.name == "records.jsonl":
            rows = [json.loads(line) for line in path.read_text().splitlines()]
            found[name] = json.dumps(sorted((row["key"], json.dumps(row["answer"])) for row in rows))
        elif path.name == "metrics.jsonl":
            rows = [json.loads(line) for line in path.read_text().splitlines()]
            timed = {"seconds", "tokens_per_second"}
            found[name] = json.dumps([{k: v for k, v in row.items() if k not in timed} for row in rows])
    return found


@pytest.fixture(scope="module")
def finished(
    run_longspan: Run, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, subprocess.CompletedProcess[str]]:
    folder = tmp_path_factory.mktemp("study")
    (folder / "mini.yaml").write_text(STUDY)
    return folder, run_longspan(folder, "run", "mini.yaml")


def test_a_run_ends_with_a_table_an_answer_and_the_path_of_its_report(
    finished: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    folder, result = finished
    assert "runs/mini/report.html" in result.stdout
    assert "AM" in result.stdout
    assert "MM" in result.stdout
    assert "\x1b" not in result.stdout + result.stderr
    page = (folder / "runs/mini/report.html").read_text()
    assert "Does attention or Mamba-2 learn this faster?" in page
    assert (folder / "runs/mini/report.md").is_file()
    assert list((folder / "runs/mini/figures").glob("*.svg"))
    made_by = json.loads((folder / "runs/mini/report.json").read_text())["reproduce"]["hardware"]
    assert made_by["kernels"] in page
    assert made_by["kernels"].endswith("(auto)")


def test_the_plan_is_printed_before_anything_is_trained(
    finished: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    lines = finished[1].stderr.splitlines()
    assert any(re.fullmatch(r"note: training needs .*FLOP, about .*; validation and probes .* top", s) for s in lines)
    table = next(i for i, line in enumerate(lines) if "1 × attention, 1 × mamba2" in line)
    trained = next(i for i, line in enumerate(lines) if line.startswith("done: train"))
    assert table < trained


def test_running_again_does_nothing_and_gives_the_same(
    run_longspan: Run, finished: tuple[Path, subprocess.CompletedProcess[str]]
) -> None:
    folder, _ = finished
    before = results(folder)
    stamps = {path: path.stat().st_mtime_ns for path in (folder / "runs/jobs").rglob("done.json")}
    again = run_longspan(folder, "run", "mini.yaml", figures=False)
    assert "9 of 9 jobs were done before" in again.stderr
    assert {path: path.stat().st_mtime_ns for path in (folder / "runs/jobs").rglob("done.json")} == stamps
    assert results(folder) == before


def test_only_what_an_override_changes_runs_again(
    run_longspan: Run, finished: tuple[Path, subprocess.CompletedProcess[str]]
) -> None:
    folder, _ = finished
    changed = run_longspan(folder, "run", "mini.yaml", "probes.suffix_identification.num_items=10", figures=False)
    assert "7 of 9 jobs were done before" in changed.stderr


def test_report_alone_rebuilds_the_page(
    run_longspan: Run, finished: tuple[Path, subprocess.CompletedProcess[str]]
) -> None:
    folder, _ = finished
    page = folder / "runs/mini/report.html"
    page.unlink()
    outcome = json.loads(run_longspan(folder, "report", "mini.yaml", "--json", figures=False).stdout)
    assert page.is_file()
    assert outcome["report"].endswith("runs/mini/report.html")


def test_stages_stop_where_they_say(run_longspan: Run, tmp_path: Path) -> None:
    (tmp_path / "mini.yaml").write_text(STUDY)
    prepared = json.loads(run_longspan(tmp_path, "prepare", "mini.yaml", "--json").stdout)
    assert [job["kind"] for job in prepared["jobs"]] == ["prepare"]
    missing = run_longspan(tmp_path, "report", "mini.yaml", check=False)
    assert missing.returncode == 2
    assert "longspan run mini.yaml" in missing.stderr


def test_ctrl_c_stops_in_order_and_says_how_to_go_on(start_longspan: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "mini.yaml").write_text(STUDY.replace("tokens: 5_120", "tokens: 5_000_000"))
    process = start_longspan(tmp_path, "probe", "mini.yaml")
    wait_for(tmp_path, "metrics.jsonl", process)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=120)
    assert process.returncode == 3
    assert "run the same command again" in error


@pytest.mark.parametrize("pause", [0.0, 0.02, 0.2])
def test_ctrl_c_again_stops_too_and_never_looks_like_success(
    start_longspan: Callable[..., Any], tmp_path: Path, pause: float
) -> None:
    (tmp_path / "mini.yaml").write_text(STUDY.replace("tokens: 5_120", "tokens: 5_000_000"))
    process = start_longspan(tmp_path, "probe", "mini.yaml")
    wait_for(tmp_path, "metrics.jsonl", process)
    process.send_signal(signal.SIGINT)
    time.sleep(pause)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=120)
    assert process.returncode == 3
    assert "run the same command again" in error
    assert "Traceback" not in error


def test_killed_at_any_instant_and_run_again_gives_the_same_bytes(
    run_longspan: Run,
    start_longspan: Callable[..., Any],
    tmp_path: Path,
    finished: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    (tmp_path / "mini.yaml").write_text(STUDY)
    kills = 0
    # What to wait for before each kill: in the corpus, early and late in training, while asking.
    for sign, delay in (("ledger.json", 0.0), ("metrics.jsonl", 0.1), ("last", 0.3), ("records.jsonl", 0.0)):
        process = start_longspan(tmp_path, "probe", "mini.yaml")
        wait_for(tmp_path, sign, process)
        time.sleep(delay)
        process.kill()
        process.communicate()
        kills += process.returncode == -signal.SIGKILL
    run_longspan(tmp_path, "probe", "mini.yaml")
    assert kills >= 2
    found, expected = results(tmp_path), results(finished[0])
    assert len(list((tmp_path / "runs/jobs").glob("*/done.json"))) == 9
    assert found == {name: expected[name] for name in found}


def test_a_job_directory_of_another_configuration_is_refused(
    run_longspan: Run, tmp_path: Path, finished: tuple[Path, subprocess.CompletedProcess[str]]
) -> None:
    (tmp_path / "mini.yaml").write_text(STUDY)
    run_longspan(tmp_path, "prepare", "mini.yaml")
    (job,) = (tmp_path / "runs/jobs").glob("prepare-*")
    specification = json.loads((job / "job.json").read_text())
    (job / "job.json").write_text(json.dumps({**specification, "key": "0" * 64}))
    refused = run_longspan(tmp_path, "run", "mini.yaml", check=False)
    assert refused.returncode == 2
    assert "another configuration" in refused.stderr
    assert str(job.name) in refused.stderr


def wait_for(folder: Path, name: str, process: Any) -> None:
    """Until a file of that name appears under the runs, or the process ends."""
    deadline = time.monotonic() + 120
    while process.returncode is None and not appeared(folder / "runs", name):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_killed_between_the_result_and_the_marker_goes_on(run_longspan: Run, tmp_path: Path) -> None:
    (tmp_path / "mini.yaml").write_text(STUDY)
    run_longspan(tmp_path, "train", "mini.yaml", "pattern=AM", "tokens=512", "warmup=1")
    (marker,) = (tmp_path / "runs/jobs").glob("train-*/done.json")
    before = json.loads(marker.read_text())["result"]
    marker.unlink()
    run_longspan(tmp_path, "train", "mini.yaml", "pattern=AM", "tokens=512", "warmup=1")
    assert json.loads(marker.read_text())["result"] == before


def test_probes_of_other_weights_are_asked_again(run_longspan: Run, tmp_path: Path) -> None:
    (tmp_path / "mini.yaml").write_text(STUDY)
    command = ("probe", "mini.yaml", "pattern=AM", "tokens=512", "warmup=1", "probes=[perplexity]")
    run_longspan(tmp_path, *command)
    (marker,) = (tmp_path / "runs/jobs").glob("train-*/done.json")
    done = json.loads(marker.read_text())
    done["result"]["weights"]["best"] = "0" * 64
    marker.write_text(json.dumps(done))
    assert "asked again" in run_longspan(tmp_path, *command).stderr


def appeared(folder: Path, name: str) -> bool:
    try:
        return any(folder.rglob(name))
    except FileNotFoundError:
        # A folder went away while it was listed.
        return False


@pytest.fixture
def copied(tmp_path: Path, finished: tuple[Path, subprocess.CompletedProcess[str]]) -> Path:
    """A finished study to do damage to."""
    shutil.copytree(finished[0], tmp_path / "study")
    (tmp_path / "study" / "mini.yaml").write_text(STUDY)
    return tmp_path / "study"


def test_answers_that_were_lost_are_asked_again_and_never_left_out_silently(run_longspan: Run, copied: Path) -> None:
    expected = results(copied)
    path = next(p for p in (copied / "runs/jobs").rglob("records.jsonl") if '"probe":"perplexity"' in p.read_text())
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-2]))
    report = run_longspan(copied, "report", "mini.yaml", check=False)
    assert report.returncode == 2
    assert "1 of 9 jobs" in report.stderr
    again = run_longspan(copied, "probe", "mini.yaml")
    assert "has lost 2 answers: asked again" in again.stderr
    assert results(copied) == expected


def test_an_altered_test_split_is_named_before_anything_is_asked(run_longspan: Run, copied: Path) -> None:
    (prepare,) = (copied / "runs/jobs").glob("prepare-*")
    shard = next((prepare / "corpus/test").glob("*.tokens"))
    shard.write_bytes(b"xxxx" + shard.read_bytes()[4:])
    for marker in (copied / "runs/jobs").glob("probe-*/done.json"):
        marker.unlink()
    refused = run_longspan(copied, "probe", "mini.yaml", check=False)
    assert refused.returncode == 1
    assert f"{shard.name} was altered" in refused.stderr
    assert f"remove runs/jobs/{prepare.name} and" in refused.stderr
    shutil.rmtree(prepare)
    run_longspan(copied, "probe", "mini.yaml")


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("train", "training/checkpoints/best/model.safetensors"),
        ("train", "training/metrics.jsonl"),
        ("probe", "job.json"),
    ],
)
def test_a_file_that_is_gone_from_a_finished_job_says_what_to_remove_and_that_helps(
    run_longspan: Run, copied: Path, kind: str, name: str
) -> None:
    expected = results(copied)
    # Other tests add answers to other questions: their folders are not read here.
    asked = [p.parent for p in (copied / "runs/jobs").rglob("records.jsonl") if '"probe":"perplexity"' in p.read_text()]
    job = asked[0] if kind == "probe" else next((copied / "runs/jobs").glob(f"{kind}-*"))
    (job / name).unlink()
    if kind == "train":
        for marker in (copied / "runs/jobs").glob("probe-*/done.json"):
            marker.unlink()
    refused = run_longspan(copied, "run", "mini.yaml", check=False)
    assert refused.returncode == 1
    assert Path(name).name in refused.stderr
    assert f"remove runs/jobs/{job.name} and" in refused.stderr
    shutil.rmtree(job)
    run_longspan(copied, "probe", "mini.yaml")
    assert results(copied) == expected


def test_the_report_of_another_version_of_a_study_moves_aside(run_longspan: Run, copied: Path) -> None:
    page = (copied / "runs/mini/report.html").read_bytes()
    (copied / "mini.yaml").write_text(STUDY.replace("num_items: 20", "num_items: 12"))
    changed = run_longspan(copied, "run", "mini.yaml", figures=False)
    (aside,) = (copied / "runs").glob("mini-was-*")
    assert f"runs/{aside.name}" in changed.stderr
    assert (aside / "report.html").read_bytes() == page
    assert "num_items: 12" in (copied / "runs/mini/study.yaml").read_text()
    (copied / "mini.yaml").write_text(STUDY)
    back = run_longspan(copied, "run", "mini.yaml", figures=False)
    assert "mini-was-" in back.stderr
    assert len(list((copied / "runs").glob("mini-was-*"))) == 2


def test_a_corpus_without_validation_is_refused_before_training(run_longspan: Run, tmp_path: Path) -> None:
    (tmp_path / "mini.yaml").write_text(STUDY.replace("train: 0.6, validation: 0.2", "train: 0.8, validation: 0"))
    refused = run_longspan(tmp_path, "train", "mini.yaml", check=False)
    assert refused.returncode == 1
    assert "the corpus has no validation split" in refused.stderr


def test_a_test_split_that_cannot_serve_a_probe_is_refused_before_training(run_longspan: Run, tmp_path: Path) -> None:
    (tmp_path / "mini.yaml").write_text(STUDY)
    refused = run_longspan(tmp_path, "train", "mini.yaml", "probes.position_curve.min_documents=1000", check=False)
    assert refused.returncode == 2
    assert "error: probes.position_curve: " in refused.stderr
    assert "done: train" not in refused.stderr


def test_a_folder_that_cannot_be_written_is_no_defect(run_longspan: Run, tmp_path: Path) -> None:
    (tmp_path / "mini.yaml").write_text(STUDY)
    (tmp_path / "there").mkdir()
    (tmp_path / "there/jobs").write_text("a file where a folder belongs")
    for runs in ("mini.yaml/x", "/proc/longspan", "there"):
        refused = run_longspan(tmp_path, "prepare", "mini.yaml", "--runs", runs, check=False)
        assert refused.returncode in (1, 2)
        assert "defect" not in refused.stderr
        assert [line.split(":")[0] for line in refused.stderr.splitlines()[-3:]] == ["error", "  allowed", "  fix"]
