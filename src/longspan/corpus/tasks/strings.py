"""What the tasks on strings of letters share: the published alphabet, lengths, and n-grams that occur once.

`$` begins a string, `|` separates its parts, `.` ends it, `*` pads (Jelassi et al. 2024, "Repeat After Me").
"""

from __future__ import annotations

from typing import Self

import numpy as np
from pydantic import Field, model_validator

from longspan.corpus.tasks.base import Task, Vocabulary, check_range
from longspan.corpus.tasks.curriculum import Curriculum
from longspan.foundation.errors import UserError

ALPHABET = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"
BOS, BAR, EOS, PAD = range(4)
"""Places of the four signs after the letters."""
TRIES = 100
"""Strings drawn before one with an n-gram that occurs once counts as impossible."""


class LettersTask(Task):
    """Strings of letters drawn independently and evenly, as long as training draws.

    Attributes:
        vocab_size: letters; the four signs come after them.
        min_length, max_length: of a training string, both included, all lengths equally often.
        curriculum: how that changes while training goes on; None: not at all.
    """

    vocab_size: int = 26
    min_length: int = Field(5, ge=1)
    max_length: int = Field(20, ge=1)
    curriculum: Curriculum | None = None

    @model_validator(mode="after")
    def _some_length(self) -> Self:
        check_range("length", self.min_length, self.max_length)
        if not 2 <= self.vocab_size <= len(ALPHABET):
            raise UserError(
                f"vocab_size = {self.vocab_size} letters for {self.task}",
                f"2 to {len(ALPHABET)} letters (the four signs are not counted)",
                "set `vocab_size` to one of these; 26 is the published number",
            )
        if self.curriculum:
            self.curriculum.check("length", self.min_length, self.max_length)
        return self

    def vocabulary(self) -> Vocabulary:
        """Letters, then `$`, `|`, `.` and `*`."""
        signs = ("$", "|", ".", "*")
        return Vocabulary((*ALPHABET[: self.vocab_size], *signs), self.sign(BOS), self.sign(PAD), end=self.sign(EOS))

    def sign(self, place: int) -> int:
        """The id of a sign."""
        return self.vocab_size + place

    def sizes(self) -> tuple[int, ...]:
        """Every length of the range."""
        return tuple(range(self.min_length, self.max_length + 1))

    def draw_size(self, generator: np.random.Generator, step: int | None) -> int:
        """An even draw from the range, or what the curriculum makes of it."""
        longest = self.max_length
        if self.curriculum is not None and step is not None:
            longest = self.curriculum.largest(generator, step, longest)
        return int(generator.integers(self.min_length, longest + 1))

    def letters(self, generator: np.random.Generator, length: int) -> np.ndarray:
        """`length` letters."""
        return generator.integers(self.vocab_size, size=length, dtype=np.int32)

    def written(self, *parts: np.ndarray | int) -> np.ndarray:
        """Letters and signs (by their place) one after another, int32."""
        return np.concatenate([np.array([self.sign(p)]) if isinstance(p, int) else p for p in parts]).astype(np.int32)


class NgramTask(LettersTask):
    """A query n-gram that occurs once in the string, and what follows it.

    Attributes:
        ngram: n, or the lowest and highest n, drawn for each string.
        length_answer: letters of the answer at most; None: all that follow.
    """

    ngram: int | tuple[int, int] = 2
    length_answer: int | None = Field(None, ge=1)

    @model_validator(mode="after")
    def _some_ngram(self) -> Self:
        low, high = self.ngrams
        if low < 1:
            raise UserError(f"ngram = {self.ngram}", "1 or more letters", "raise it")
        check_range("ngram", low, high)
        if high >= self.min_length:
            raise UserError(
                f"ngram = {self.ngram} in strings from {self.min_length} letters on",
                f"at most {self.min_length - 1}, so that a letter follows it",
                "lower ngram, or raise min_length",
            )
        return self

    @property
    def ngrams(self) -> tuple[int, int]:
        """The lowest and the highest n."""
        return (self.ngram, self.ngram) if isinstance(self.ngram, int) else self.ngram

    def draw_query(self, generator: np.random.Generator, length: int) -> tuple[np.ndarray, int, int]:
        """A string, where in it the query begins, and n: one of the n-grams that occur once and have a successor.

        Raises:
            UserError: no string of this length seems to hold one.
        """
        low, high = self.ngrams
        n = int(generator.integers(low, high + 1))
        for _ in range(TRIES):
            string = self.letters(generator, length)
            places = once(string, n)
            if len(places):
                return string, int(places[generator.integers(len(places))]), n
        raise UserError(
            f"none of {TRIES} strings of {length} letters out of {self.vocab_size} holds a {n}-gram that occurs once "
            "and is not its end",
            "a query that names one place of the string",
            "raise `ngram` or `vocab_size`, or lower the length",
        )

    def answer_of(self, string: np.ndarray, start: int, n: int) -> np.ndarray:
        """The letters that follow the query."""
        return string[start + n :][: self.length_answer]


def once(string: np.ndarray, n: int) -> np.ndarray:
    """Starts of the n-grams that occur once in `string` and do not end it."""
    grams = np.lib.stride_tricks.sliding_window_view(string, n) if len(string) > n else np.empty((0, n))
    if not len(grams):
        return np.empty(0, np.int64)
    _, first, counts = np.unique(grams, axis=0, return_index=True, return_counts=True)
    starts = np.sort(first[counts == 1])
    return starts[starts < len(string) - n]
