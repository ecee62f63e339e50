"""Real text through the real packing: loss falls, and an interruption changes nothing."""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import zstandard

from longspan.corpus.packing import PackedBatches, PackingConfig, evaluation_batches
from longspan.corpus.shards import ShardWriter, TokenShards
from longspan.corpus.tokenizer import Tokenizer, TokenizerConfig, train_tokenizer
from longspan.foundation.errors import Stopped
from longspan.foundation.progress import Progress
from longspan.models.language_model import LanguageModel, ModelConfig
from longspan.training.config import TrainingConfig
from longspan.training.loop import train
from longspan.training.metrics import read_metrics
from longspan.training.result import TrainingResult

CONTEXT = 64


@dataclass
class Corpus:
    tokenizer: Tokenizer
    train: TokenShards
    validation: TokenShards


@pytest.fixture(scope="module")
def corpus(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    packed = (shared_data / "shakespeare" / "tinyshakespeare.txt.zst").read_bytes()
    text = zstandard.ZstdDecompressor().stream_reader(io.BytesIO(packed)).read(90_000).decode(errors="ignore")
    speeches = text.split("\n\n")
    documents = ["\n\n".join(speeches[i : i + 8]) for i in range(0, len(speeches), 8)]
    tokenizer = train_tokenizer(TokenizerConfig(kind="byte_bpe", vocab_size=384), documents[10:])
    folder = tmp_path_factory.mktemp("corpus")
    shards = []
    for name, part in (("train", documents[10:]), ("validation", documents[:10])):
        writer = ShardWriter(folder / name, tokenizer.vocab_size, tokenizer.fingerprint)
        for index, document in enumerate(part):
            writer.add(f"{name}-{index}", "", tokenizer.encode(document), len(document.encode()))
        shards.append(writer.close())
    return Corpus(tokenizer, *shards)


def run(corpus: Corpus, directory: Path, pattern: str, method: Any = "concat", **more: Any) -> TrainingResult:
    packing = PackingConfig(method=method)
    training = TrainingConfig(
        context=CONTEXT,
        batch_tokens=8 * CONTEXT,
        steps=24,
        peak_lr=5e-3,
        evaluate_every=12,
        checkpoint_every=10,
        log_every=5,
        dtype="fp32",
    )
    config = ModelConfig(pattern=pattern, width=32, heads=2, state=8, mamba_head_dim=16, chunk=16)
    special = corpus.tokenizer.special
    return train(
        LanguageModel(config, corpus.tokenizer.vocab_size, seed=1),
        training,
        make_batches=lambda: PackedBatches(
            corpus.train, packing, context=CONTEXT, rows=training.rows, special=special, seed=1
        ),
        validation=lambda: evaluation_batches(
            corpus.validation, packing, context=CONTEXT, rows=training.rows, special=special
        ),
        isolation=packing.isolation,
        token_bytes=corpus.tokenizer.token_bytes,
        directory=directory,
        **more,
    )


@pytest.mark.parametrize("pattern", ["A", "M", "G"])
def test_loss_falls_on_real_text(corpus: Corpus, tmp_path: Path, pattern: str) -> None:
    result = run(corpus, tmp_path, pattern)
    first, *_, last = read_metrics(tmp_path / "metrics.jsonl", "train")
    assert first["loss"] == pytest.approx(np.log(corpus.tokenizer.vocab_size), abs=0.3)
    assert last["loss"] < first["loss"] - 1.0
    early, final = read_metrics(tmp_path / "metrics.jsonl", "validation")
    assert final["loss"] < early["loss"]
    # With markers every text token is scored once, so every byte is.
    assert result.final.num_targets == corpus.validation.num_tokens
    assert result.final.num_bytes == corpus.validation.num_bytes


@pytest.mark.parametrize("method", ["concat", "best_fit"])
def test_stopping_and_going_on_with_packed_rows_equals_no_interruption(
    small: ModuleType, corpus: Corpus, tmp_path: Path, method: str
) -> None:
    def stop(progress: Progress, /) -> None:
        if progress.stage == "train" and progress.done == 17 * 8 * CONTEXT:
            raise Stopped("enough")

    run(corpus, tmp_path / "straight", "AM", method)
    with pytest.raises(Stopped):
        run(corpus, tmp_path / "stopped", "AM", method, report=stop)
    run(corpus, tmp_path / "stopped", "AM", method)
    for name in ("last/model.safetensors", "last/optimizer.safetensors", "best/model.safetensors"):
        one, other = (tmp_path / which / "checkpoints" / name for which in ("straight", "stopped"))
        assert one.read_bytes() == other.read_bytes()
