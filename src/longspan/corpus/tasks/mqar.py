"""`mqar`: multi-query associative recall; which value stood beside this key?"""

from __future__ import annotations

import math
from typing import ClassVar, Literal, Self

import numpy as np
from pydantic import Field, model_validator

from longspan.corpus.packing.batches import IGNORE
from longspan.corpus.tasks.base import Example, Task, Vocabulary, register
from longspan.corpus.tasks.ceiling import most_right
from longspan.corpus.tasks.curriculum import Curriculum
from longspan.foundation.errors import UserError


@register("mqar")
class Mqar(Task):
    """`k1 v1 k2 v2 …`, then every key once more at an even place, where its value is to be said (Arora et al. 2024).

    Keys are 1 to V/2 - 1, values V/2 to V - 1, distinct within a row. The gap to the question is drawn without
    replacement with probability proportional to a·i^(a-1). What is neither pair nor question is 0, or, with `filler`,
    drawn from ids that are nothing else: a filler that repeats a key with another successor would be a wrong example.

    Attributes:
        vocab_size: V, 0, keys and values; `filler` and two unused ids come on top.
        length: positions of a row.
        pairs: numbers of pairs, drawn for each row.
        balance: `rows`: every number of pairs is drawn equally often. `questions`: the fewer pairs the more often, so
            that rows of every number ask as many questions in all, and loss is not mostly about the fullest ones.
        border: positions before the questions, in every row: the pairs end there, and what is before them is no pair.
            None: the pairs begin the row, and the questions follow them.
        distinct: no value stands twice in a row, as published; false: each is drawn by itself, so that the values of n
            pairs are exactly n·log2(V/2) bits.
        power_a: a.
        filler: ids for what is no pair and no question; 0: it is all 0, as published.
        curriculum: how the numbers of pairs change while training goes on; None: not at all.
    """

    axis: ClassVar[str] = "pairs"
    marked: ClassVar[bool] = False

    vocab_size: int = Field(8192, ge=4)
    length: int = Field(64, ge=4)
    pairs: tuple[int, ...] = (4,)
    balance: Literal["rows", "questions"] = "rows"
    border: int | None = Field(None, ge=2)
    distinct: bool = True
    power_a: float = Field(0.01, gt=0)
    filler: int = Field(0, ge=0)
    curriculum: Curriculum | None = None

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if not self.pairs or min(self.pairs) < 1:
            raise UserError(
                f"pairs = {list(self.pairs)}",
                "one or more numbers of pairs, each at least 1",
                "give `pairs` as a list, e.g. [4, 8]",
            )
        if self.length % 2:
            raise UserError(f"length = {self.length}", "an even number of positions", f"use {self.length + 1}")
        if self.vocab_size % 2 or (self.distinct and self.vocab_size <= self.length):
            even = self.length + 2 - self.length % 2
            raise UserError(
                f"vocab_size = {self.vocab_size} for rows of {self.length}",
                "an even number above the length" if self.distinct else "an even number",
                f"use {even} or more, or shorter rows" if self.distinct else f"use {self.vocab_size + 1}",
            )
        if self.border is not None and (self.border % 2 or self.border >= self.length):
            raise UserError(
                f"border = {self.border} in rows of {self.length}",
                "an even number below the length",
                f"use {self.length // 2}, half of the row",
            )
        self._check_pairs(max(self.pairs))
        if self.curriculum:
            self.curriculum.check("pairs", min(self.pairs), max(self.pairs))
        return self

    def _check_pairs(self, pairs: int) -> None:
        if 4 * pairs > self.length:
            raise UserError(
                f"{pairs} pairs in {self.length} positions",
                f"4 x pairs <= length: at most {self.length // 4} pairs here",
                f"raise `length` to {4 * pairs}, or ask for fewer pairs",
            )
        if self.border is not None and 2 * pairs > (room := min(self.border, self.length - self.border)):
            raise UserError(
                f"{pairs} pairs with the border at {self.border} of {self.length} positions",
                f"2 x pairs positions on both sides of it: at most {room // 2} pairs here",
                "put `border` at half of `length`, or ask for fewer pairs",
            )
        if pairs > self.vocab_size // 2 - 1:
            raise UserError(
                f"{pairs} pairs with {self.vocab_size // 2 - 1} keys", "no more pairs than keys", "raise `vocab_size`"
            )

    def vocabulary(self) -> Vocabulary:
        """`0`, keys, values, fillers, and two ids that no row holds but for padding."""
        half = self.vocab_size // 2
        keys, values = (f"k{i}" for i in range(1, half)), (f"v{i}" for i in range(half))
        symbols = ("0", *keys, *values, *(f"f{i}" for i in range(self.filler)), "$", "*")
        return Vocabulary(symbols, len(symbols) - 2, len(symbols) - 1, " ")

    def sizes(self) -> tuple[int, ...]:
        """The numbers of pairs."""
        return tuple(sorted(set(self.pairs)))

    def draw_size(self, generator: np.random.Generator, step: int | None) -> int:
        """Any of the numbers of pairs, or of those that the curriculum lets through; how often says `balance`."""
        sizes = self.sizes()
        if self.curriculum is not None and step is not None:
            largest = self.curriculum.largest(generator, step, sizes[-1])
            sizes = tuple(size for size in sizes if size <= largest)
        if self.balance == "rows":
            return sizes[int(generator.integers(len(sizes)))]
        shares = 1.0 / np.array(sizes)
        return int(generator.choice(sizes, p=shares / shares.sum()))

    def example(self, generator: np.random.Generator, size: int) -> Example:
        """A row with `size` pairs."""
        self._check_pairs(size)
        half, context = self.vocab_size // 2, self.border or 2 * size
        first = context - 2 * size
        keys = generator.choice(half - 1, size, replace=False).astype(np.int32) + 1
        values = generator.choice(half, size, replace=not self.distinct).astype(np.int32) + half
        room = (self.length - context) // 2
        shares = self.power_a * np.arange(1, room + 1) ** (self.power_a - 1)
        gaps = generator.choice(room, size, replace=False, p=shares / shares.sum())
        inputs = np.zeros(self.length, np.int32)
        if self.filler:
            inputs[:] = self.vocab_size + generator.integers(self.filler, size=self.length)
        inputs[first:context:2], inputs[first + 1 : context : 2] = keys, values
        inputs[context + 2 * gaps] = keys
        labels = np.full(self.length, IGNORE, np.int32)
        labels[context + 2 * gaps] = values
        return Example(inputs, labels, {"pairs": size, "length": self.length})

    def span(self, size: int) -> int:
        """Every row is `length` long."""
        return self.length

    def handover(self) -> int | None:
        """The border."""
        return self.border

    def bits(self, size: int) -> float:
        """What must be remembered of the pairs: a value for each key, n·log2(V/2), or less where they are distinct."""
        return float(size * np.log2(self.vocab_size / 2))

    def most_right(self, size: int, bits: float) -> float:
        """See `ceiling.most_right`; values that are distinct are a little less to remember."""
        values = self.vocab_size // 2
        drawn = sum(math.log2(values - i) for i in range(size)) if self.distinct else self.bits(size)
        return most_right(size, values, drawn, bits)
