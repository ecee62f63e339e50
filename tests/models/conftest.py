"""Tiny models and batches for the laws."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import pytest
import torch
from torch import Tensor

from longspan.foundation.randomness import torch_generator
from longspan.models.language_model import LanguageModel, ModelConfig

VOCAB = 29
# Embeddings of 0.02 alone would be so small a residual stream that every norm after it magnifies rounding errors too.
TINY = {"width": 16, "heads": 2, "state": 8, "mamba_head_dim": 8, "delta_head_dim": 6, "chunk": 8, "mlp_width": 16}
TINY |= {"embedding_multiplier": 16.0, "window": 5}


@cache
def _tiny(pattern: str, settings: tuple[tuple[str, object], ...]) -> LanguageModel:
    return LanguageModel(ModelConfig.parse({"pattern": pattern, **TINY, **dict(settings)}, "model"), VOCAB, 0)


@pytest.fixture(scope="session")
def tiny() -> Callable[..., LanguageModel]:
    """Models of width 16, shared between tests: do not change their weights."""

    def build(pattern: str, **settings: object) -> LanguageModel:
        return _tiny(pattern, tuple(settings.items()))

    return build


@pytest.fixture(scope="session")
def tokens() -> Callable[..., Tensor]:
    """Random tokens of a shape, the same for the same names."""

    def draw(*shape: int, name: object = 0, vocab: int = VOCAB) -> Tensor:
        return torch.randint(0, vocab, shape, generator=torch_generator(0, "tokens", name))

    return draw
