"""A tiny tokenizer and tiny real models of every mixer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from longspan.corpus.tokenizer import Tokenizer, TokenizerConfig, train_tokenizer
from longspan.engines.native import NativeEngine
from longspan.engines.trained_run import describe_run
from longspan.foundation.files import write_json
from longspan.models.language_model import LanguageModel, ModelConfig
from longspan.training.checkpoint import TrainingState, save_checkpoint


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    texts = [f"The {noun} {verb} the other {noun}." for noun in ("senate", "house") for verb in ("asks", "answers")]
    return train_tokenizer(TokenizerConfig(vocab_size=270, min_frequency=1), texts)


@pytest.fixture(scope="session")
def tiny_model(tokenizer: Tokenizer) -> Callable[..., LanguageModel]:
    def build(pattern: str = "AMG", seed: int = 0, **settings: object) -> LanguageModel:
        options = {"width": 16, "heads": 2, "state": 8, "mamba_head_dim": 8, "chunk": 16, "mlp": "none", **settings}
        config = ModelConfig.parse({"pattern": pattern, **options}, "model")
        return LanguageModel(config, tokenizer.vocab_size, seed=seed)

    return build


@pytest.fixture(scope="session")
def tiny_engine(tokenizer: Tokenizer) -> Callable[..., NativeEngine]:
    def build(model: LanguageModel, **options: object) -> NativeEngine:
        settings = {"markers": True, "isolation": "full", "fingerprint": "f", **options}
        return NativeEngine(model, tokenizer, **settings)  # type: ignore[arg-type]

    return build


@pytest.fixture(scope="session")
def write_run(tokenizer: Tokenizer) -> Callable[..., Path]:
    """A folder as a study leaves it, of models that were not trained."""

    def write(folder: Path, best: LanguageModel, last: LanguageModel | None = None, **options: object) -> Path:
        settings = {"markers": True, "isolation": "full", "context": 48, **options}
        model = best.config.model_dump(mode="json")
        describe_run(folder, name=f"{best.config.pattern} seed 0", model=model, tokenizer=tokenizer, **settings)  # type: ignore[arg-type]
        for name, weights in (("best", best), ("last", last or best)):
            save_checkpoint(folder / "training" / "checkpoints" / name, {}, TrainingState(), weights)
        write_json(folder / "training" / "result.json", {})
        return folder

    return write
