"""`induction`: what followed the special token the last time?"""

from __future__ import annotations

from typing import ClassVar, Self

import numpy as np
from pydantic import Field, model_validator

from longspan.corpus.packing.batches import IGNORE
from longspan.corpus.tasks.base import Example, Task, Vocabulary, check_range, register


@register("induction")
class Induction(Task):
    """Random tokens with one special token `!` among them and again at the end: say what followed it (Gu and Dao 2023).

    Attributes:
        vocab_size: ordinary tokens.
        min_length, max_length: of a row, the last `!` included; published: 256.
    """

    marked: ClassVar[bool] = False

    vocab_size: int = Field(16, ge=2)
    min_length: int = Field(256, ge=4)
    max_length: int = Field(256, ge=4)

    @model_validator(mode="after")
    def _some_length(self) -> Self:
        check_range("length", self.min_length, self.max_length)
        return self

    def vocabulary(self) -> Vocabulary:
        """Ordinary tokens, `!`, and two ids that no row holds but for padding."""
        symbols = (*(f"t{i}" for i in range(self.vocab_size)), "!", "$", "*")
        return Vocabulary(symbols, self.vocab_size + 1, self.vocab_size + 2, " ")

    def sizes(self) -> tuple[int, ...]:
        """Every length of the range."""
        return tuple(range(self.min_length, self.max_length + 1))

    def example(self, generator: np.random.Generator, size: int) -> Example:
        """A row of `size` tokens; the first `!` stands anywhere but in the last three places."""
        inputs = generator.integers(self.vocab_size, size=size, dtype=np.int32)
        place = int(generator.integers(size - 2))
        inputs[place] = inputs[-1] = self.vocab_size
        labels = np.full(size, IGNORE, np.int32)
        labels[-1] = inputs[place + 1]
        return Example(inputs, labels, {"length": size, "distance": size - 1 - place})

    def span(self, size: int) -> int:
        """The row."""
        return size

    def bits(self, size: int) -> float:
        """One token."""
        return float(np.log2(self.vocab_size))
