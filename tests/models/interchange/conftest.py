"""Tiny models whose every parameter shows in the logits, written once per session."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from longspan.foundation.randomness import torch_generator
from longspan.models.interchange import write_folder
from longspan.models.language_model import LanguageModel, ModelConfig

VOCAB = 101
CONTEXT = 64
TINY = {"width": 32, "heads": 4, "kv_heads": 2, "state": 8, "mamba_head_dim": 16, "chunk": 16, "mlp_width": 48}
LLAMA3 = {"kind": "llama3", "factor": 8.0, "low_frequency": 1.0, "high_frequency": 4.0, "original_context": 16}
BARE = {"mlp": "none", "tied": False, "positions": "nope", "norm_eps": 1e-3}

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "AA": ("LlamaForCausalLM", {}),
    "AA biases, untied": (
        "LlamaForCausalLM",
        {"attention_bias": True, "mlp_bias": True, "tied": False, "rope_base": 5e4, "kv_heads": None, "norm_eps": 1e-3},
    ),
    "AA llama3": ("LlamaForCausalLM", {"mixers": {"A": {"rope_scaling": LLAMA3}}}),
    "AA multiplied": ("GraniteMoeHybridForCausalLM", {"embedding_multiplier": 3.0}),
    "AA without positions": ("GraniteMoeHybridForCausalLM", {"positions": "nope", "norm_eps": 1e-3}),
    "AM linear": (
        "GraniteMoeHybridForCausalLM",
        {"mixers": {"A": {"rope_scaling": {"kind": "linear", "factor": 4.0}}}, "attention_bias": True, "tied": False},
    ),
    "MAM": ("GraniteMoeHybridForCausalLM", {"expand": 1, "conv": 2, "rope_base": 5e4, "norm_eps": 1e-3}),
    "MM": ("GraniteMoeHybridForCausalLM", {}),
    "MM bare": ("Mamba2ForCausalLM", {"mlp": "none", "norm_eps": 1e-3, "conv": 3, "expand": 3}),
    "MM bare, untied, multiplied": ("Mamba2ForCausalLM", {"mlp": "none", "tied": False, "embedding_multiplier": 3.0}),
    "mm": ("MambaForCausalLM", {"mlp": "none"}),
    "mm multiplied": (
        "MambaForCausalLM",
        {
            "mlp": "none",
            "norm_eps": 1e-3,
            "embedding_multiplier": 4.0,
            "mixers": {"m": {"mamba1_state": 6, "dt_rank": 3, "conv": 3, "expand": 3}},
        },
    ),
    "MAMA bare": ("NemotronHForCausalLM", BARE),
    "AA bare": ("NemotronHForCausalLM", BARE),
}
"""name, whose first word is the pattern -> architecture and settings."""


def build(pattern: str, vocab: int = VOCAB, **settings: Any) -> LanguageModel:
    """A model whose norms, biases and D are off their initial values, and whose logits are of order 10."""
    model = LanguageModel(ModelConfig.parse({"pattern": pattern, **TINY, **settings}, "model"), vocab, 3)
    generator = torch_generator(0, "perturb")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
        model.embedding.weight.mul_(20)
        if model.head is not None:
            model.head.weight.mul_(20)
    return model.eval()


@cache
def case(name: str) -> LanguageModel:
    """The model of a case; do not change its weights."""
    return build(name.split()[0], **CASES[name][1])


@pytest.fixture(scope="session")
def written(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a case."""
    place = tmp_path_factory.mktemp("written")

    def write(name: str) -> Path:
        folder = place / name.replace(" ", "-")
        if not folder.exists():
            write_folder(case(name), folder, context=CONTEXT)
        return folder

    return write


def batch(rows: int, length: int, vocab: int = VOCAB) -> Tensor:
    """Random tokens."""
    return torch.randint(0, vocab, (rows, length), generator=torch_generator(0, "tokens", rows, length))


@torch.no_grad()
def logits(model: LanguageModel, tokens_BT: Tensor, *lengths: int) -> Tensor:
    """All logits, (B, T, V); with `lengths`, in calls of so many tokens each."""
    state = model.initial_state() if lengths else None
    parts = []
    for part_BT in tokens_BT.split(list(lengths) or tokens_BT.shape[1], dim=1):
        hidden_BTD, state = model(part_BT, None, state)
        parts.append(model.logits(hidden_BTD))
    return torch.cat(parts, dim=1)
