"""What a user would run instead: transformers, mamba-ssm and flash-linear-attention, as far as they are installed.

Each peer trains in a plain loop (bf16 autocast on CUDA, gradients clipped, fused AdamW) on the same rows, eagerly, as
its users have it. transformers computes exactly the same models, with the same weights; the other packages have
models of their own, whose parameters are told.
"""

from __future__ import annotations

import importlib.util
import math
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from longspan.commands.bench.own import LEAST_REPEATS, Generated, RandomRows, byte_tokenizer, generated, rows_of
from longspan.commands.bench.setting import Setting
from longspan.engines.transformers import TransformersEngine
from longspan.foundation.errors import UserError
from longspan.models.config import ModelConfig
from longspan.models.interchange import write_folder
from longspan.models.language_model import LanguageModel
from longspan.training.measurement import PeakMemory, synchronizer
from longspan.training.precision import autocast_for

WARM_UP = 2


@dataclass(frozen=True)
class Peer:
    """Another implementation.

    Attributes:
        name: of the package, and the class where there are several.
        same_weights: whether it computes the very same model.
        build: makes the model for training (fp32), or for generating (in the dtype of the setting).
        loss: the mean loss of a model over tokens and targets (B, T).
        generate: rates of a model that generates after a context, within so many seconds.
    """

    name: str
    same_weights: bool
    build: Callable[[torch.dtype], nn.Module]
    loss: Callable[[Any, Tensor, Tensor], Tensor]
    generate: Callable[[Any, int, Setting, float], Generated]


def peers_of(config: ModelConfig, setting: Setting) -> Iterator[Peer]:
    """The installed packages that have a model like this one."""
    if importlib.util.find_spec("transformers") is not None:
        # Where no class of transformers computes this pattern (docs/export.md says which do), there is no such peer.
        with suppress(UserError):
            yield _transformers(config, setting)
    mixers = {config.mixer(layer)[0].name for layer in config.layers()}
    if setting.device.type != "cuda":
        return
    if importlib.util.find_spec("mamba_ssm") is not None and "mamba2" in mixers <= {"mamba2", "attention"}:
        yield Peer(
            "mamba-ssm", False, lambda dtype: _mamba_ssm(config, setting).to(dtype), _their_logits, _step_by_step
        )
    if importlib.util.find_spec("fla") is not None and mixers in ({"mamba2"}, {"gated_deltanet"}):
        yield Peer("flash-linear-attention", False, lambda dtype: _fla(config, setting).to(dtype), _labels, _as_engine)


def peer_trained(peer: Peer, context: int, setting: Setting, seconds: float) -> tuple[list[float], int, int]:
    """Tokens/s of each step, the peak of memory in bytes, and the parameters."""
    model = peer.build(torch.float32).to(setting.device).train()
    memory, wait = PeakMemory(setting.device), synchronizer(setting.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.1, fused=True)
    autocast = autocast_for(setting.dtype, setting.device)
    rows = RandomRows(rows_of(setting, context), context, setting.vocab_size)
    rates: list[float] = []
    started = time.perf_counter()
    for step in range(WARM_UP + 1000):
        if step == WARM_UP:
            started = time.perf_counter()
        wait()
        began = time.perf_counter()
        batch = next(rows)
        tokens, targets = (
            torch.from_numpy(array).to(setting.device, torch.int64) for array in (batch.tokens, batch.targets)
        )
        with autocast():
            loss = peer.loss(model, tokens, targets)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        wait()
        if step >= WARM_UP:
            rates.append(tokens.numel() / (time.perf_counter() - began))
        if len(rates) >= LEAST_REPEATS and time.perf_counter() - started > seconds:
            break
    return rates, memory.bytes(), count(model)


def peer_generated(peer: Peer, context: int, setting: Setting, seconds: float) -> tuple[Generated, int]:
    """Rates of prefill and decoding, and the parameters."""
    model = peer.build(setting.torch_dtype).to(setting.device).eval()
    return peer.generate(model, context, setting, seconds), count(model)


def count(model: nn.Module) -> int:
    """Parameters, shared ones once."""
    return sum(parameter.numel() for parameter in model.parameters())


# --- transformers -----------------------------------------------------------------------------------------------------


