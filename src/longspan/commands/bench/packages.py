"""Models of mamba-ssm and flash-linear-attention, built and asked as these packages would have it.

Both run on CUDA alone. Where one of them is installed and yet does not run here (no compiled convolution, a Triton that
it refuses), it says so itself, and what it says stands in the table.
"""

from __future__ import annotations

import importlib
import importlib.util
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from longspan.commands.bench.own import LEAST_REPEATS, MOST_REPEATS, Generated
from longspan.commands.bench.setting import Setting
from longspan.models.budget import count_parameters
from longspan.models.config import ModelConfig
from longspan.training.measurement import PeakMemory, synchronizer

MAMBA_SSM, FLA = "mamba-ssm", "flash-linear-attention"
Write = Callable[[Tensor], tuple[float, float, float]]
"""Reads a prompt (1, T) and writes `new_tokens`: when it began, had the first of them, and had the last, in seconds."""


def has(module: str) -> bool:
    """Whether it is installed; it may fail to import."""
    return importlib.util.find_spec(module) is not None


def generated(
    write: Write, state_bytes: Callable[[], int], context: int, setting: Setting, seconds: float
) -> Generated:
    """One fresh prompt at a time, after one that is not counted, for so many seconds and at least a few times."""
    memory = PeakMemory(setting.device)
    prefill: list[float] = []
    decode: list[float] = []
    started = time.perf_counter()
    for repeat in range(MOST_REPEATS + 1):
        began, first, last = write(torch.randint(0, setting.vocab_size, (1, context), device=setting.device))
        if repeat:
            prefill.append(context / (first - began))
            decode.append((setting.new_tokens - 1) / (last - first))
        else:
            started = time.perf_counter()
        if len(prefill) >= LEAST_REPEATS and time.perf_counter() - started > seconds:
            break
    return Generated(prefill, decode, state_bytes(), memory.bytes())


def bytes_in(value: Any) -> int:
    """Of all tensors in what a package keeps of a sequence."""
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, dict):
        value = list(value.values())
    return sum(map(bytes_in, value)) if isinstance(value, list | tuple) else 0


# --- mamba-ssm --------------------------------------------------------------------------------------------------------


def mamba_ssm_model(config: ModelConfig, setting: Setting) -> nn.Module:
    """`MambaLMHeadModel` with the same width, layers and MLP.

    Without causal-conv1d, which it can do without, training takes the parts of its kernel one by one.
    """
    models: Any = importlib.import_module("mamba_ssm.models.mixer_seq_simple")
    configs: Any = importlib.import_module("mamba_ssm.models.config_mamba")
    names = [config.mixer(layer)[0].name for layer in config.layers()]
    head_dim = config.width // (config.heads or 1)
    attention = {
        "causal": True,
        "d_conv": 0,
        "head_dim": head_dim,
        "num_heads": config.heads,
        "out_proj_bias": False,
        "qkv_proj_bias": False,
        "rotary_emb_dim": head_dim,
    }
    scan = {"layer": "Mamba2", "d_state": config.state, "headdim": config.mamba_head_dim, "expand": config.expand}
    model: nn.Module = models.MambaLMHeadModel(
        configs.MambaConfig(
            d_model=config.width,
            d_intermediate=config.hidden,
            n_layer=len(names),
            vocab_size=setting.vocab_size,
            ssm_cfg={**scan, "use_mem_eff_path": has("causal_conv1d")},
            attn_layer_idx=[number for number, name in enumerate(names) if name == "attention"],
            attn_cfg=attention,
            pad_vocab_size_multiple=1,
        )
    )
    return model


def mamba_ssm_name() -> str:
    """With the convolution that it runs with."""
    return MAMBA_SSM if has("causal_conv1d") else f"{MAMBA_SSM} without causal-conv1d"


def logits_loss(model: Any, tokens: Tensor, targets: Tensor) -> Tensor:
    """Of a model that computes none itself."""
    logits = model(tokens).logits
    return nn.functional.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())


def mamba_ssm_generated(model: Any, context: int, setting: Setting, seconds: float) -> Generated:
    """Its own `generate` with a CUDA graph, which the prompt that is not counted captures."""

    class Ticks:
        """Told of the prompt, then of every token."""

        def __init__(self) -> None:
            self.at: list[float] = []

        def put(self, tokens: Tensor) -> None:
            self.at.append(time.perf_counter())

        def end(self) -> None:
            pass

    def write(prompt: Tensor) -> tuple[float, float, float]:
        ticks = Ticks()
        model.generate(prompt, context + setting.new_tokens, cg=True, streamer=ticks)
        return ticks.at[0], ticks.at[1], ticks.at[-1]

    def held() -> int:
        return bytes_in(model._decoding_cache.inference_params.key_value_memory_dict)

    return generated(write, held, context, setting, seconds)


# --- flash-linear-attention -------------------------------------------------------------------------------------------


def fla_model(config: ModelConfig, setting: Setting) -> nn.Module:
    """Its Gated DeltaNet with the same layers; its Mamba-2, which has no MLP, with layers for as many parameters."""
    models: Any = importlib.import_module("fla.models")
    width, layer = config.width, config.layers()[0]
    shared = {"hidden_size": width, "vocab_size": setting.vocab_size, "tie_word_embeddings": True}
    mixer, settings = config.mixer(layer)
    if mixer.name == "mamba2":
        sizes = count_parameters(config, setting.vocab_size)
        each = (sizes.mixers + sizes.norms) / len(config.layers())
        made = models.Mamba2Config(
            **shared,
            num_hidden_layers=max(1, round(sizes.non_embedding / each)),
            head_dim=config.mamba_head_dim,
            num_heads=config.expand * width // config.mamba_head_dim,
            expand=config.expand,
            state_size=config.state,
        )
        return models.Mamba2ForCausalLM(made)  # type: ignore[no-any-return]
    delta: Any = settings
    made = models.GatedDeltaNetConfig(
        **shared,
        num_hidden_layers=len(config.layers()),
        intermediate_size=config.hidden,
        head_dim=delta.delta_head_dim,
        num_heads=delta.delta_heads or 3 * width // (4 * delta.delta_head_dim),
        expand_v=delta.expand_v,
        conv_size=delta.conv,
        allow_neg_eigval=delta.negative_eigenvalues,
    )
    return models.GatedDeltaNetForCausalLM(made)  # type: ignore[no-any-return]


def own_loss(model: Any, tokens: Tensor, targets: Tensor) -> Tensor:
    """Of a model that shifts its labels itself."""
    del targets
    found: Tensor = model(tokens, labels=tokens, use_cache=False).loss
    return found


@torch.inference_mode()
def fla_generated(model: Any, context: int, setting: Setting, seconds: float) -> Generated:
    """Token by token with its own cache."""
    wait = synchronizer(setting.device)
    layers: list[Any] = []

    def write(prompt: Tensor) -> tuple[float, float, float]:
        wait()
        began = first = time.perf_counter()
        given = {"input_ids": prompt, "logits_to_keep": 1}
        for number in range(setting.new_tokens):
            found = model(**given, use_cache=True)
            given = {"input_ids": found.logits[:, -1:].argmax(-1), "past_key_values": found.past_key_values}
            if number == 0:
                wait()
                first = time.perf_counter()
        wait()
        layers[:] = getattr(found.past_key_values, "layers", ())
        return began, first, time.perf_counter()

    def held() -> int:
        return bytes_in([getattr(layer, "state", None) for layer in layers])

    return generated(write, held, context, setting, seconds)
