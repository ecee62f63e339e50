"""What a training run is set to; free of torch, so that a study file is read and checked in no time."""

from __future__ import annotations

import math
from typing import Literal, Self

from pydantic import Field, NonNegativeInt, PositiveInt, model_validator

from longspan.foundation.config import Config
from longspan.foundation.errors import UserError

Parallel = Literal["ddp", "fsdp"]
DEFAULT_MIN_LR_RATIO = 0.1
DEFAULT_DECAY = 0.1


class TrainingConfig(Config):
    """Settings of one training run.

    Attributes:
        context: positions per row.
        batch_tokens: positions per optimizer step, over all rows and micro-batches.
        accumulation: micro-batches per optimizer step; the gradient is that of the one big batch.
        tokens: trained positions in all, rounded up to whole steps (or give `steps`).
        steps: optimizer steps in all (or give `tokens`).
        peak_lr: learning rate after warm-up; at step 0 it is peak × 1/warm-up, never 0.
        min_lr_ratio: the floor that `cosine` and `wsd` fall to, as a share of the peak (default 0.1).
        warmup: linear warm-up; an integer counts steps, a fraction below 1 is a share of all steps.
        decay: `wsd` only: the linear decay at the end, in steps or as a share of all steps (default 0.1).
        clip: largest norm of the whole gradient; null leaves it as it is.
        dtype: `auto` is bf16 autocast with fp32 parameters on CUDA and fp32 everywhere else.
        evaluate_every: steps between evaluations on the whole validation split; the last step is always evaluated.
        patience: evaluations without improvement before stopping early; null never stops early.
        mastery: of a task: share of the fixed validation strings answered without a mistake (teacher-forced) that ends
            training; null never does.
        min_delta: how much lower a loss must be to count as an improvement for `patience` (never for `best`).
        checkpoint_every: steps between checkpoints; an improvement and the last step are always kept.
        log_every: steps between lines in `metrics.jsonl`; loss is the mean over them.
        compile: `torch.compile` the layers; `auto` does on CUDA with Triton, and not on a CPU, where it hardly pays for
            its start.
        graph: replay each micro-batch's kernels as one CUDA graph, so that a busy host cannot slow them: `auto` does
            on CUDA where no layer waits for the device, and says where it does not; `true` demands it. The results are
            the same, so it is no part of a run's identity.
        processes: processes that train one model together, each on a device of its own and with an equal share of every
            batch's rows. The update is that of one process, so this is no part of what identifies a run: it may be
            resumed with another number.
        parallel: `ddp` keeps the whole model on each device; `fsdp` keeps a part of every layer there, for models that
            do not fit. As little part of a run's identity.
    """

    context: PositiveInt
    batch_tokens: PositiveInt
    accumulation: PositiveInt = 1
    tokens: PositiveInt | None = None
    steps: PositiveInt | None = None
    optimizer: Literal["adamw"] = "adamw"
    peak_lr: float = Field(gt=0)
    schedule: Literal["cosine", "constant", "wsd"] = "cosine"
    min_lr_ratio: float | None = Field(default=None, ge=0, le=1)
    warmup: NonNegativeInt | float = 0.02
    decay: PositiveInt | float | None = None
    weight_decay: float = Field(default=0.1, ge=0)
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = Field(default=1e-8, gt=0)
    clip: float | None = Field(default=1.0, gt=0)
    dtype: Literal["auto", "fp32", "bf16"] = "auto"
    evaluate_every: PositiveInt = 200
    patience: PositiveInt | None = None
    mastery: float | None = Field(default=None, gt=0, le=1)
    min_delta: float = Field(default=0.0, ge=0)
    checkpoint_every: PositiveInt = 200
    log_every: PositiveInt = 10
    seed: NonNegativeInt = 0
    compile: bool | Literal["auto"] = "auto"
    graph: bool | Literal["auto"] = Field(default="auto", exclude=True)
    processes: PositiveInt = Field(default=1, exclude=True)
    parallel: Parallel = Field(default="ddp", exclude=True)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.tokens is None) == (self.steps is None):
            given = "neither `tokens` nor `steps`" if self.tokens is None else "both `tokens` and `steps`"
            raise UserError(
                given, "exactly one of the two", "say how long to train in one of them; `null` takes the other away"
            )
        self.check_shares(self.processes)
        _check_share("warmup", self.warmup)
        _check_share("decay", self.decay)
        if not all(0 <= beta < 1 for beta in self.betas):
            raise UserError(f"betas = {self.betas}", "two numbers in [0, 1)", "use the usual [0.9, 0.95]")
        if self.warmup_steps + self.decay_steps > self.num_steps:
            raise UserError(
                f"warm-up of {self.warmup_steps} and decay of {self.decay_steps} steps in a run of {self.num_steps}",
                "no more steps than the run has",
                "shorten `warmup` or `decay`, or train longer",
            )
        self._check_unused()
        return self

    def check_shares(self, processes: int) -> None:
        """Refuse a batch that is not a whole number of rows for each of so many processes.

        Raises:
            UserError: with the nearest batch that is.
        """
        factors = {"context": self.context, "accumulation": self.accumulation}
        factors |= {"processes": processes} if processes > 1 else {}
        unit = math.prod(factors.values())
        if self.batch_tokens % unit:
            near = max(1, round(self.batch_tokens / unit)) * unit
            raise UserError(
                f"batch_tokens = {self.batch_tokens}",
                f"a multiple of {' × '.join(factors)} = {' × '.join(map(str, factors.values()))} = {unit}",
                f"set batch_tokens to {near}",
            )

    def _check_unused(self) -> None:
        for name, value, needed, used in (
            ("decay", self.decay, "schedule: wsd", self.schedule == "wsd"),
            ("min_lr_ratio", self.min_lr_ratio, "schedule: cosine or wsd", self.schedule != "constant"),
            ("min_delta", self.min_delta or None, "patience", self.patience is not None),
        ):
            if value is not None and not used:
                raise UserError(
                    f"{name} = {value} has no effect here", f"it together with {needed}", f"remove `{name}`"
                )

    @property
    def num_steps(self) -> int:
        """Optimizer steps of the whole run."""
        return self.steps if self.steps is not None else -(-(self.tokens or 0) // self.batch_tokens)

    @property
    def rows(self) -> int:
        """Rows of one micro-batch: what a batch iterator must deliver, (rows, context)."""
        return self.batch_tokens // (self.context * self.accumulation)

    @property
    def warmup_steps(self) -> int:
        """Steps of linear warm-up."""
        return _steps(self.warmup, self.num_steps)

    @property
    def decay_steps(self) -> int:
        """Steps of the final decay of `wsd`; 0 for the other schedules."""
        if self.schedule != "wsd":
            return 0
        return _steps(DEFAULT_DECAY if self.decay is None else self.decay, self.num_steps)

    @property
    def min_lr(self) -> float:
        """Where the schedule ends."""
        if self.schedule == "constant":
            return self.peak_lr
        return self.peak_lr * (DEFAULT_MIN_LR_RATIO if self.min_lr_ratio is None else self.min_lr_ratio)


def _check_share(name: str, value: float | None) -> None:
    if isinstance(value, float) and not 0 <= value < 1:
        raise UserError(f"{name} = {value}", "a share in [0, 1) or a whole number of steps", f"change `{name}`")


def _steps(value: float, total: int) -> int:
    if isinstance(value, int):
        return value
    return max(1, round(value * total)) if value else 0
