"""Claims about vLLM: it is started out of its own environment, watched, asked, and gone afterwards whatever happens."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from longspan.corpus.tokenizer import Tokenizer
from longspan.engines.base import Sampling
from longspan.engines.opening import open_engine
from longspan.engines.oracle import check_equivalence
from longspan.engines.source import ModelSource
from longspan.engines.transformers import TransformersEngine
from longspan.engines.vllm import VllmEngine, read_metrics
from longspan.foundation.errors import MachineError, UserError
from longspan.foundation.progress import Progress, silent
from longspan.models.interchange import write_folder
from longspan.models.language_model import LanguageModel

pytest.importorskip("httpx2")
pytest.importorskip("transformers")
STUB = Path(__file__).with_name("stub_server.py")
METRICS = """# HELP vllm:kv_cache_usage_perc KV-cache usage. 1 means 100 percent usage.
# TYPE vllm:kv_cache_usage_perc gauge
vllm:kv_cache_usage_perc{engine="0",model_name="m"} 0.25
vllm:prefix_cache_queries_total{engine="0",model_name="m"} 300.0
vllm:prefix_cache_hits_total{engine="0",model_name="m"} 1.2e+02
vllm:cache_config_info{block_size="16",engine="0",num_gpu_blocks="2048",num_cpu_blocks="None"} 1.0
"""
SERVES = """
import os, runpy, subprocess, sys, time
stub = runpy.run_path(os.environ["STUB"])
print("loading weights", flush=True)
if "--fail" in sys.argv:
    sys.exit("no such architecture")
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
port = int(sys.argv[sys.argv.index("--port") + 1])
open(os.environ["SAID"], "w").write(repr([os.getpid(), child.pid, sys.argv[1:]]))
if "--hang" in sys.argv:
    time.sleep(600)
with stub["serving"](port) as served:
    served.model = sys.argv[sys.argv.index("--served-model-name") + 1]
    served.metrics = os.environ["METRICS"]
    time.sleep(600)
"""


@pytest.fixture(scope="module")
def exported(
    tokenizer: Tokenizer, tiny_model: Callable[..., LanguageModel], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    folder = tmp_path_factory.mktemp("exported") / "tiny"
    model = tiny_model("AMA", mlp="swiglu")
    write_folder(model, folder, tokenizer=tokenizer, markers=True, context=256)
    return folder


@pytest.fixture
def environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that looks like a virtual environment with a vLLM in it, which is a stub."""
    folder = tmp_path / "env"
    (folder / "bin").mkdir(parents=True)
    (folder / "bin" / "python").write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    (folder / "bin" / "vllm").write_text(f"#!{sys.executable}\n{SERVES}")
    for name in ("python", "vllm"):
        (folder / "bin" / name).chmod(0o755)
    monkeypatch.setenv("STUB", str(STUB))
    monkeypatch.setenv("SAID", str(tmp_path / "said"))
    monkeypatch.setenv("METRICS", METRICS)
    return folder


def source(exported: Path, environment: Path, **serve: object) -> ModelSource:
    arguments = {"python": str(environment), "serve": serve, "start_timeout": 60.0, "retries": 0}
    return ModelSource.parse(
        {"pretrained": str(exported), "engine": "vllm", "template": "raw", "arguments": arguments}, ""
    )


def said(tmp_path: Path) -> tuple[int, int, list[str]]:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if (tmp_path / "said").is_file() and (text := (tmp_path / "said").read_text()):
            return eval(text)  # type: ignore[no-any-return]
        time.sleep(0.02)
    raise AssertionError("the server never started")


def gone(*processes: int) -> bool:
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        if not any(alive(process) for process in processes):
            return True
        time.sleep(0.02)
    return False


def alive(process: int) -> bool:
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state not in ("Z", "X")


def test_it_is_started_asked_and_stopped(exported: Path, environment: Path, tmp_path: Path) -> None:
    seen: list[Progress] = []
    engine = open_engine(
        source(exported, environment, **{"max-num-seqs": 4, "enforce-eager": True}), "cpu", seen.append
    )
    assert isinstance(engine, VllmEngine)
    server, child, words = said(tmp_path)
    assert words[:2] == ["serve", str(exported)]
    flags = " ".join(words[2:])
    for wanted in ("--dtype float32", "--max-model-len 256", "--max-num-seqs 4 --enforce-eager", "--host 127.0.0.1"):
        assert wanted in flags
    assert seen[0].stage == "start vllm"
    (written,) = engine.generate([np.array([3, 4, 5])], Sampling(max_new_tokens=3))
    assert written.tokens.tolist() == [0, 1, 2]
    assert engine.state_bytes(100) == engine.state_bytes(0) + 100 * 2 * 2 * 16 * 4
    assert engine.metrics() == {
        "cache_share_in_use": 0.25,
        "prefix_tokens_asked": 300.0,
        "prefix_tokens_found": 120.0,
        "cache_blocks": 2048.0,
        "cache_block_tokens": 16.0,
    }
    engine.close()
    assert gone(server, child)


