"""What a user would run instead: transformers, mamba-ssm and flash-linear-attention, as far as they are installed.

Each peer trains in a plain loop (bf16 autocast on CUDA, gradients clipped, fused AdamW) on the same rows, eagerly, as
its users have it. transformers computes exactly the same models, with the same weights; the other packages have
models of their own, whose parameters are told.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from longspan.commands.bench import packages
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
    if packages.has("transformers"):
        # Where no class of transformers computes this pattern (docs/export.md says which do), there is no such peer.
        with suppress(UserError):
            yield _transformers(config, setting)
    mixers = {config.mixer(layer)[0].name for layer in config.layers()}
    if setting.device.type != "cuda":
        return
    if packages.has("mamba_ssm") and "mamba2" in mixers <= {"mamba2", "attention"}:
        yield Peer(
            packages.mamba_ssm_name(),
            False,
            lambda dtype: packages.mamba_ssm_model(config, setting).to(dtype),
            packages.logits_loss,
            packages.mamba_ssm_generated,
        )
    if packages.has("fla") and mixers in ({"mamba2"}, {"gated_deltanet"}):
        yield Peer(
            packages.FLA,
            False,
            lambda dtype: packages.fla_model(config, setting).to(dtype),
            packages.own_loss,
            packages.fla_generated,
        )


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
            # Those of Mamba alone refuse to be told how they attend.
            how = {"attn_implementation": "sdpa"} if "attention" in config.describe_mixers() else {}
            model: nn.Module = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **how)
        return model

    def loss(model: Any, tokens: Tensor, targets: Tensor) -> Tensor:
        # `shift_labels` are used as they are: one target per position, as on our side.
        found: Tensor = model(tokens, labels=tokens, shift_labels=targets, use_cache=False).loss
        return found

    return Peer(f"transformers {architecture_of(config).name}", True, build, loss, _as_engine)


def _as_engine(model: Any, context: int, setting: Setting, seconds: float) -> Generated:
    engine = TransformersEngine(model, byte_tokenizer(), markers=False, fingerprint="bench")
    return generated(engine, context, setting, seconds)
