"""`duplicate_ngram`: copy a string in which an n-gram stands twice, so that looking it up is ambiguous."""

from __future__ import annotations

from typing import ClassVar, Self

import numpy as np
from pydantic import Field, model_validator

from longspan.corpus.tasks.base import Example, register
from longspan.corpus.tasks.strings import BAR, BOS, EOS, LettersTask
from longspan.foundation.errors import UserError


@register("duplicate_ngram")
class DuplicateNgram(LettersTask):
    """`$x|x.` where one n-gram of x was overwritten by another of its n-grams (Jelassi et al. 2024; for asking only).

    Attributes:
        ngram: n.
    """

    trainable: ClassVar[bool] = False

    ngram: int = Field(2, ge=1)

    @model_validator(mode="after")
    def _two_fit(self) -> Self:
        if 2 * self.ngram > self.min_length:
            raise UserError(
                f"two {self.ngram}-grams in strings from {self.min_length} letters on",
                f"min_length of at least {2 * self.ngram}",
                "lower `ngram`, or raise `min_length`",
            )
        return self

    def example(self, generator: np.random.Generator, size: int) -> Example:
        """A string of `size` letters; the two places do not overlap."""
        string, n = self.letters(generator, size), self.ngram
        # Two starts at least n apart: drawn as places in a string without the n - 1 letters that must lie between.
        low, high = np.sort(generator.choice(size - 2 * n + 2, 2, replace=False))
        source, target = generator.permutation([low, high + n - 1])
        string[target : target + n] = string[source : source + n]
        return Example.of_text(self.written(BOS, string, BAR, string, EOS), size + 2, length=size, ngram=n)

    def span(self, size: int) -> int:
        """Both strings and three signs."""
        return 2 * size + 3
