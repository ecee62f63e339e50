"""`prefix_ngram`: told what to look for before the string, say what follows it there."""

from __future__ import annotations

import numpy as np

from longspan.corpus.tasks.base import Example, register
from longspan.corpus.tasks.strings import BAR, BOS, EOS, NgramTask


@register("prefix_ngram")
class PrefixNgram(NgramTask):
    """`$g|x|y.`: the n-gram g occurs once in x, y is what follows it (Jelassi et al. 2024)."""

    def example(self, generator: np.random.Generator, size: int) -> Example:
        """A string of `size` letters."""
        string, start, n = self.draw_query(generator, size)
        answer = self.answer_of(string, start, n)
        tokens = self.written(BOS, string[start : start + n], BAR, string, BAR, answer, EOS)
        return Example.of_text(tokens, len(tokens) - len(answer) - 1, length=size, ngram=n, answer=len(answer))

    def span(self, size: int) -> int:
        """Query and answer together are no longer than the string."""
        return 2 * size + 4
