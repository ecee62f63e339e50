"""`copy`: say a string again."""

from __future__ import annotations

import numpy as np

from longspan.corpus.tasks.base import Example, register
from longspan.corpus.tasks.strings import BAR, BOS, EOS, LettersTask


@register("copy")
class Copy(LettersTask):
    """`$x|x.` with the second x and its end as the answer (Jelassi et al. 2024)."""

    def example(self, generator: np.random.Generator, size: int) -> Example:
        """A string of `size` letters, twice."""
        string = self.letters(generator, size)
        return Example.of_text(self.written(BOS, string, BAR, string, EOS), size + 2, length=size)

    def span(self, size: int) -> int:
        """Both strings and three signs."""
        return 2 * size + 3

    def bits(self, size: int) -> float:
        """The entropy of the string."""
        return float(size * np.log2(self.vocab_size))
