"""What a user would run instead: transformers, mamba-ssm and flash-linear-attention, as far as they are installed.

Each peer trains in a plain loop (bf16 autocast on CUDA, gradients clipped, fused AdamW) on the same rows, eagerly, as
its users have it; where the memory does not hold a batch, in parts of it. transformers computes exactly the same
models, with the same weights; the other packages have models of their own, whose parameters are told.
"""

from __future__ import annotations

import gc
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
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

WARM_UP, MOST_STEPS = 2, 1000


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


@dataclass(frozen=True)
class Trained:
    """Tokens/s of each step, the peak of memory in bytes, the parameters, and into how many parts a batch was cut."""

    rates: list[float]
    memory_bytes: int
    parameters: int
    parts: int


def peer_trained(peer: Peer, context: int, setting: Setting, seconds: float) -> Trained:
    """Train for so many seconds and at least a few steps, in parts of a batch where the whole does not fit.

    Raises:
        torch.OutOfMemoryError: not even one row fits.
    """
    model = peer.build(torch.float32).to(setting.device).train()
    memory, wait = PeakMemory(setting.device), synchronizer(setting.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.1, fused=True)
    rows, parts = RandomRows(rows_of(setting, context), context, setting.vocab_size), 1
    rates: list[float] = []
    steps, started = 0, time.perf_counter()
    while len(rates) < LEAST_REPEATS or (time.perf_counter() - started < seconds and len(rates) < MOST_STEPS):
        if steps == WARM_UP:
            started = time.perf_counter()
        wait()
        began = time.perf_counter()
        batch = next(rows)
        tokens, targets = (
            torch.from_numpy(array).to(setting.device, torch.int64) for array in (batch.tokens, batch.targets)
        )
        if not _fits(peer, model, tokens.chunk(parts), targets.chunk(parts), setting):
            optimizer.zero_grad(set_to_none=True)
            parts, steps = min(2 * parts, rows.rows), 0
            continue
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        wait()
        steps += 1
        if steps > WARM_UP:
            rates.append(tokens.numel() / (time.perf_counter() - began))
    return Trained(rates, memory.bytes(), count(model), parts)


def _fits(peer: Peer, model: nn.Module, tokens: Sequence[Tensor], targets: Sequence[Tensor], setting: Setting) -> bool:
    """Forward and backward of parts of a batch; False where the memory does not hold them and rows can be parted."""
    try:
        for part, expected in zip(tokens, targets, strict=True):
            with autocast_for(setting.dtype, setting.device)():
                loss = peer.loss(model, part, expected) / len(tokens)
            loss.backward()  # type: ignore[no-untyped-call]
    except torch.OutOfMemoryError:
        if max(len(part) for part in tokens) == 1:
            raise
    else:
        return True
    gc.collect()
    if setting.device.type == "cuda":
        torch.cuda.empty_cache()
    return False


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
