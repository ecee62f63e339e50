"""Models given by their shape, with random weights drawn where they run: weights do not change what a model costs.

The shape is written as a study writes a model. Both engines compute the same architecture: transformers builds the
class that the shape would be exported as.
"""

from __future__ import annotations

from typing import Any

import torch

from longspan.corpus.tokenizer import Tokenizer
from longspan.engines.native import Dtype, NativeEngine, torch_dtype
from longspan.foundation.extras import require
from longspan.foundation.files import digest
from longspan.models.config import ModelConfig
from longspan.models.interchange import architecture_of
from longspan.models.language_model import LanguageModel


def native_of_shape(
    config: ModelConfig, vocab_size: int, tokenizer: Tokenizer, *, dtype: Dtype, device: str, name: str
) -> NativeEngine:
    """Longspan's own model of a shape, ready to be asked."""
    model = LanguageModel.drawn_on(device, torch_dtype(dtype), config, vocab_size)
    engine = NativeEngine(
        model,
        tokenizer,
        markers=True,
        isolation="full",
        fingerprint=digest(["random weights", config.model_dump(mode="json"), vocab_size, dtype]),
        device=device,
        dtype=dtype,
        name=name,
    )
    engine.weight_bytes = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    return engine


def transformers_config(config: ModelConfig, vocab_size: int, context: int) -> Any:
    """What transformers calls the shape.

    Args:
        config: of Longspan's model.
        vocab_size: rows of the embedding.
        context: most tokens that it is asked for.

    Raises:
        UserError: no class of transformers computes the same.
    """
    architecture = architecture_of(config)
    described = architecture.describe(config, context)
    return require("transformers").AutoConfig.for_model(
        architecture.model_type, vocab_size=vocab_size, **{**described, "use_cache": True}
    )


def transformers_model(config: Any, dtype: torch.dtype, device: str) -> Any:
    """A causal language model of transformers with random weights, drawn on the device."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            return require("transformers").AutoModelForCausalLM.from_config(config).eval()
    finally:
        torch.set_default_dtype(before)
