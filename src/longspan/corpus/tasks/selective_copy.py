"""`selective_copy`: remember the tokens that matter, scattered among others that do not."""

from __future__ import annotations

from typing import ClassVar, Self

import numpy as np
from pydantic import Field, model_validator

from longspan.corpus.packing.batches import IGNORE
from longspan.corpus.tasks.base import Example, Task, Vocabulary, check_range, register
from longspan.foundation.errors import UserError


@register("selective_copy")
class SelectiveCopy(Task):
    """`tokens` data tokens at random places among blanks `_`, then as many `?`, where they are said in order.

    Gu and Dao (2023, section 4.1), after Arjovsky et al. (2016): 16 tokens among 4,096 places, 16 data ids.

    Attributes:
        vocab_size: data ids.
        tokens: data tokens to remember.
        min_length, max_length: places before the questions.
    """

    marked: ClassVar[bool] = False

    vocab_size: int = Field(16, ge=2)
    tokens: int = Field(16, ge=1)
    min_length: int = Field(4096, ge=1)
    max_length: int = Field(4096, ge=1)

    @model_validator(mode="after")
    def _some_length(self) -> Self:
        check_range("length", self.min_length, self.max_length)
        if self.min_length < self.tokens:
            raise UserError(
                f"{self.tokens} tokens among {self.min_length} places",
                "no more tokens than places",
                "lower `tokens`, or raise `min_length`",
            )
        return self

    def vocabulary(self) -> Vocabulary:
        """Data ids, `_`, `?`, and two ids that no row holds but for padding."""
        symbols = (*(f"t{i}" for i in range(self.vocab_size)), "_", "?", "$", "*")
        return Vocabulary(symbols, self.vocab_size + 2, self.vocab_size + 3, " ")

    def sizes(self) -> tuple[int, ...]:
        """Every length of the range."""
        return tuple(range(self.min_length, self.max_length + 1))

    def example(self, generator: np.random.Generator, size: int) -> Example:
        """A row with `size` places before the questions."""
        data = generator.integers(self.vocab_size, size=self.tokens, dtype=np.int32)
        inputs = np.full(size + self.tokens, self.vocab_size, np.int32)
        inputs[np.sort(generator.choice(size, self.tokens, replace=False))] = data
        inputs[size:] = self.vocab_size + 1
        labels = np.full(len(inputs), IGNORE, np.int32)
        labels[size:] = data
        return Example(inputs, labels, {"length": size})

    def span(self, size: int) -> int:
        """Places and questions."""
        return size + self.tokens

    def bits(self, size: int) -> float:
        """The entropy of the data tokens."""
        return float(self.tokens * np.log2(self.vocab_size))
