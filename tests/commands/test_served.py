"""A model of Longspan's own, trained, exported, served by somebody else's server and asked LongBench-v2's questions.

    LONGSPAN_SERVE=env LONGSPAN_VLLM=env pytest -m slow tests/commands/test_served.py

Slow, and skipped where no environment has the server: `transformers serve` (with fastapi and uvicorn) or vLLM.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from longspan.engines.server import Server
from longspan.engines.source import EndpointArguments
from longspan.engines.vllm import Child, free_port
from longspan.probes.longbench_v2.scores import read_answer
from longspan.records.store import Record

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
pytest.importorskip("transformers")
pytest.importorskip("httpx2")
ITEMS = Path(__file__).parents[2] / "docs" / "examples" / "benchmarks" / "longbench.jsonl"
CORPUS = "corpus: {source: synthetic, max_documents: 300, splits: {train: 0.9, validation: 0.05, test: 0.05}}"
# vLLM's attention on a CPU takes heads of 32 and more.
TRAINED = f"""
question: What does it reach?
{CORPUS}
tokenizer: {{kind: byte_bpe, vocab_size: 400}}
model: {{width: 128, heads: 4, mamba_head_dim: 32, state: 16, mlp: swiglu, mlp_width: 192}}
training: {{context: 1024, batch_tokens: 2048, tokens: 65_536, peak_lr: 3.0e-3, warmup: 4, dtype: fp32}}
vary: {{pattern: [AMA]}}
probes: [perplexity: {{max_tokens: 256, max_documents: 2}}]
"""
ASKED = f"""
question: Does a server say what is said here?
{CORPUS}
subjects:
  - {{pretrained: EXPORTED, engine: transformers, template: raw, name: here}}
  - SERVED
probe_context: 1024
primary: longbench_v2.accuracy
probes:
  - longbench_v2: {{data: {ITEMS}, contexts: [600, 1000], max_new_tokens: 12, temperature: 0, re_ask: true}}
  - floor:
      {{kind: longbench_v2, variant: no_context, data: {ITEMS}, contexts: [1000], max_new_tokens: 12, temperature: 0}}
"""


def longspan(*words: str) -> str:
    """What a command prints, run as a person runs it."""
    result = subprocess.run([sys.executable, "-m", "longspan.cli", *words], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `longspan run` trains and `longspan export` writes."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "tiny.yaml").write_text(TRAINED)
    longspan("run", str(folder / "tiny.yaml"), "--runs", str(folder / "runs"))
    longspan("export", str(folder / "runs" / "tiny"), "pattern=AMA", "--to", str(folder / "exported"))
    return folder / "exported"


def serving() -> str:
    """The `transformers` that can serve, of this environment or of the one that LONGSPAN_SERVE names."""
    if named := os.environ.get("LONGSPAN_SERVE"):
        return str(Path(named) / "bin" / "transformers")
    if importlib.util.find_spec("fastapi") is None or importlib.util.find_spec("uvicorn") is None:
        pytest.skip("`transformers serve` needs fastapi and uvicorn; LONGSPAN_SERVE may name an environment with them")
    return str(Path(sys.executable).with_name("transformers"))


@pytest.fixture
def transformers_serve(exported: Path, tmp_path: Path) -> Iterator[dict[str, Any]]:
    """The entry under `subjects:` of a server that `transformers serve` is."""
    port = free_port()
    command = [serving(), "serve", str(exported), "--port", str(port), "--host", "127.0.0.1", "--dtype", "float32"]
    child = Child([*command, "--device", "cpu"], {"HF_HUB_OFFLINE": "1"}, tmp_path / "log")
    try:
        url = f"http://127.0.0.1:{port}"
        server, deadline = Server(url, EndpointArguments(timeout=30)), time.monotonic() + 240
        while not server.is_alive():
            assert child.ended is None, child.tail()
            assert time.monotonic() < deadline, child.tail()
            time.sleep(0.2)
        endpoint = {"base_url": url, "model": str(exported), "tokenizer": str(exported)}
        yield {"endpoint": endpoint, "template": "raw", "context_limit": 1024, "arguments": {"concurrency": 2}}
    finally:
        child.stop()


@pytest.fixture
def vllm(exported: Path) -> dict[str, Any]:
    """The entry of a vLLM that is started for the study."""
    if not os.environ.get("LONGSPAN_VLLM"):
        pytest.skip("no vLLM here: LONGSPAN_VLLM names the environment that has one")
    arguments = {
        # With it vLLM 0.32 fails on a CPU in the middle of asking a model with recurrent layers.
        "serve": {"enforce-eager": True, "max-num-seqs": 4, "enable-prefix-caching": False},
        "environment": {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"},
        "start_timeout": 900.0,
    }
    return {"pretrained": str(exported), "engine": "vllm", "template": "raw", "arguments": arguments}


def answers(runs: Path) -> dict[str, dict[tuple[str, str], dict[str, Any]]]:
    """subject → (probe, item) → what it answered."""
    found: dict[str, dict[tuple[str, str], dict[str, Any]]] = {}
    for file in runs.glob("jobs/probe-*/records.jsonl"):
        for line in file.read_text(encoding="utf-8").splitlines():
            record = Record.model_validate_json(line)
            found.setdefault(record.subject, {})[record.probe, record.item] = record.answer
    return found


def text(answer: dict[str, Any]) -> str:
    """A reply; bytes that are no character are the server's own matter."""
    return str(answer["response"]).replace("\ufffd", "")


@pytest.mark.parametrize("server", ["transformers_serve", "vllm"])
def test_what_was_trained_exported_and_served_answers_as_here(
    server: str, exported: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    entry = json.dumps({"name": "there", **request.getfixturevalue(server)})
    study, runs = tmp_path / "asked.yaml", tmp_path / "runs"
    study.write_text(ASKED.replace("EXPORTED", str(exported)).replace("SERVED", entry))
    longspan("run", str(study), "--runs", str(runs))
    found = answers(runs)
    here, there = found["here"], found["there"]
    assert here.keys() == there.keys()
    assert len(here) == 12 * 2 + 12
    asked_again = 0
    for key, ours in here.items():
        theirs = there[key]
        assert theirs.get("failure", "") == ""
        assert theirs["truncation"] == ours["truncation"]
        assert (text(theirs), theirs["finish_reason"]) == (text(ours), ours["finish_reason"])
        assert read_answer(theirs, "official") == read_answer(ours, "official")
        assert theirs["prompt_tokens"] == ours["prompt_tokens"]
        if "response" in ours.get("re_asked", {}):
            asked_again += 1
            assert theirs["re_asked"]["truncation"] == ours["re_asked"]["truncation"]
            assert text(theirs["re_asked"]) == text(ours["re_asked"])
        if server == "vllm":
            assert theirs["letters"] == pytest.approx(ours["letters"], abs=1e-3)
    # It is far too small to answer, so that every item is asked again.
    assert asked_again == 12 * 2
    kept = [answer["truncation"]["kept_fraction"] for (probe, _), answer in here.items() if probe == "longbench_v2"]
    assert min(kept) < 0.1 < max(kept)
    said = json.loads(longspan("rescore", str(runs / "asked"), "--scorer", "robust", "--json"))
    results = {(each["subject"], each["variant"], each["context"]): each for each in said["results"]}
    for variant, context in (("direct", 600), ("direct", 1000), ("no_context", 1000)):
        ours, theirs = (results[subject, variant, context] for subject in ("here", "there"))
        assert ours["groups"] == theirs["groups"]
        assert (ours.get("asked_again"), ours.get("re_asked")) == (theirs.get("asked_again"), theirs.get("re_asked"))
