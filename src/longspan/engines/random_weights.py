"""Models given by their shape, with random weights drawn where they run: weights do not change what a model costs.

The shape is written as a study writes a model. Both engines compute the same function: transformers builds the class
that the shape would be exported as, and is given the weights that ours draws. Its own would not do: they have one
deviation at any width (0.1 for Mamba-2), and at a width of 4,096 with 66 layers that is a chaotic function, in which
rounding alone grows to another answer.
"""

from __future__ import annotations

from typing import Any

import torch

from longspan.corpus.tokenizer import Tokenizer
from longspan.engines.native import Dtype, NativeEngine, torch_dtype
from longspan.foundation.extras import require
from longspan.foundation.files import digest
from longspan.models.config import ModelConfig
from longspan.models.interchange import architecture_of, exported_tensors
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


def transformers_model(config: ModelConfig, vocab_size: int, described: Any, dtype: torch.dtype, device: str) -> Any:
    """A causal language model of transformers with the random weights of Longspan's own, drawn on the device.

    Both are there for a moment.

    Args:
        config, vocab_size: of Longspan's model.
        described: the same as `transformers_config` says it.
        dtype: of every parameter.
        device: where it runs.
    """
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model = require("transformers").AutoModelForCausalLM.from_config(described).eval()
    finally:
        torch.set_default_dtype(before)
    drawn = LanguageModel.drawn_on(device, dtype, config, vocab_size)
    missing, unknown = model.load_state_dict(exported_tensors(drawn, dtype), strict=False)
    tied = {"lm_head.weight"} if config.tied else set()
    assert set(missing) <= tied, f"{type(model).__name__} has {missing}, which no weight of ours stands for"
    assert not unknown, f"{type(model).__name__} has no place for {unknown}"
    return model
