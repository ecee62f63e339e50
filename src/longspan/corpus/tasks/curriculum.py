"""A curriculum: small examples first, or more often."""

from __future__ import annotations

from typing import Literal, Self

import numpy as np
from pydantic import Field, model_validator

from longspan.foundation.config import Config
from longspan.foundation.errors import UserError


class Curriculum(Config):
    """How sizes (lengths, numbers of pairs) are drawn while training goes on.

    Attributes:
        kind: `grow`: the largest size rises evenly from `short` to the task's largest over the first `steps` steps.
            `mix`: a share of the strings is at most of size `short`, the others are drawn from the whole range.
        short: a size, between the task's smallest and largest.
        steps: of `grow`.
        share: of `mix`.
    """

    kind: Literal["grow", "mix"]
    short: int = Field(ge=1)
    steps: int | None = Field(None, ge=1)
    share: float | None = Field(None, gt=0, lt=1)

    @model_validator(mode="after")
    def _of_its_kind(self) -> Self:
        needed, other = ("steps", "share") if self.kind == "grow" else ("share", "steps")
        if getattr(self, needed) is None:
            raise UserError(f"a curriculum of kind `{self.kind}` without `{needed}`", f"`{needed}`", "add it")
        if getattr(self, other) is not None:
            raise UserError(f"`{other}` with a curriculum of kind `{self.kind}`", f"`{needed}`", f"remove `{other}`")
        return self

    def check(self, axis: str, low: int, high: int) -> None:
        """Refuse a `short` outside of the sizes of the task.

        Raises:
            UserError: naming them.
        """
        if not low <= self.short <= high:
            raise UserError(f"curriculum.short = {self.short}", f"a number of {axis} from {low} to {high}", "change it")

    def largest(self, generator: np.random.Generator, step: int, largest: int) -> int:
        """The largest size that the next string may have.

        Args:
            generator: of the batch.
            step: of training.
            largest: of the task.
        """
        if self.kind == "grow":
            assert self.steps is not None
            return round(self.short + (largest - self.short) * min(1.0, step / self.steps))
        return self.short if generator.random() < (self.share or 0.0) else largest
