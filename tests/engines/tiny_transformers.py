"""Tiny models of random weights of transformers' classes, and what of them this version of transformers computes."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import transformers

VOCAB = 270
_BASE = {"vocab_size": VOCAB, "hidden_size": 32, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
_ATTENTION = {"num_attention_heads": 4, "num_key_value_heads": 2}
_GRANITE = {
    "num_local_experts": 0,
    "num_experts_per_tok": 0,
    "shared_intermediate_size": 48,
    "attention_multiplier": 8**-0.5,
    "mamba_n_heads": 8,
    "mamba_d_head": 8,
    "mamba_d_state": 8,
    "mamba_chunk_size": 16,
}
_NEMOTRON = {
    "head_dim": 8,
    "intermediate_size": 48,
    "ssm_state_size": 8,
    "mamba_num_heads": 8,
    "mamba_head_dim": 8,
    "n_groups": 2,
    "chunk_size": 16,
}


def _config(name: str, **settings: Any) -> Callable[[], Any]:
    return lambda: getattr(transformers, name)(**{**_BASE, **settings})


CONFIGS: dict[str, Callable[[], Any]] = {
    "llama": _config("LlamaConfig", **_ATTENTION, intermediate_size=48, num_hidden_layers=2),
    "sliding": _config("MistralConfig", **_ATTENTION, intermediate_size=48, num_hidden_layers=2, sliding_window=8),
    "mamba": _config("MambaConfig", state_size=8, num_hidden_layers=2),
    "mamba2": _config(
        "Mamba2Config", state_size=8, num_hidden_layers=2, num_heads=8, head_dim=8, n_groups=2, chunk_size=16
    ),
    "granite": _config(
        "GraniteMoeHybridConfig",
        **_ATTENTION,
        **_GRANITE,
        num_hidden_layers=3,
        layer_types=["linear_attention", "full_attention", "linear_attention"],
        position_embedding_type="rope",
        logits_scaling=2.0,
    ),
    "nemotron": _config(
        "NemotronHConfig",
        **_ATTENTION,
        **_NEMOTRON,
        layers_block_type=["linear_attention", "mlp", "full_attention", "mlp"],
    ),
    "jamba": _config(
        "JambaConfig",
        **_ATTENTION,
        intermediate_size=48,
        num_hidden_layers=4,
        attn_layer_period=2,
        attn_layer_offset=1,
        num_experts=2,
        mamba_d_state=8,
    ),
    "zamba2": _config(
        "Zamba2Config",
        num_attention_heads=4,
        num_hidden_layers=4,
        layers_block_type=["mamba", "hybrid", "mamba", "hybrid"],
        mamba_d_state=8,
        n_mamba_heads=8,
        mamba_ngroups=1,
        chunk_size=16,
        intermediate_size=48,
        num_mem_blocks=1,
    ),
    "granite all mamba": _config(
        "GraniteMoeHybridConfig",
        **_ATTENTION,
        **_GRANITE,
        num_hidden_layers=2,
        layer_types=["linear_attention", "linear_attention"],
    ),
}
IN_PARTS = {"llama", "sliding", "mamba2", "granite", "nemotron", "zamba2"}
"""Those that take a text in parts; what `mamba` and `jamba` of transformers 5.23 give in parts is wrong."""
PADDED = IN_PARTS | {"jamba"}
"""Those that give the same after padding in front."""
WITH_STATE = set(CONFIGS) - {"granite all mamba"}
"""Those that keep a state; transformers 5.23 cannot for hybrids without a layer of attention."""


@cache
def model(name: str) -> Any:
    """A model whose logits differ from token to token."""
    torch.manual_seed(0)
    made = transformers.AutoModelForCausalLM.from_config(CONFIGS[name]()).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.ndim > 1:
                parameter.mul_(4)
    return made
