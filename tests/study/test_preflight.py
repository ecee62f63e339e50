"""What cannot be honoured on this machine is refused before anything of a study is done."""

from __future__ import annotations

import shutil
import sys
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest

from longspan.engines import graphs
from longspan.foundation.errors import LongspanError
from longspan.ops import kernels
from longspan.study import run

STUDY = """
question: Is it refused at once?
corpus: {source: synthetic, max_documents: 20}
tokenizer: {kind: byte_bpe, vocab_size: 300}
model: {width: 32, heads: 2, state: 4, mamba_head_dim: 8, mlp_width: 16}
training: {context: 32, batch_tokens: 1024, tokens: 4096, peak_lr: 4.0e-3}
vary: {pattern: [A, M]}
probes: [perplexity]
"""
Usage = namedtuple("Usage", "total used free")


class Begun(Exception):
    """The first job would have started."""


class Quiet:
    def __getattr__(self, name: str) -> Any:
        return lambda *arguments: None


class NoExecutor:
    def __init__(self, devices: Any) -> None:
        del devices

    def run(self, *arguments: Any) -> None:
        raise Begun


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Starts the study, which ends where the first job would begin."""
    monkeypatch.chdir(tmp_path)
    Path("texts").mkdir()
    Path("texts/one.txt").write_text("no list of rows", encoding="utf-8")
    Path("study.yaml").write_text(STUDY, encoding="utf-8")
    monkeypatch.setattr(run, "LocalExecutor", NoExecutor)

    def start(*overrides: str, until: run.Stage = "report", jobs: int = 1) -> None:
        run.run_study("study.yaml", overrides, Path("runs"), until=until, terminal=Quiet(), side_by_side=jobs)

    return start


def refused(start: Any, *overrides: str, **more: Any) -> str:
    """The message; nothing was written before it."""
    with pytest.raises(LongspanError) as caught:
        start(*overrides, **more)
    assert not Path("runs/study/study.yaml").exists()
    return str(caught.value)


def test_what_can_be_honoured_begins(start: Any) -> None:
    with pytest.raises(Begun):
        start("tracking.tensorboard=true")


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["training.graph=true"], "training.graph = true, but cpu has none"),
        (["training.parallel=fsdp"], "training.parallel = fsdp with one process"),
        (["probes=[{perplexity: {stride: 1000}}]"], "stride 1000 with windows of 32 tokens"),
        (["probes=[{needle: {ways: []}}]"], "probes.needle.ways = []"),
        (["probes=[{entity_recurrence: {kinds: []}}]"], "probes.entity_recurrence.kinds = []"),
        (["probes=[{phone_book: {entries: []}}]"], "probes.phone_book: entries = []"),
        (["probes=[{phone_book: {entries: [5]}}]"], "probes.phone_book: entries = [5]"),
        (["probes=[{text_copy: {lengths: []}}]"], "probes.text_copy: lengths = []"),
        (["probes=[{text_copy: {given: 500}}]"], "each longer than the 500 tokens"),
        (["probes=[{efficiency: {largest_batch: [0]}}]"], "probes.efficiency.largest_batch.0 = 0"),
        (["probes=[{longbench_v2: {data: texts/one.txt}}]"], "is not JSON"),
        (["probes=[{pg19: {data: texts/one.txt}}]"], "is not JSON"),
        (["probes=[ada_leval]"], "probes.ada_leval: no files"),
        (["probes=[{ada_leval: {files: {1000: texts/one.txt}}}]"], "is not JSON"),
        (["probes=[{ruler: {tasks: []}}]"], "probes.ruler.tasks = []"),
        (["probes=[{ruler: {tasks: [qa_1]}}]"], "probes.ruler: task qa_1 without `squad`"),
        (["probes=[{ruler: {squad: texts/one.txt}}]"], "is not JSON"),
        (["probes=[lm_eval]"], "probes.lm_eval: a study asks the probe `lm_eval`"),
        (["corpus.source=text", "corpus.path=[]"], "corpus.path = []"),
        (["corpus.source=text", "corpus.path=texts", "corpus.patterns=[]"], "corpus.patterns = []"),
        (["corpus.dedup.num_hashes=100000000"], "corpus.dedup.num_hashes = 100000000"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_a_setting_that_cannot_be_honoured_is_refused(start: Any, overrides: list[str], said: str) -> None:
    message = refused(start, *overrides)
    assert said in message
    assert "allowed: " in message
    assert "fix: " in message


@pytest.mark.parametrize(
    ("setting", "module", "extra"),
    [
        ("tracking.tensorboard=true", "tensorboard", "tensorboard"),
        ("tracking.wandb=offline", "wandb", "wandb"),
        ("tokenizer.kind=sentencepiece", "sentencepiece", "sentencepiece"),
    ],
)
def test_a_missing_package_is_refused(
    start: Any, monkeypatch: pytest.MonkeyPatch, setting: str, module: str, extra: str
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    assert f"pip install 'longspan[{extra}]'" in refused(start, setting)


def test_a_package_is_not_asked_for_where_no_stage_needs_it(start: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(Begun):
        start("tracking.wandb=offline", until="prepare")


@pytest.mark.parametrize(("choice", "said"), [("nonsense", "auto, triton, plain"), ("triton", "on a CPU")])
def test_kernels_that_cannot_be_are_refused(
    start: Any, monkeypatch: pytest.MonkeyPatch, choice: str, said: str
) -> None:
    monkeypatch.setattr(kernels._Setting, "choice", choice)
    monkeypatch.setattr(kernels._Setting, "interpreted", False)
    message = refused(start)
    assert f"LONGSPAN_KERNELS = '{choice}'" in message
    assert said in message


def test_a_wrong_setting_of_graphs_is_refused(start: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(graphs.VARIABLE, "yes")
    assert "LONGSPAN_GRAPHS = 'yes'" in refused(start)


def test_more_processes_than_gpus_are_refused(start: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "devices", lambda side_by_side: ["cuda:0"])
    monkeypatch.setattr(kernels, "wanted", lambda device: True)
    assert "at most one for each GPU here, that is 1" in refused(start, "training.processes=2")


def test_compiling_without_a_compiler_is_refused(start: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor import cpp_builder
    from torch._inductor.exc import InvalidCxxCompiler

    def none() -> str:
        raise InvalidCxxCompiler

    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", none)
    assert "training.compile = true without a C++ compiler" in refused(start, "training.compile=true")


def test_a_folder_of_runs_that_cannot_be_written_is_refused(start: Any) -> None:
    Path("runs").mkdir()
    Path("runs/jobs").write_text("a file", encoding="utf-8")
    assert "runs/jobs is a file" in refused(start)


def test_a_disk_too_small_for_the_checkpoints_is_refused(start: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**9, 0, 100_000))
    message = refused(start)
    assert "97.7 KiB free under runs; the checkpoints of 2 trainings take" in message
    with pytest.raises(Begun):
        start(until="prepare")


def test_more_jobs_than_cores_are_refused(start: Any) -> None:
    assert "--jobs 10000" in refused(start, jobs=10_000)
