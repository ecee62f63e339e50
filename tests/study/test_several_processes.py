"""One training job in several processes: asked for by a setting or started by torchrun, and what ends it early."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from longspan.foundation.errors import MachineError, UserError
from longspan.study.executors import processes
from longspan.study.executors.local import LocalExecutor
from longspan.study.jobs import Job
from longspan.study.plan import make_plan
from longspan.study.run_folder import study_folder
from longspan.study.schema import load_study

STUDY = """
question: Does this train with any number of processes?
corpus: {source: synthetic, max_documents: 120, splits: {train: 0.6, validation: 0.2, test: 0.2}, dedup: null}
tokenizer: {kind: byte_bpe, vocab_size: 320}
model: {pattern: AM, width: 32, heads: 2, state: 8, mamba_head_dim: 16, mlp_width: 48}
training:
  {context: 64, batch_tokens: 256, steps: 12, peak_lr: 3.0e-3, warmup: 3, evaluate_every: 5, checkpoint_every: 2,
   log_every: 1}
probes: [perplexity]
"""

ONE_IS_KILLED = """
import multiprocessing, os, signal
if multiprocessing.current_process().name == "rank 1":
    os.kill(os.getpid(), signal.SIGKILL)
"""


def run(executor: LocalExecutor, job: Job, runs: Path) -> None:
    executor.run([job], runs, lambda job, progress: None, lambda job, result: None, lambda job, reason: None)


def test_a_killed_process_ends_the_others_and_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "GRACE_SECONDS", 0.5)
    plugin = tmp_path / "killed.py"
    plugin.write_text(ONE_IS_KILLED)
    job = Job("train", "train AM seed 0", {"seed": 0}, details={"plugins": [str(plugin)], "processes": 2})
    with pytest.raises(MachineError, match="train AM seed 0: most likely it was out of memory and killed"):
        run(LocalExecutor(["cpu"]), job, tmp_path / "runs")


def test_more_processes_than_gpus_are_refused_before_anything_runs(tmp_path: Path) -> None:
    job = Job("train", "train AM seed 0", {"seed": 0}, details={"processes": 3})
    with pytest.raises(UserError, match=r"training\.processes = 3") as refused:
        run(LocalExecutor(["cuda:0", "cuda:1"]), job, tmp_path)
    assert refused.value.allowed == "at most one for each GPU here, that is 2"


def test_the_number_of_processes_changes_neither_jobs_nor_the_folder_of_the_report(tmp_path: Path) -> None:
    (tmp_path / "mini.yaml").write_text(STUDY)
    one = load_study(str(tmp_path / "mini.yaml"))
    two = load_study(str(tmp_path / "mini.yaml"), ["processes=2", "training.parallel=fsdp"])
    assert study_folder(one, tmp_path) == study_folder(two, tmp_path)
    assert one.resolved() == two.resolved()
    jobs = [make_plan(study, tmp_path).subjects[0].train for study in (one, two)]
    assert jobs[0].key == jobs[1].key
    assert [job.details["processes"] for job in jobs] == [1, 2]


def test_a_way_of_sharing_for_one_process_is_refused(tmp_path: Path) -> None:
    job = Job("train", "train AM seed 0", {"seed": 0}, details={"processes": 1, "parallel": "fsdp"})
    with pytest.raises(UserError, match="parallel = fsdp with one process"):
        run(LocalExecutor(["cpu"]), job, tmp_path)


# --- whole commands ---------------------------------------------------------------------------------------------------

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "LONGSPAN_NO_REEXEC": "1"}
LONGSPAN = ("-m", "longspan")
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *LONGSPAN)


def command(folder: Path, launcher: tuple[str, ...], *arguments: str) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, *launcher, *arguments]
    return subprocess.run(words, cwd=folder, env=ENVIRONMENT, capture_output=True, text=True, timeout=200, check=False)


def trained(folder: Path) -> dict[str, Any]:
    """The result of the only training job under a folder's runs, and its losses."""
    (place,) = (folder / "runs" / "jobs").glob("train-*")
    lines = [json.loads(line) for line in (place / "training" / "metrics.jsonl").read_text().splitlines()]
    return {**json.loads((place / "done.json").read_text())["result"], "losses": [line["loss"] for line in lines]}


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("alone")
    (folder / "mini.yaml").write_text(STUDY)
    result = command(folder, LONGSPAN, "train", "mini.yaml")
    assert result.returncode == 0, result.stderr
    return trained(folder)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launcher", "arguments"),
    [(LONGSPAN, ("processes=2",)), (LONGSPAN, ("processes=2", "parallel=fsdp")), (TORCHRUN, ("parallel=fsdp",))],
)
def test_a_whole_study_runs_as_with_one_process(
    tmp_path: Path, alone: dict[str, Any], launcher: tuple[str, ...], arguments: tuple[str, ...]
) -> None:
    (tmp_path / "mini.yaml").write_text(STUDY)
    result = command(tmp_path, launcher, "run", "mini.yaml", *arguments)
    assert result.returncode == 0, result.stderr
    assert f"not compiled, 2 processes ({'fsdp' if 'parallel=fsdp' in arguments else 'ddp'})" in result.stderr
    found = trained(tmp_path)
    assert found["training"]["device"].startswith("2 × cpu")
    assert found["packing"] == alone["packing"]
    assert found["losses"] == pytest.approx(alone["losses"], rel=1e-4)
    assert (tmp_path / "runs" / "mini" / "report.html").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("launcher", [LONGSPAN, TORCHRUN])