def test_a_server_that_cannot_start_is_told_with_its_last_words(exported: Path, environment: Path) -> None:
    with pytest.raises(MachineError, match="no such architecture"):
        open_engine(source(exported, environment, fail=True), "cpu")


def test_one_that_never_answers_is_stopped(exported: Path, environment: Path, tmp_path: Path) -> None:
    hanging = source(exported, environment, hang=True)
    slow = hanging.model_copy(update={"arguments": {**hanging.arguments, "start_timeout": 2.0}})
    with pytest.raises(MachineError, match="did not answer in 2 s"):
        open_engine(slow, "cpu")
    assert gone(*said(tmp_path)[:2])


def test_ctrl_c_while_it_starts_leaves_nothing_behind(exported: Path, environment: Path, tmp_path: Path) -> None:
    def interrupt(progress: Progress) -> None:
        if (tmp_path / "said").is_file():
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        open_engine(source(exported, environment, hang=True), "cpu", interrupt)
    assert gone(*said(tmp_path)[:2])


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends a child with its parent")
def test_a_parent_that_is_killed_takes_the_server_with_it(tmp_path: Path) -> None:
    # The server alone: what it started hears of its end through the closing of what they share.
    code = (
        "from pathlib import Path; import sys, time; from longspan.engines.vllm import Child\n"
        "child = Child([sys.executable, '-c', 'import time; time.sleep(600)'], {}, Path(sys.argv[1]))\n"
        "print(child._process.pid, flush=True); time.sleep(600)\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "log")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        server = int(parent.stdout.readline())
        assert alive(server)
        os.kill(parent.pid, signal.SIGKILL)
        parent.wait()
    assert gone(server)


def test_an_environment_must_be_named(exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LONGSPAN_VLLM", raising=False)
    with pytest.raises(UserError, match="no environment with vLLM is named"):
        open_engine(ModelSource.parse({"pretrained": str(exported), "engine": "vllm"}, ""), "cpu")
    monkeypatch.setenv("LONGSPAN_VLLM", str(tmp_path))
    with pytest.raises(UserError, match="holds no Python"):
        open_engine(ModelSource.parse({"pretrained": str(exported), "engine": "vllm"}, ""), "cpu")


def test_metrics_that_are_not_there_are_left_out() -> None:
    assert read_metrics("") == {}
    assert read_metrics(METRICS.replace("prefix_cache", "other")).keys() == {
        "cache_share_in_use",
        "cache_blocks",
        "cache_block_tokens",
    }


@pytest.mark.slow
@pytest.mark.skipif(
    not os.environ.get("LONGSPAN_VLLM"), reason="no vLLM here: LONGSPAN_VLLM names the environment that has one"
)
def test_a_real_vllm_says_what_transformers_says(
    tokenizer: Tokenizer, tiny_model: Callable[..., LanguageModel], tmp_path: Path
) -> None:
    # Its attention on a CPU takes heads of 32 and more.
    model = tiny_model("AMA", mlp="swiglu", width=128, heads=4, mamba_head_dim=32, state=16)
    exported = tmp_path / "exported"
    write_folder(model, exported, tokenizer=tokenizer, markers=True, context=256)
    arguments = {
        "serve": {"enforce-eager": True, "max-model-len": 128, "max-num-seqs": 4},
        "environment": {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"},
        "start_timeout": 600.0,
    }
    served = ModelSource.parse({"pretrained": str(exported), "engine": "vllm", "arguments": arguments}, "")
    here = open_engine(ModelSource.parse({"pretrained": str(exported), "engine": "transformers"}, ""), "cpu")
    assert isinstance(here, TransformersEngine)
    tokens = np.random.default_rng(0).integers(0, here.tokenizer.vocab_size - 2, 60)
    with open_engine(served, "cpu", silent) as there:
        assert {"nll", "score", "generate"} <= there.capabilities
        assert there.nll([tokens])[0] == pytest.approx(here.nll([tokens])[0], abs=1e-4)
        sampling = Sampling(max_new_tokens=8, stop_at_boundary=False)
        ours, theirs = (engine.generate([tokens], sampling)[0] for engine in (here, there))
        assert theirs.tokens.tolist() == ours.tokens.tolist()
        assert not theirs.tokens_from_text
        assert {check.verdict for check in check_equivalence(there, tokens)} <= {"equal", "not used"}
