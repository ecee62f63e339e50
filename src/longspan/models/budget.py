"""What a configuration costs, without building it: parameters, FLOPs, state bytes, and widths that make subjects equal.

Sources: facts of the formulas in `Mixer.flops` of each mixer; 2 FLOPs per multiply-add, training = 3 x forward,
recomputation not counted.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Self

import torch
from pydantic import Field, model_validator
from torch import nn

from longspan.foundation.config import Config
from longspan.foundation.errors import UserError
from longspan.models.block import Block, build_norm
from longspan.models.config import ModelConfig

STEPS = (64, 32, 16, 8, 4, 2, 1)
WIDEST = 1 << 20


@dataclass(frozen=True)
class Parameters:
    """Parameter counts of a whole model.

    Attributes:
        total: all, a tied head counted once.
        embedding: token embedding and learned positions.
        head: output matrix, 0 where tied.
        non_embedding: total without embedding and head.
        mixers: in all mixers, their inner norms included.
        mlp: in all MLPs.
        norms: before mixers, MLPs and head.
    """

    total: int
    embedding: int
    head: int
    non_embedding: int
    mixers: int
    mlp: int
    norms: int


def count_parameters(config: ModelConfig, vocab_size: int) -> Parameters:
    """Count without allocating: one layer per letter of the pattern is built on the meta device."""
    layers, blocks = config.layers(), _blocks(config)
    mixers = sum(_count(blocks[letter].mixer) for letter in layers)
    mlp = sum(_count(blocks[letter].mlp) for letter in layers)
    with torch.device("meta"):
        final_norm = build_norm(config)
    norms = sum(_count(blocks[letter]) for letter in layers) - mixers - mlp + _count(final_norm)
    rows = vocab_size + (config.max_positions or 0 if config.positions == "learned" else 0)
    embedding = rows * config.width
    head = 0 if config.tied else vocab_size * config.width
    non_embedding = mixers + mlp + norms
    return Parameters(embedding + head + non_embedding, embedding, head, non_embedding, mixers, mlp, norms)


def forward_flops_per_token(config: ModelConfig, vocab_size: int, context: int) -> float:
    """FLOPs of one forward pass per token of a row of `context` tokens, every token scored.

    Matrix products, convolutions and scans; attention at its causal average of context/2 keys. Norms, activations and
    the embedding look-up are not counted.
    """
    layers, blocks = config.layers(), _blocks(config)
    per_letter = {
        letter: block.mixer.flops(context) + (block.mlp.flops() if block.mlp is not None else 0.0)
        for letter, block in blocks.items()
    }
    return sum(per_letter[letter] for letter in layers) + 2.0 * config.width * vocab_size


def training_flops_per_token(config: ModelConfig, vocab_size: int, context: int) -> float:
    """Three times the forward pass."""
    return 3.0 * forward_flops_per_token(config, vocab_size, context)


def state_bytes(config: ModelConfig, context: int, dtype: torch.dtype = torch.float32) -> int:
    """Bytes of one row's state after `context` tokens of one document: key-value caches, recurrent and conv states."""
    blocks = _blocks(config)
    per_letter = {letter: block.mixer.state_bytes(context, dtype.itemsize) for letter, block in blocks.items()}
    return sum(per_letter[letter] for letter in config.layers())


class MatchConfig(Config):
    """What subjects share, and what may change to get there.

    Attributes:
        parameters: the target for all parameters: a number, or a pattern, whose model (at the other settings as given)
            sets it. Exactly one of `parameters` and `non_embedding_parameters`.
        non_embedding_parameters: the same for the parameters without embedding and head.
        free: `mlp_width`, `width`, or `depth` (the pattern is repeated as a whole).
        tolerance: largest |reached / target - 1|.
    """

    parameters: int | str | None = None
    non_embedding_parameters: int | str | None = None
    free: Literal["mlp_width", "width", "depth"] = "mlp_width"
    tolerance: float = Field(0.005, gt=0, lt=1)

    @model_validator(mode="after")
    def _one_target(self) -> Self:
        if (self.parameters is None) == (self.non_embedding_parameters is None):
            given = "both targets" if self.parameters is not None else "no target"
            allowed = "exactly one of `parameters` and `non_embedding_parameters`"
            raise UserError(f"match with {given}", allowed, "e.g. {non_embedding_parameters: AAAA, free: mlp_width}")
        target = self.target
        if isinstance(target, int) and target < 1:
            raise UserError(f"match to {target} parameters", "a positive number or a pattern", "raise it")
        return self

    @property
    def target(self) -> int | str:
        """The number or reference pattern."""
        target = self.non_embedding_parameters if self.parameters is None else self.parameters
        assert target is not None
        return target

    @property
    def quantity(self) -> Literal["parameters", "non_embedding_parameters"]:
        """What is matched."""
        return "non_embedding_parameters" if self.parameters is None else "parameters"


@dataclass(frozen=True)
class Matched:
    """A solved match: the configuration, what it aimed at, what it reached, and reached / target - 1."""

    config: ModelConfig
    target: int
    reached: int
    residual: float


