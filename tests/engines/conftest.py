"""A tiny tokenizer and tiny real models of every mixer."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from longspan.corpus.tokenizer import Tokenizer, TokenizerConfig, train_tokenizer
from longspan.engines.native import NativeEngine
from longspan.models.language_model import LanguageModel, ModelConfig


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