def test_ctrl_c_keeps_a_checkpoint_that_one_process_goes_on_from(
    tmp_path: Path, alone: dict[str, Any], launcher: tuple[str, ...]
) -> None:
    (tmp_path / "mini.yaml").write_text(STUDY)
    arguments = ("processes=2",) if launcher == LONGSPAN else ()
    words = [sys.executable, *launcher, "train", "mini.yaml", *arguments]
    log = (tmp_path / "log").open("w")
    process = subprocess.Popen(words, cwd=tmp_path, env=ENVIRONMENT, stderr=log, start_new_session=True)
    while not list((tmp_path / "runs").glob("jobs/train-*/training/checkpoints/last")):
        assert process.poll() is None, (tmp_path / "log").read_text()
        time.sleep(0.02)
    # As a terminal does it: to the command and all that it started.
    os.killpg(process.pid, signal.SIGINT)
    code = process.wait(timeout=100)
    said = (tmp_path / "log").read_text()
    assert code in (0, 3) if launcher == LONGSPAN else code is not None, said
    assert "run the same command again" in said or code == 0
    result = command(tmp_path, LONGSPAN, "train", "mini.yaml")
    assert result.returncode == 0, result.stderr
    assert trained(tmp_path)["losses"] == pytest.approx(alone["losses"], rel=1e-4)


# --- several machines: an agent of torchrun on each -------------------------------------------------------------------


class Machine:
    """One of two machines: torchrun's agent and the one process that it starts."""

    def __init__(self, folder: Path, number: int, *meeting: str) -> None:
        words = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1", *meeting]
        self.log = folder / f"machine-{number}.log"
        self.process = subprocess.Popen(
            [*words, *LONGSPAN, "run", "mini.yaml", "parallel=fsdp"],
            cwd=folder,
            env=ENVIRONMENT,
            stdout=subprocess.DEVNULL,
            stderr=self.log.open("w"),
        )

    def end(self) -> tuple[int, str]:
        """Its exit code and what it said."""
        code = self.process.wait(timeout=150)
        return code, self.log.read_text()

    def lose_power(self) -> None:
        """Kills the agent before its process, so that nothing is told to the other machine."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        for pid in [self.process.pid, *map(int, children)]:
            os.kill(pid, signal.SIGKILL)
        self.process.wait()


def free_port() -> str:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return str(found.getsockname()[1])


@pytest.mark.slow
def test_two_machines_train_as_one_process(tmp_path: Path, alone: dict[str, Any]) -> None:
    (tmp_path / "mini.yaml").write_text(STUDY)
    port = free_port()
    machines = [
        Machine(tmp_path, node, "--node-rank", str(node), "--master-addr", "127.0.0.1", "--master-port", port)
        for node in range(2)
    ]
    (first, said), (second, others) = [machine.end() for machine in machines]
    assert (first, second) == (0, 0), said + others
    assert "not compiled, 2 processes (fsdp)" in said
    assert (tmp_path / "runs" / "mini" / "report.html").is_file()
    found = trained(tmp_path)
    assert found["packing"] == alone["packing"]
    assert found["losses"] == pytest.approx(alone["losses"], rel=1e-4)


@pytest.mark.slow
def test_a_lost_machine_ends_the_other_and_one_goes_on_from_the_checkpoint(
    tmp_path: Path, alone: dict[str, Any]
) -> None:
    (tmp_path / "mini.yaml").write_text(STUDY)
    meeting = ("--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{free_port()}")
    machines = [Machine(tmp_path, node, *meeting) for node in range(2)]
    while not list((tmp_path / "runs").glob("jobs/train-*/training/checkpoints/last")):
        assert machines[0].process.poll() is None, machines[0].log.read_text()
        time.sleep(0.02)
    machines[1].lose_power()
    code, said = machines[0].end()
    assert code != 0
    assert "of 2 lost the others" in said
    assert "run the same command again" in said
    result = command(tmp_path, LONGSPAN, "run", "mini.yaml")
    assert result.returncode == 0, result.stderr
    assert trained(tmp_path)["losses"] == pytest.approx(alone["losses"], rel=1e-4)
