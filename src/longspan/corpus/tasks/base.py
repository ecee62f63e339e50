"""What a task is: a vocabulary, the sizes it is trained on, and examples drawn from a generator that is handed in.

A task of one's own is one file:

    @register("reverse")
    class Reverse(LengthTask):
        def vocabulary(self): return letters(self.vocab_size)
        def example(self, generator, size): ...
        def span(self, size): return 2 * size + 3
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np

from longspan.corpus.packing.batches import IGNORE
from longspan.corpus.symbols import SymbolEncoder
from longspan.corpus.tokenizer import SpecialTokens, Tokenizer
from longspan.foundation.config import Config, shown_value
from longspan.foundation.errors import UserError
from longspan.foundation.registry import Registry


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """The ids of a task.

    Attributes:
        symbols: the text of every id, in order.
        boundary, pad: ids of the marker before each string (or of an id that no string holds), and of padding.
        separator: what stands between symbols where people read them.
        end: id that ends every string; None where none does.
    """

    symbols: tuple[str, ...]
    boundary: int
    pad: int
    separator: str = ""
    end: int | None = None


@dataclass(frozen=True)
class Example:
    """One string of a task; T positions.

    Attributes:
        inputs: int32 (T,), the whole string, answer included where the answer is read back in.
        labels: int32 (T,), what is to be predicted after each position; `IGNORE` wherever that is no answer.
        slices: numbers to look at results by, e.g. `{"length": 12}`.
    """

    inputs: np.ndarray
    labels: np.ndarray
    slices: Mapping[str, int] = field(default_factory=dict)

    @staticmethod
    def of_text(tokens: np.ndarray, answer_from: int, **slices: int) -> Example:
        """A string whose tokens from `answer_from` on are the answer, each predicted from all before it."""
        labels = np.full(len(tokens), IGNORE, np.int32)
        labels[answer_from - 1 : -1] = tokens[answer_from:]
        return Example(tokens.astype(np.int32), labels, slices)

    @property
    def answer(self) -> np.ndarray:
        """The ids to be predicted, in order."""
        answer: np.ndarray = self.labels[self.labels != IGNORE]
        return answer

    @property
    def num_given(self) -> int:
        """Positions up to and with the one after which the first answer is predicted."""
        return int(np.argmax(self.labels != IGNORE)) + 1

    @property
    def fed_back(self) -> np.ndarray:
        """bool (T,): positions whose input is the answer to the position before, so that a subject reads its own."""
        own = np.zeros(len(self.inputs), bool)
        own[1:] = (self.labels[:-1] != IGNORE) & (self.labels[:-1] == self.inputs[1:])
        return own


class Task(Config, ABC):
    """A kind of string and its answers. Its fields are its settings.

    Class attributes:
        axis: what the size of an example is, e.g. `length`: the x of charts.
        marked: whether every string begins with the boundary id.
        trainable: False for tasks that only ask what another one taught.

    Attributes:
        task: its registered name.
    """

    axis: ClassVar[str] = "length"
    marked: ClassVar[bool] = True
    trainable: ClassVar[bool] = True

    task: str

    @abstractmethod
    def vocabulary(self) -> Vocabulary:
        """Every id."""

    @abstractmethod
    def sizes(self) -> tuple[int, ...]:
        """The sizes that training draws from, rising."""

    @abstractmethod
    def example(self, generator: np.random.Generator, size: int) -> Example:
        """An example of one size; everything random comes from `generator`.

        Raises:
            UserError: there is no example of this size.
        """

    @abstractmethod
    def span(self, size: int) -> int:
        """Most positions of an example of this size."""

    def draw_size(self, generator: np.random.Generator, step: int | None) -> int:
        """The size of the next training example: any of `sizes`, equally often.

        Args:
            generator: of the batch.
            step: of training, for a curriculum; None for the fixed validation set, which has none.
        """
        del step
        sizes = self.sizes()
        return sizes[int(generator.integers(len(sizes)))]

    def bits(self, size: int) -> float | None:
        """Information that answering an example takes from what stands before the questions; None where not known."""
        del size
        return None

    def most_right(self, size: int, bits: float) -> float | None:
        """The largest share of right answers to an example after which so many bits are kept; None where not known."""
        del size, bits
        return None

    def handover(self) -> int | None:
        """Positions of every example before its questions begin, the same in all; None where they differ."""
        return None

    def asked(self, settings: Mapping[str, Any], sizes: Collection[int] | None) -> Task:
        """This task with other settings, or another task that takes what the two share from this one.

        Args:
            settings: over those of training; `task` names another task.
            sizes: that will be asked for; a range of lengths is that of these.

        Raises:
            UserError: a setting that the task does not have, or a value it refuses.
        """
        fields = registered().get(str(settings.get("task", self.task)), type(self)).model_fields
        shared = {name: value for name, value in self.model_dump(exclude_unset=True).items() if name in fields}
        ends = {"min_length": min(sizes), "max_length": max(sizes)} if sizes else {}
        # What is drawn while training goes on is nothing to whoever asks for a size, and may not fit the sizes asked.
        ranged = {name: value for name, value in {**ends, "curriculum": None}.items() if name in fields}
        return make_task({**shared, **ranged, **settings}, "settings")

    def tokenizer(self) -> Tokenizer:
        """The tokenizer that the task defines."""
        vocabulary = self.vocabulary()
        encoder = SymbolEncoder.of(vocabulary.symbols, vocabulary.separator)
        special = SpecialTokens(boundary=vocabulary.boundary, pad=vocabulary.pad)
        return Tokenizer(encoder, special, stem=self.task, provenance={"kind": "task", "task": self.task})

    def check_context(self, context: int) -> None:
        """Refuse rows that do not hold the longest string.

        Raises:
            UserError: with the positions that it takes.
        """
        longest = max(self.sizes())
        needed = self.span(longest)
        if needed > context:
            raise UserError(
                f"training.context = {context} for {self.task} of {self.axis} up to {longest}",
                f"at least {needed} positions, so that the longest string fits into a row",
                f"raise training.context to {needed}, or lower the {self.axis}",
            )


def check_range(name: str, low: int, high: int) -> None:
    """Refuse a range that holds no length.

    Raises:
        UserError: naming both ends.
    """
    if low > high:
        given = f"min_{name} = {low} with max_{name} = {high}: no {name} lies between them"
        fix = f"raise max_{name} to {low} or more, or lower min_{name}; one {name} is a range too: set both to it"
        raise UserError(given, f"min_{name} at most max_{name}, both included", fix)


# --- registry ---------------------------------------------------------------------------------------------------------

_TASKS: Registry[Task] = Registry("task", package="longspan.corpus.tasks")
register = _TASKS.register
registered = _TASKS.all


def make_task(settings: Any, where: str) -> Task:
    """A task from its settings, which name it under `task`.

    Raises:
        UserError: no such task, or settings that it refuses.
    """
    if not isinstance(settings, Mapping) or not isinstance(settings.get("task"), str):
        given = settings.get("task") if isinstance(settings, Mapping) else settings
        place = f"{where}: " if where else ""
        raise UserError(f"{place}task = {shown_value(given)}", ", ".join(sorted(registered())), "name one of these")
    return _TASKS.find(settings["task"], where).parse(dict(settings), where)