def _transformers(config: ModelConfig, setting: Setting) -> Peer:
    from longspan.models.interchange.choose import architecture_of

    def build(dtype: torch.dtype) -> nn.Module:
        from transformers import AutoModelForCausalLM
        from transformers.utils import logging

        # It warns of missing CUDA kernels; that it runs without them is what is measured.
        logging.set_verbosity_error()  # type: ignore[no-untyped-call]
        logging.disable_progress_bar()  # type: ignore[no-untyped-call]
        with tempfile.TemporaryDirectory(prefix="longspan-bench-") as place:
            folder = Path(place) / "model"
            longest = max(setting.contexts) + setting.new_tokens
            write_folder(LanguageModel(config, setting.vocab_size), folder, context=longest, dtype=dtype)
            model: nn.Module = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="sdpa")
        return model

    def loss(model: Any, tokens: Tensor, targets: Tensor) -> Tensor:
        # `shift_labels` are used as they are: one target per position, as on our side.
        found: Tensor = model(tokens, labels=tokens, shift_labels=targets, use_cache=False).loss
        return found

    return Peer(f"transformers {architecture_of(config).name}", True, build, loss, _as_engine)


def _as_engine(model: Any, context: int, setting: Setting, seconds: float) -> Generated:
    engine = TransformersEngine(model, byte_tokenizer(), markers=False, fingerprint="bench")
    return generated(engine, context, setting, seconds)


# --- the packages with kernels of their own, on CUDA ------------------------------------------------------------------


def _mamba_ssm(config: ModelConfig, setting: Setting) -> nn.Module:
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
    model: nn.Module = models.MambaLMHeadModel(
        configs.MambaConfig(
            d_model=config.width,
            d_intermediate=config.hidden,
            n_layer=len(names),
            vocab_size=setting.vocab_size,
            ssm_cfg={"layer": "Mamba2", "d_state": config.state, "headdim": config.mamba_head_dim},
            attn_layer_idx=[number for number, name in enumerate(names) if name == "attention"],
            attn_cfg=attention,
            pad_vocab_size_multiple=1,
        )
    )
    return model


def _their_logits(model: Any, tokens: Tensor, targets: Tensor) -> Tensor:
    logits = model(tokens).logits
    return nn.functional.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())


@torch.inference_mode()
def _step_by_step(model: Any, context: int, setting: Setting, seconds: float) -> Generated:
    parameters: Any = importlib.import_module("mamba_ssm.utils.generation").InferenceParams
    wait = synchronizer(setting.device)
    prefill: list[float] = []
    decode: list[float] = []
    torch.cuda.reset_peak_memory_stats(setting.device)
    started = time.perf_counter()
    while len(prefill) <= LEAST_REPEATS or time.perf_counter() - started < seconds:
        tokens = torch.randint(0, setting.vocab_size, (1, context), device=setting.device)
        cache = parameters(max_seqlen=context + setting.new_tokens, max_batch_size=1)
        wait()
        began = time.perf_counter()
        logits = model(tokens, inference_params=cache, num_last_tokens=1).logits
        cache.seqlen_offset = context
        token = logits[:, -1].argmax(-1, keepdim=True)
        wait()
        first = time.perf_counter()
        for _ in range(setting.new_tokens - 1):
            positions = torch.full_like(token, cache.seqlen_offset)
            logits = model(token, position_ids=positions, inference_params=cache, num_last_tokens=1).logits
            cache.seqlen_offset += 1
            token = logits[:, -1].argmax(-1, keepdim=True)
        wait()
        prefill.append(context / (first - began))
        decode.append((setting.new_tokens - 1) / (time.perf_counter() - first))
    state = sum(_bytes_in(value) for value in cache.key_value_memory_dict.values())
    return Generated(prefill[1:], decode[1:], state, torch.cuda.max_memory_allocated(setting.device))


def _bytes_in(value: Any) -> int:
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    return sum(map(_bytes_in, value))


def _fla(config: ModelConfig, setting: Setting) -> nn.Module:
    models: Any = importlib.import_module("fla.models")
    layers, width = len(config.layers()), config.width
    shared = {"hidden_size": width, "num_hidden_layers": layers, "vocab_size": setting.vocab_size}
    shared |= {"tie_word_embeddings": True}
    name = config.mixer(config.layers()[0])[0].name
    if name == "mamba2":
        inner = 2 * width
        made = models.Mamba2Config(
            **shared, head_dim=config.mamba_head_dim, num_heads=inner // config.mamba_head_dim, state_size=config.state
        )
        model: nn.Module = models.Mamba2ForCausalLM(made)
        return model
    head_dim = config.delta_head_dim
    made = models.GatedDeltaNetConfig(
        **shared, head_dim=head_dim, num_heads=math.ceil(width / head_dim), intermediate_size=config.hidden
    )
    return models.GatedDeltaNetForCausalLM(made)  # type: ignore[no-any-return]


def _labels(model: Any, tokens: Tensor, targets: Tensor) -> Tensor:
    del targets  # It shifts its labels itself.
    found: Tensor = model(tokens, labels=tokens, use_cache=False).loss
    return found