def match(config: ModelConfig, match: MatchConfig, vocab_size: int) -> Matched:
    """Solve the free width.

    A configuration that has exactly the target is left as it is; otherwise the free width becomes a multiple of the
    largest of 64, 32, .., 1 that meets the tolerance (times what heads and head dimensions demand).

    Raises:
        UserError: no width meets the tolerance; names the bound that stopped it and the nearest value in reach.
    """

    def quantity(candidate: ModelConfig) -> int:
        counted = count_parameters(candidate, vocab_size)
        return counted.total if match.quantity == "parameters" else counted.non_embedding

    target = match.target if isinstance(match.target, int) else quantity(_changed(config, pattern=match.target))
    now = quantity(config)
    if now == target:
        return Matched(config, target, now, 0.0)
    problem = _PROBLEMS[match.free](config)

    def reached(value: int) -> int:
        return quantity(problem.build(value))

    crossing = _crossing(reached, target, problem.step)
    best = min((crossing, crossing + problem.step), key=lambda value: abs(reached(max(value, problem.step)) - target))
    for step in dict.fromkeys(math.lcm(step, problem.step) for step in problem.steps):
        below = max(crossing // step * step, step)
        value = min((below, below + step), key=lambda value: abs(reached(value) - target))
        if abs(reached(value) / target - 1) <= match.tolerance:
            count = reached(value)
            return Matched(problem.build(value), target, count, count / target - 1)
    raise _impossible(
        config, match, target, problem, reached, max(best, problem.step), at_lowest=crossing < problem.step
    )


@dataclass(frozen=True)
class _Problem:
    """One free setting: how a value of it makes a configuration, and which values there are."""

    build: Callable[[int], ModelConfig]
    step: int
    steps: tuple[int, ...]
    lowest: str
    granularity: str


def _mlp_width_problem(config: ModelConfig) -> _Problem:
    if config.mlp == "none":
        fix = "use `free: width` or `free: depth`, or give the model an MLP"
        raise UserError("match with `free: mlp_width` on a model without MLP", "a free setting that it has", fix)
    return _Problem(
        lambda value: _changed(config, mlp_width=value),
        1,
        STEPS,
        "mlp_width cannot be below 1, and everything but the MLPs is already larger than the target",
        "mlp_width is one whole number for all layers",
    )


def _width_problem(config: ModelConfig) -> _Problem:
    mixers = [config.mixer(letter) for letter in dict.fromkeys(config.layers())]
    step = math.lcm(*(mixer.width_step(settings) for mixer, settings in mixers))
    return _Problem(
        lambda value: _changed(config, width=value),
        step,
        STEPS,
        f"width cannot be below {step} (heads and head dimensions), and that is already larger than the target",
        f"width must be a multiple of {step} (heads and head dimensions)",
    )


def _depth_problem(config: ModelConfig) -> _Problem:
    return _Problem(
        lambda value: _changed(config, pattern=config.pattern if value == 1 else f"({config.pattern}){value}"),
        1,
        (1,),
        f"depth cannot be below one repeat of {config.pattern}, and that is already larger than the target",
        f"depth grows by whole repeats of {config.pattern}",
    )


_PROBLEMS: dict[str, Callable[[ModelConfig], _Problem]] = {
    "mlp_width": _mlp_width_problem,
    "width": _width_problem,
    "depth": _depth_problem,
}


def _crossing(reached: Callable[[int], int], target: int, step: int) -> int:
    """The largest multiple of `step` that does not exceed the target (0 if even the first does)."""
    low, high = 0, 1
    while reached(high * step) <= target:
        low, high = high, 2 * high
        if high * step > WIDEST:
            raise UserError(f"match to {target:,} parameters", f"what a width below {WIDEST:,} gives", "lower it")
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if reached(middle * step) <= target else (low, middle)
    return low * step


def _impossible(
    config: ModelConfig,
    match: MatchConfig,
    target: int,
    problem: _Problem,
    reached: Callable[[int], int],
    nearest: int,
    *,
    at_lowest: bool,
) -> UserError:
    count = reached(nearest)
    bound = problem.lowest if at_lowest else problem.granularity
    goal = f"{target:,} {match.quantity} within {match.tolerance:.2%}"
    given = f"pattern {config.pattern} cannot be matched to {goal}: {bound}"
    allowed = f"nearest in reach: {match.free} {nearest} with {count:,} ({count / target - 1:+.2%})"
    others = [free for free in _PROBLEMS if free != match.free and not (free == "mlp_width" and config.mlp == "none")]
    return UserError(given, allowed, f"set another target, a larger tolerance, or `free: {' or '.join(others)}`")


def _changed(config: ModelConfig, **update: object) -> ModelConfig:
    return type(config).parse({**config.model_dump(), **update}, "model")


def _blocks(config: ModelConfig) -> dict[str, Block]:
    with torch.device("meta"):
        return {letter: Block(config, letter) for letter in dict.fromkeys(config.layers())}


def _count(module: nn.Module | None) -> int:
    if module is None:
        return 0
    return sum(parameter.numel() for parameter in module.parameters())
