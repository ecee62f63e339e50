"""Makes subjects equal in one cost by solving one free setting.

The costs are parameters, and training FLOPs or decode bytes per token.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Literal, Self

import torch
from pydantic import Field, model_validator

from longspan.foundation.config import Config
from longspan.foundation.errors import UserError
from longspan.models.budget import count_parameters, decode_bytes_per_token, training_flops_per_token
from longspan.models.config import ModelConfig
from longspan.models.pattern import MOST_LAYERS

Quantity = Literal["parameters", "non_embedding_parameters", "training_flops_per_token", "decode_bytes_per_token"]
AT_CONTEXT = ("training_flops_per_token", "decode_bytes_per_token")
STEPS = (64, 32, 16, 8, 4, 2, 1)
WIDEST = 1 << 20
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


class MatchConfig(Config):
    """What subjects share, and what may change to get there. Exactly one target is given.

    A target is a number, or a pattern, whose model (at the other settings as given) sets it.

    Attributes:
        parameters: the target for all parameters.
        non_embedding_parameters: for the parameters without embedding and head.
        training_flops_per_token: for forward and backward per token at `context`, see
            `budget.training_flops_per_token`.
        decode_bytes_per_token: for the bytes moved to decode one token after `context` tokens, see
            `budget.decode_bytes_per_token`.
        context: where the last two are counted; None: the training context.
        dtype: of the weights and caches that are decoded with.
        free: `mlp_width`, `width`, or `depth` (the pattern is repeated as a whole).
        step: what the free width must be a multiple of, beside what heads demand; large multiples are tried first.
        tolerance: largest |reached / target - 1|.
    """

    parameters: int | str | None = None
    non_embedding_parameters: int | str | None = None
    training_flops_per_token: float | str | None = None
    decode_bytes_per_token: int | str | None = None
    context: int | None = Field(None, ge=1)
    dtype: Literal["bf16", "fp32"] = "bf16"
    free: Literal["mlp_width", "width", "depth"] = "mlp_width"
    step: int = Field(1, ge=1, le=WIDEST)
    tolerance: float = Field(0.005, gt=0, lt=1)

    @model_validator(mode="after")
    def _check(self) -> Self:
        given = [name for name in QUANTITIES if getattr(self, name) is not None]
        if len(given) != 1:
            what = f"the targets {' and '.join(given)}" if given else "no target"
            allowed = f"exactly one of {', '.join(QUANTITIES)}"
            raise UserError(f"match with {what}", allowed, "e.g. {non_embedding_parameters: AAAA, free: mlp_width}")
        target = self.target
        if not isinstance(target, str) and target <= 0:
            raise UserError(f"{self.quantity} = {target}", "a positive number or a pattern", "raise it")
        if self.context is not None and self.quantity not in AT_CONTEXT:
            allowed = f"a context with {' or '.join(AT_CONTEXT)}"
            raise UserError(f"match of {self.quantity} with `context`", allowed, "remove it: parameters have none")
        if self.dtype != "bf16" and self.quantity != "decode_bytes_per_token":
            allowed = "a dtype with decode_bytes_per_token"
            raise UserError(f"match of {self.quantity} with `dtype`", allowed, "remove it: only bytes depend on it")
        if self.step > 1 and self.free == "depth":
            raise UserError(f"step = {self.step} with `free: depth`", "a step with a free width", "remove it")
        return self

    @property
    def quantity(self) -> Quantity:
        """What is matched."""
        return next(name for name in QUANTITIES if getattr(self, name) is not None)

    @property
    def target(self) -> float | str:
        """The number or reference pattern."""
        target: float | str = getattr(self, self.quantity)
        return target


@dataclass(frozen=True)
class _Measured:
    """One cost of a configuration, at the settings of a match."""

    match: MatchConfig
    vocab_size: int
    context: int

    def __call__(self, config: ModelConfig) -> float:
        return QUANTITIES[self.match.quantity](self, config)

    @property
    def shown(self) -> str:
        """The quantity as errors name it."""
        where = f" at context {self.context:,}" if self.match.quantity in AT_CONTEXT else ""
        return f"{self.match.quantity}{where}"


QUANTITIES: dict[Quantity, Callable[[_Measured, ModelConfig], float]] = {
    "parameters": lambda at, config: count_parameters(config, at.vocab_size).total,
    "non_embedding_parameters": lambda at, config: count_parameters(config, at.vocab_size).non_embedding,
    "training_flops_per_token": lambda at, config: training_flops_per_token(config, at.vocab_size, at.context),
    "decode_bytes_per_token": lambda at, config: decode_bytes_per_token(
        config, at.vocab_size, at.context, DTYPES[at.match.dtype]
    ),
}


@dataclass(frozen=True)
class Matched:
    """A solved match: the configuration, what it aimed at, what it reached, and reached / target - 1."""

    config: ModelConfig
    target: float
    reached: float
    residual: float


def match(config: ModelConfig, match: MatchConfig, vocab_size: int, training_context: int | None = None) -> Matched:
    """Solve the free setting.

    A configuration that has exactly the target is left as it is; otherwise a free width becomes a multiple of the
    largest of 64, 32, .., 1 (and of `step`) that meets the tolerance, times what heads and head dimensions demand.

    Args:
        config: the subject; everything but the free setting stays.
        match: what to reach.
        vocab_size: rows of the embedding.
        training_context: where costs per token are counted if the match names no context.

    Raises:
        UserError: nothing meets the tolerance; names the bound that stopped it and the nearest value in reach.
    """
    context = match.context or training_context
    if context is None:
        if match.quantity in AT_CONTEXT:
            raise UserError(f"match of {match.quantity} without a context", "a number of tokens", "add `context:`")
        context = 1
    measured = _Measured(match, vocab_size, context)
    target = match.target if not isinstance(match.target, str) else _of_reference(config, measured, match.target)
    now = measured(config)
    if now == target:
        return Matched(config, target, now, 0.0)
    problem = _PROBLEMS[match.free](config)

    @cache
    def reached(value: int) -> float:
        return measured(problem.build(value))

    finest = math.lcm(problem.step, match.step)
    crossing = _crossing(reached, target, finest, problem.most)
    for step in dict.fromkeys(math.lcm(step, finest) for step in problem.coarse):
        near = _nearest(reached, target, crossing // step * step, step, problem.most)
        if near is not None and abs(reached(near) / target - 1) <= match.tolerance:
            return Matched(problem.build(near), target, reached(near), reached(near) / target - 1)
    nearest = _nearest(reached, target, crossing, finest, problem.most)
    raise _impossible(config, measured, target, problem, finest, nearest, reached)


@dataclass(frozen=True)
class _Problem:
    """One free setting: how a value of it makes a configuration, and which values there are.

    Attributes:
        build: value -> configuration.
        step: values are multiples of this, because of `step_because`.
        coarse: of multiples of these (and of `step`), the largest that is good enough is taken.
        most: the largest value.
        rest: what the lowest value still leaves, for errors.
    """

    build: Callable[[int], ModelConfig]
    step: int
    step_because: str
    coarse: tuple[int, ...]
    most: int
    rest: str


def _mlp_width_problem(config: ModelConfig) -> _Problem:
    if config.mlp == "none":
        fix = "use `free: width` or `free: depth`, or give the model an MLP"
        raise UserError("match with `free: mlp_width` on a model without MLP", "a free setting that it has", fix)
    return _Problem(
        lambda value: _changed(config, mlp_width=value),
        1,
        "one for all layers",
        STEPS,
        WIDEST,
        "everything but the MLPs",
    )


def _width_problem(config: ModelConfig) -> _Problem:
    mixers = [config.mixer(layer) for layer in dict.fromkeys(config.layers())]
    step = math.lcm(*(mixer.width_step(settings) for mixer, settings in mixers))
    because = "heads and head dimensions"
    return _Problem(lambda value: _changed(config, width=value), step, because, STEPS, WIDEST, "that narrow model")


def _depth_problem(config: ModelConfig) -> _Problem:
    pattern = config.pattern
    return _Problem(
        lambda value: _changed(config, pattern=pattern if value == 1 else f"({pattern}){value}"),
        1,
        f"repeats of {pattern}",
        (1,),
        MOST_LAYERS // len(config.layers()),
        f"one repeat of {pattern}",
    )


_PROBLEMS: dict[str, Callable[[ModelConfig], _Problem]] = {
    "mlp_width": _mlp_width_problem,
    "width": _width_problem,
    "depth": _depth_problem,
}


def _of_reference(config: ModelConfig, measured: _Measured, pattern: str) -> float:
    try:
        return measured(_changed(config, pattern=pattern))
    except UserError as error:
        raise UserError(f"match.{measured.match.quantity}: {error.given}", error.allowed, error.fix) from None


def _crossing(reached: Callable[[int], float], target: float, step: int, most: int) -> int:
    """The largest multiple of `step`, up to `most`, that does not exceed the target (0 if even the first does)."""
    low, high = 0, 1
    while high * step <= most and reached(high * step) <= target:
        low, high = high, 2 * high
    high = min(high, most // step + 1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if reached(middle * step) <= target else (low, middle)
    return low * step


def _nearest(reached: Callable[[int], float], target: float, below: int, step: int, most: int) -> int | None:
    """`below` or the multiple of `step` after it, whichever comes nearer to the target; None if neither exists."""
    values = [value for value in (below, below + step) if 0 < value <= most]
    return min(values, key=lambda value: abs(reached(value) - target), default=None)


def _impossible(
    config: ModelConfig,
    measured: _Measured,
    target: float,
    problem: _Problem,
    finest: int,
    nearest: int | None,
    reached: Callable[[int], float],
) -> UserError:
    match = measured.match
    free = match.free
    others = [each for each in _PROBLEMS if each != free and not (each == "mlp_width" and config.mlp == "none")]
    goal = f"{target:,.0f} {measured.shown} within {100 * match.tolerance:.2f} %"
    fix = f"set another target, a larger tolerance, or `free: {' or '.join(others)}`"
    because = problem.step_because if finest == problem.step else f"{problem.step_because}, step {match.step}"
    if nearest is None:
        bound = f"{free} must be a multiple of {finest} ({because}) up to {problem.most:,}: there is none"
        return UserError(f"pattern {config.pattern} cannot be matched to {goal}: {bound}", f"a smaller `{free}`", fix)
    count = reached(nearest)
    if nearest == finest and count > target:
        bound = f"{free} cannot be below {finest} ({because}), and {problem.rest} already exceeds the target"
    elif nearest + finest > problem.most and count < target:
        bound = f"{free} cannot be above {nearest:,} ({because})"
    else:
        bound = f"{free} grows in steps of {finest} ({because}), too coarse for that"
    reach = f"nearest in reach: {free} {nearest:,} with {count:,.0f} ({_off(count, target)})"
    return UserError(f"pattern {config.pattern} cannot be matched to {goal}: {bound}", reach, fix)


def _off(count: float, target: float) -> str:
    """How far a count is from its target, as a person says it."""
    ratio = count / target
    if ratio >= 10:
        return f"{ratio:,.0f} times the target"
    return f"{ratio:.1f} times the target" if ratio >= 2 else f"{100 * (ratio - 1):+.2f} %"


def _changed(config: ModelConfig, **update: object) -> ModelConfig:
    return type(config).parse({**config.model_dump(), **update}, "model")
