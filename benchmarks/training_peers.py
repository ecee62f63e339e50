"""transformers' models of the shapes that `training_step_gpu.py` trains."""

from __future__ import annotations

from typing import Any

from longspan.models.language_model import ModelConfig


def llama(config: ModelConfig, vocab: int) -> Any:
    """A Llama with as many layers, as wide, with as wide an MLP."""
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=config.width,
            num_hidden_layers=len(config.layers()),
            num_attention_heads=config.heads,
            intermediate_size=config.hidden,
            vocab_size=vocab,
            tie_word_embeddings=True,
            max_position_embeddings=131_072,
            attn_implementation="sdpa",
        )
    )


def mamba2(config: ModelConfig, vocab: int) -> Any:
    """A Mamba-2 with as many layers, as wide, with as large a state."""
    from transformers import Mamba2Config, Mamba2ForCausalLM

    return Mamba2ForCausalLM(
        Mamba2Config(
            hidden_size=config.width,
            num_hidden_layers=len(config.layers()),
            num_heads=2 * config.width // config.mamba_head_dim,
            head_dim=config.mamba_head_dim,
            state_size=config.state,
            n_groups=1,
            vocab_size=vocab,
            tie_word_embeddings=True,
        )
    )
