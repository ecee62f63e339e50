"""What is measured: patterns at equal parameters, contexts, and how long all of it may take."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from longspan.engines.loading import check_device, default_device
from longspan.foundation.errors import UserError
from longspan.models.budget import count_parameters
from longspan.models.config import ModelConfig
from longspan.models.matching import MatchConfig, match
from longspan.ops import kernels
from longspan.study.budget_table import parse_contexts
from longspan.training.precision import resolve_dtype

HEAD_DIM = 64
ALIGNED = {"cuda": 128, "cpu": HEAD_DIM}
"""Widths are multiples of this: of a tile of a GPU's matrix products, which compute whole tiles whatever is asked."""
TOLERANCE = 0.02
WIDEST = 16_384


@dataclass(frozen=True)
class Setting:
    """What a bench measures.

    Attributes:
        patterns: of the subjects.
        contexts: tokens of a training row and of a prompt.
        parameters: that each subject has, about.
        vocab_size: rows of the embedding.
        batch_tokens: positions of a training step (at least one row).
        new_tokens: that are decoded after each prompt.
        device, dtype: of the computation; parameters stay fp32 in training.
        seconds: that all of it may take, about.
    """

    patterns: tuple[str, ...]
    contexts: tuple[int, ...]
    parameters: int
    vocab_size: int
    batch_tokens: int
    new_tokens: int
    device: torch.device
    dtype: Literal["fp32", "bf16"]
    seconds: float

    @property
    def torch_dtype(self) -> torch.dtype:
        """`dtype` as torch has it."""
        return torch.bfloat16 if self.dtype == "bf16" else torch.float32


def default_setting(device: torch.device) -> Setting:
    """A minute or so on two CPU cores; on a GPU a model and contexts that fill it."""
    dtype = resolve_dtype("auto", device)
    if device.type == "cuda":
        patterns, contexts = ("A12", "M12", "(AM)6"), (4096, 32_768)
        return Setting(patterns, contexts, 110_000_000, 32_768, 32_768, 64, device, dtype, 240.0)
    patterns, contexts = ("AAAA", "MMMM", "AMAM"), (256, 1024)
    return Setting(patterns, contexts, 1_000_000, 2048, 2048, 16, device, dtype, 60.0)


def models_of(setting: Setting) -> dict[str, ModelConfig]:
    """pattern → its model: the first pattern sets the width, MLPs make the others as large.

    Raises:
        UserError: a pattern that cannot be read or has no such size.
    """
    first = _closest(setting)
    target = count_parameters(first, setting.vocab_size).total
    rule = MatchConfig(parameters=target, free="mlp_width", tolerance=TOLERANCE)
    found = {}
    for pattern in setting.patterns:
        config = replace_pattern(first, pattern)
        try:
            found[pattern] = match(config, rule, setting.vocab_size, setting.contexts[0]).config
        except UserError as error:
            fix = f"name {pattern} first, leave it out, or change its layers or --parameters"
            raise UserError(f"--patterns: {error.given}", error.allowed, fix) from error
    return found


def replace_pattern(config: ModelConfig, pattern: str) -> ModelConfig:
    """The same settings with other layers."""
    return ModelConfig.parse({**config.model_dump(exclude_unset=True), "pattern": pattern}, "model")


def _closest(setting: Setting) -> ModelConfig:
    """The first pattern at the width, a multiple of `ALIGNED`, that comes nearest to the parameters."""
    pattern, step = setting.patterns[0], ALIGNED[setting.device.type]

    def model(width: int) -> ModelConfig:
        shape: dict[str, Any] = {"pattern": pattern, "width": width, "heads": width // HEAD_DIM}
        # Keys of Gated DeltaNet take 3/4 of the width, in heads of a power of two.
        shape["delta_head_dim"] = math.gcd(3 * width // 4, HEAD_DIM)
        if step > HEAD_DIM:
            shape["mlp_width"] = step * round(8 * width / (3 * step))
        return ModelConfig.parse(shape, "model")

    def size(width: int) -> int:
        return count_parameters(model(width), setting.vocab_size).total

    width = step
    while size(width) < setting.parameters and width < WIDEST:
        width += step
    nearest = min((max(step, width - step), width), key=lambda each: abs(size(each) - setting.parameters))
    if not 0.5 < size(nearest) / setting.parameters < 2:
        raise UserError(
            f"--parameters {setting.parameters:,} for {pattern} with a vocabulary of {setting.vocab_size:,}",
            f"about {size(step):,} (width {step}) to {size(WIDEST):,} (width {WIDEST})",
            "change --parameters, --vocab-size or the number of layers",
        )
    return model(nearest)


def read_setting(
    *,
    patterns: str | None,
    contexts: str | None,
    parameters: str | None,
    device: str | None,
    dtype: str | None,
    seconds: float | None,
    vocab_size: int | None,
    batch_tokens: int | None,
    new_tokens: int | None,
) -> Setting:
    """What was written on the command line, over the defaults of the device.

    Raises:
        UserError: something that cannot be read, or that this machine has not.
    """
    chosen = default_device() if device is None else device
    check_device(chosen)
    kernels.wanted(torch.device(chosen))
    basis = default_setting(torch.device(chosen))
    if dtype not in (None, "fp32", "bf16"):
        raise UserError(f"--dtype {dtype}", "fp32 or bf16", "choose one of these")
    given = {
        "patterns": None if patterns is None else _patterns(patterns),
        "contexts": None if contexts is None else tuple(parse_contexts(contexts)),
        "parameters": None if parameters is None else _number(parameters),
        "dtype": resolve_dtype(dtype, basis.device) if dtype else None,  # type: ignore[arg-type]
        "seconds": seconds,
        "vocab_size": vocab_size,
        "batch_tokens": batch_tokens,
        "new_tokens": new_tokens,
    }
    setting: Setting = replace(basis, **{name: value for name, value in given.items() if value is not None})  # type: ignore[arg-type]
    return setting


def _patterns(text: str) -> tuple[str, ...]:
    """`AAAA, AMAM`, each once, in order."""
    found = tuple(dict.fromkeys(map(str.strip, text.split(","))))
    if "" in found:
        raise UserError(f"--patterns {text!r}", "layers with commas, e.g. AAAA,MMMM,(AM)2", "leave out what is empty")
    return found


def _number(text: str) -> int:
    """`130M`, `1.3e6`, `1000000`."""
    units = {"k": 1e3, "K": 1e3, "M": 1e6, "B": 1e9, "G": 1e9}
    try:
        value = float(text[:-1]) * units[text[-1]] if text[-1] in units else float(text)
    except ValueError:
        value = math.nan
    if not 1 <= value <= 1e15:
        raise UserError(
            f"--parameters {text}", "a number of 1 or more, such as 130M or 1.3e6", "write it so, without spaces"
        )
    return int(value)
