"""Two GPUs that replay CUDA graphs, and what one GPU trains without any."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import longspan
from longspan.training.metrics import read_metrics

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
]
RUNS = [
    "fsdp",
    "fsdp, accumulating",
    "fsdp, gathered twice",
    "fsdp, gathered twice, accumulating",
    "ddp, accumulating",
    "stopped, accumulating",
]


TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
SCRIPT = str(Path(__file__).with_name("several_gpus.py"))
SOURCES = [str(Path(longspan.__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join(SOURCES)}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gpus")
    words = [*TORCHRUN, SCRIPT, str(folder)]
    done = subprocess.run(words, env=ENVIRONMENT, capture_output=True, text=True, timeout=300, check=False)
    print(done.stdout)
    assert done.returncode == 0, done.stderr
    return folder


def curve(folder: Path, kind: str) -> list[float]:
    return [line["loss"] for line in read_metrics(folder / "metrics.jsonl", kind)]


@pytest.mark.parametrize("name", RUNS)
def test_two_gpus_that_replay_graphs_train_as_one_that_does_not(trained: Path, name: str) -> None:
    alone = "alone, accumulating" if name.endswith("accumulating") else "alone"
    for kind in ("train", "validation"):
        wanted, found = (curve(trained / which, kind) for which in (alone, name))
        print(f"{name}, {kind}: apart by at most {max(abs(a - b) for a, b in zip(wanted, found, strict=True)):.3g}")
        # The gradients of queries are added in any order.
        assert found == pytest.approx(wanted, rel=1e-4)


def test_a_process_whose_graphs_wait_for_a_lost_one_ends_with_an_error_that_says_so(tmp_path: Path) -> None:
    done = subprocess.run(
        [*TORCHRUN, SCRIPT, str(tmp_path), "lost"],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode != 0
    assert "process 0 of 2 lost the others" in done.stderr, done.stderr
