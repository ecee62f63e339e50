"""A task of one's own: say a string backwards."""

from __future__ import annotations

import numpy as np

from longspan.corpus.tasks import Example, register
from longspan.corpus.tasks.strings import BAR, BOS, EOS, LettersTask


@register("reverse")
class Reverse(LettersTask):
    """`$x|y.` where y is x backwards; letters, lengths and curriculum are those of `copy`."""

    def example(self, generator: np.random.Generator, size: int) -> Example:
        """A string of `size` letters and its reverse."""
        string = self.letters(generator, size)
        tokens = self.written(BOS, string, BAR, string[::-1], EOS)
        return Example.of_text(tokens, size + 2, length=size)

    def span(self, size: int) -> int:
        """Both strings and three signs."""
        return 2 * size + 3
