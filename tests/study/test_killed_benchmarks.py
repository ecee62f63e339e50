"""A run over benchmark fixtures that is killed at random moments ends with the records of one that was left alone."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "docs" / "examples" / "benchmarks"
KILLS = 20
STUDY = f"""
question: Does a killed run end like one that was left alone?
primary: pg19.bits_per_byte
corpus:
  {{source: synthetic, num_documents: 30, min_words: 80, max_words: 200,
    splits: {{train: 0.5, validation: 0.2, test: 0.3}}}}
tokenizer: {{kind: byte_bpe, vocab_size: 300}}
model: {{width: 16, heads: 2, state: 4, mamba_head_dim: 8, mlp_width: 16}}
training:
  {{context: 32, batch_tokens: 1024, tokens: 2048, peak_lr: 1.0e-3, warmup: 1, evaluate_every: 100, dtype: fp32}}
vary: {{pattern: [AM]}}
probes:
  - longbench_v2: {{data: {EXAMPLES / "longbench.jsonl"}, contexts: [700, 1400], max_new_tokens: 4, max_items: 6}}
  - ada_leval: {{files: {{1000: {EXAMPLES / "stackselect_1k.json"}}}, max_new_tokens: 4}}
  - tsort: {{kind: ada_leval, task: tsort, files: {{1000: {EXAMPLES / "textsort_1k.json"}}}, max_new_tokens: 4}}
  - pg19: {{data: {EXAMPLES / "books.jsonl"}, windows: [64], max_tokens: 600}}
  - ruler: {{tasks: [niah_single_1, vt], lengths: [900, 1300], samples: 3}}
"""


def command(study: Path, runs: Path) -> list[str]:
    # Small batches, so that there is something to lose.
    code = (
        "from longspan.probes import base\n"
        "from longspan.probes.longbench_v2 import LongBenchV2\n"
        "from longspan.probes.ada_leval import AdaLEval\n"
        "from longspan.probes.ruler import Ruler\n"
        "for each in (LongBenchV2, AdaLEval, Ruler): each.batch_tokens = 1\n"
        "from longspan.cli import main\n"
        "main()"
    )
    return [sys.executable, "-c", code, "probe", str(study), "--runs", str(runs)]


def records(runs: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for file in runs.glob("jobs/probe-*/records.jsonl"):
        for line in file.read_text(encoding="utf-8").splitlines():
            record = json.loads(line)
            assert record["key"] not in found, "a record twice"
            found[record["key"]] = {name: value for name, value in record.items() if name != "seconds"}
    return found


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_killed_at_twenty_moments_it_loses_and_repeats_nothing(tmp_path: Path) -> None:
    study, whole, broken = tmp_path / "killed.yaml", tmp_path / "whole", tmp_path / "broken"
    study.write_text(STUDY, encoding="utf-8")
    environment = {**os.environ, "LONGSPAN_NO_REEXEC": "1", "OMP_NUM_THREADS": "1"}
    began = time.monotonic()
    result = subprocess.run(command(study, whole), env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    lasts = time.monotonic() - began
    expected = records(whole)
    assert len(expected) == 12 + 8 + 8 + 3 + 12
    shutil.copytree(whole, broken, ignore=lambda folder, names: [name for name in names if name.startswith("probe-")])
    draw = random.Random(0)
    kept = []
    for _ in range(KILLS):
        process = subprocess.Popen(
            command(study, broken), env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        try:
            process.wait(draw.uniform(0.2, 0.7) * lasts)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
        kept.append(len(records_so_far(broken)))
        if kept[-1] == len(expected):
            # Done before its time: from the beginning again, so that every kill strikes a run under way.
            for job in broken.glob("jobs/probe-*"):
                shutil.rmtree(job)
    result = subprocess.run(command(study, broken), env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert any(0 < count < len(expected) for count in kept), "no kill struck while records were written"
    assert records(broken) == expected


def records_so_far(runs: Path) -> list[str]:
    """Whole lines of all records; a killed process may leave a torn one."""
    files = runs.glob("jobs/probe-*/records.jsonl")
    return [line for file in files for line in file.read_text(encoding="utf-8").splitlines() if line.endswith("}")]
