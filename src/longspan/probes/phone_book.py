"""Phone book: the number of one name among many, after two examples of how it is asked for."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, ClassVar, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from longspan.engines.base import Engine
from longspan.foundation.errors import UserError
from longspan.foundation.randomness import numpy_generator
from longspan.probes import made_up
from longspan.probes.asking import (
    Question,
    Way,
    by_generation,
    by_likelihood,
    floor_by_likelihood,
    ways_of,
)
from longspan.probes.base import Asked, Item, Probe, ProbeData, credit, register, shown
from longspan.records.observation import Metric, Observation
from longspan.records.store import Record

EXAMPLES = 2
DIGITS = 10


@register("phone_book")
class PhoneBook(Probe):
    """Lines `Name: 4155550123`, then two of them again as examples, then a third name: which number?

    After the phone book of "Repeat After Me" (Jelassi et al. 2024), with names that never repeat, the place of the
    question balanced over the book, and the same books for every subject. Names and numbers are made up, the wrong
    candidates are other numbers of the book: only the line with the name tells them apart.

    Attributes:
        entries: lines of the book, several sizes.
        per_size: questions for each size, one a book.
        candidates: of a question; at most the entries less the two examples.
        depths: places in the book that take turns, from its first line (0) to its last (1).
        ways: how to ask; None: all that the subject can.
    """

    title: ClassVar[str] = "Phone book"
    explanation: ClassVar[str] = (
        "A list of made-up names with ten-digit numbers, two examples of asking for one, then a third name. Wrong "
        "candidates are other numbers of the same list; written out, all ten digits must be right."
    )
    requires: ClassVar[frozenset[str]] = frozenset()

    entries: tuple[int, ...] = (8, 16, 32)
    per_size: int = Field(100, ge=1)
    candidates: int = Field(4, ge=2, le=64)
    depths: int = Field(5, ge=1, le=20)
    ways: tuple[Way, ...] | None = Field(None, min_length=1)

    @model_validator(mode="after")
    def _books_hold_the_candidates(self) -> Self:
        least = EXAMPLES + self.candidates
        if min(self.entries, default=0) < least:
            raise UserError(
                f"entries = {list(self.entries)}",
                f"one or more sizes of at least {least}: {EXAMPLES} examples and {self.candidates} candidates",
                "raise `entries` or use fewer `candidates`",
            )
        return self

    @property
    def metrics(self) -> tuple[Metric, ...]:
        """In order of importance."""
        guess = 1 / self.candidates
        return (
            Metric("accuracy", "Accuracy", "", "proportion", "higher", "entries", guess, y_name="depth", y_unit="%",
                   floor="no_context"),
            Metric("exact_match", "All ten digits written", "", "proportion", "higher", "entries", 0.0, y_name="depth",
                   y_unit="%"),
            Metric("no_context", "Accuracy without the book", "", "proportion", "higher", chance=guess, compare=False),
        )  # fmt: skip

    def check(self, engine: Engine) -> None:
        """Refuse an engine that can ask in none of the ways wanted."""
        ways_of(self.ways, engine)

    def items(self, data: ProbeData) -> list[Item]:
        """One book an item; an item is about no document of the split."""
        return [self._book(data, size, number) for size in sorted(set(self.entries)) for number in range(self.per_size)]

    def answer(self, engine: Engine, items: Sequence[Item], data: ProbeData) -> list[dict[str, Any]]:
        """Sums of NLL of every candidate, with and without the book, and what was written."""
        ways, limit = ways_of(self.ways, engine), engine.context_limit
        contents: list[dict[str, Any]] = [
            {"entries": item.details["size"], "depth": item.details["depth"], "truth": item.details["truth"]}
            for item in items
        ]
        able = [row for row, item in enumerate(items) if limit is None or item.details["length"] <= limit]
        texts = [np.concatenate([engine.document_prefix, self.book(items[row], data)]) for row in able]
        asked = [self.asked(items[row], data) for row in able]
        if "likelihood" in ways and able:
            scores = by_likelihood(engine, texts, [[question] for question in asked])
            for row, (score,), floor in zip(able, scores, floor_by_likelihood(engine, asked), strict=True):
                contents[row] |= {"scores": score, "floor": floor}
        if "generation" in ways:
            prompts = [np.concatenate([text, question.cue]) for text, question in zip(texts, asked, strict=True)]
            for row, wrote in zip(able, by_generation(engine, prompts, asked), strict=True):
                contents[row] |= wrote
        return contents

    def observe(self, record: Record) -> Iterable[Observation]:
        """x is the number of entries, y the place of the name in the book."""
        answer = record.answer
        place: dict[str, Any] = {"cluster": record.item, "x": float(answer["entries"]), "y": answer["depth"]}
        if "scores" in answer:
            right, guessed = (credit(np.array(answer[name]), answer["truth"]) for name in ("scores", "floor"))
            yield self.observation(record, "accuracy", right, 1.0, **place)
            if answer["entries"] == min(self.entries):
                yield self.observation(record, "no_context", guessed, 1.0, cluster=record.item)
        if "exact" in answer:
            yield self.observation(record, "exact_match", float(answer["exact"]), 1.0, **place)

    def describe(self, item: Item, data: ProbeData) -> Asked:
        """The beginning and the end of the prompt."""
        question = self.asked(item, data)
        prompt = np.concatenate([self.book(item, data), question.cue])
        return Asked(f"({item.details['size']} entries) {shown(data, prompt)} ⟶", question.answer)

    def book(self, item: Item, data: ProbeData) -> NDArray[np.int64]:
        """The lines of the book."""
        return np.concatenate([self._line(data, name, number) for name, number in item.details["lines"]])

    def asked(self, item: Item, data: ProbeData) -> Question:
        """The examples and the name, and the candidates for its number."""
        details = item.details
        lines, answer = details["lines"], details["lines"][details["asked"]][1]
        examples = [self._line(data, *lines[index]) for index in details["examples"]]
        name = self._encode(data, f"\n{lines[details['asked']][0]}:")
        cue = np.concatenate([self._encode(data, "\n"), *examples, name])
        candidates = tuple(self._encode(data, f" {number}") for number in details["candidates"])
        return Question(cue, candidates, details["truth"], answer)

    def _book(self, data: ProbeData, size: int, number: int) -> Item:
        generator = numpy_generator(data.seed, "phone_book", size, number)
        names = made_up.distinct(lambda: f"{made_up.name(generator)} {made_up.name(generator)}", size)
        # Numbers of equally many tokens: a shorter one would be likelier.
        numbers = made_up.equally_long(lambda: made_up.number(generator, DIGITS), size, data.tokenizer, "")
        depth = (number % self.depths) / max(1, self.depths - 1)
        asked = round(depth * (size - 1))
        others = [index for index in generator.permutation(size).tolist() if index != asked]
        examples, wrong = others[:EXAMPLES], others[EXAMPLES : EXAMPLES + self.candidates - 1]
        truth = int(generator.integers(self.candidates))
        candidates = [numbers[index] for index in wrong]
        candidates.insert(truth, numbers[asked])
        details: dict[str, Any] = {
            "size": size,
            "depth": round(depth, 4),
            "lines": list(zip(names, numbers, strict=True)),
            "asked": asked,
            "examples": examples,
            "candidates": candidates,
            "truth": truth,
        }
        item = Item(f"{size}:{number}", 0, 1, details)
        question = self.asked(item, data)
        length = len(self.book(item, data)) + question.reach + 1
        return Item(item.id, 0, length + self.candidates * question.reach, {**details, "length": length})

    def _line(self, data: ProbeData, name: str, number: str) -> NDArray[np.int64]:
        return np.concatenate([self._encode(data, f"\n{name}:"), self._encode(data, f" {number}")])

    def _encode(self, data: ProbeData, text: str) -> NDArray[np.int64]:
        return data.tokenizer.encode(text).astype(np.int64)
