"""Seeded documents with a long-range structure that is known: facts are stated early and asked for again late.

Names are made of syllables, anew for each document, so that no model can know them: whoever predicts the late mentions
must have read the early ones. What lies between is filler that helps nobody.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
from pydantic import Field, model_validator

from longspan.corpus.document import Document
from longspan.corpus.sources.base import SourceConfig
from longspan.foundation.errors import UserError
from longspan.foundation.progress import Report
from longspan.foundation.randomness import numpy_generator


class SyntheticSource(SourceConfig):
    """Generated stories; document `i` depends on `seed` and `i` only, so a larger count adds documents at the end.

    Attributes:
        num_documents: how many documents there are.
        min_words, max_words: the length of a document is drawn log-uniformly between them (whole paragraphs, so the
            last one may go beyond).
        people: how many persons a document introduces in its first paragraph and recalls afterwards.
        recall: share of sentences after the first paragraph that repeat a fact about a person.
        seed: another seed gives other documents.
    """

    source: Literal["synthetic"] = "synthetic"
    num_documents: int = Field(default=200, ge=1)
    min_words: int = Field(default=200, ge=20)
    max_words: int = Field(default=2000, ge=20)
    people: int = Field(default=4, ge=1, le=20)
    recall: float = Field(default=0.4, ge=0, le=1)
    seed: int = 0

    @model_validator(mode="after")
    def _some_length(self) -> Self:
        if self.min_words > self.max_words:
            raise UserError(
                f"min_words = {self.min_words} with max_words = {self.max_words}: no number of words lies between them",
                "min_words at most max_words, both included",
                "set both",
            )
        return self

    def read(self, cache: Path, report: Report) -> Iterator[Document]:
        """Documents 0, 1, 2, …"""
        for index in range(self.num_documents):
            generator = numpy_generator(self.seed, "synthetic", index)
            people = [_person(generator) for _ in range(self.people)]
            yield Document(
                id=f"synthetic-{self.seed}-{index:06d}",
                text=self._story(generator, people),
                title=f"The story of {people[0].name}",
            )

    def inputs(self, cache: Path) -> dict[str, Any]:
        """The settings determine everything, given this version of the generator."""
        return {"generator": 1}

    def _story(self, generator: np.random.Generator, people: list[_Person]) -> str:
        length = round(float(np.exp(generator.uniform(np.log(self.min_words), np.log(self.max_words)))))
        paragraphs = [" ".join(person.introduction() for person in people)]
        words = len(paragraphs[0].split())
        while words < length:
            sentences = [
                people[generator.integers(len(people))].recall(generator)
                if generator.random() < self.recall
                else _filler(generator)
                for _ in range(generator.integers(3, 8))
            ]
            paragraphs.append(" ".join(sentences))
            words += len(paragraphs[-1].split())
        return "\n\n".join(paragraphs) + "\n"


@dataclass(frozen=True, slots=True)
class _Person:
    name: str
    trade: str
    town: str
    thing: str
    number: int

    def introduction(self) -> str:
        origin = f"{self.name} was a {self.trade} from {self.town}"
        return f"{origin}, who owned a {self.thing} and lived at number {self.number}."

    def recall(self, generator: np.random.Generator) -> str:
        forms = (
            f"Everyone agreed that {self.name} the {self.trade} came from {self.town}.",
            f"The {self.thing} belonged to {self.name}, as it always had.",
            f"At number {self.number} the door was opened by {self.name}.",
            f"In {self.town} they still spoke of {self.name} and the {self.thing}.",
        )
        return forms[generator.integers(len(forms))]


def _pick(generator: np.random.Generator, words: tuple[str, ...]) -> str:
    return words[generator.integers(len(words))]


def _name(generator: np.random.Generator, syllables: int) -> str:
    return "".join(_pick(generator, _ONSETS) + _pick(generator, _RIMES) for _ in range(syllables)).capitalize()


def _person(generator: np.random.Generator) -> _Person:
    return _Person(
        name=f"{_name(generator, 2)} {_name(generator, 2)}",
        trade=_pick(generator, _TRADES),
        town=_name(generator, 3),
        thing=f"{_pick(generator, _COLOURS)} {_pick(generator, _THINGS)}",
        number=int(generator.integers(10, 1000)),
    )


def _filler(generator: np.random.Generator) -> str:
    return (
        f"The {_pick(generator, _WEATHER)} {_pick(generator, _TIMES)} {_pick(generator, _VERBS)} over the "
        f"{_pick(generator, _PLACES)}, and the {_pick(generator, _BEASTS)} {_pick(generator, _DEEDS)}."
    )


_ONSETS = ("b", "d", "f", "g", "h", "k", "l", "m", "n", "p", "r", "s", "t", "v", "br", "dr", "kr", "st", "th", "tr")
_RIMES = ("a", "e", "i", "o", "u", "al", "an", "ar", "el", "en", "er", "il", "in", "ol", "on", "or", "un", "us")
_TRADES = ("baker", "carpenter", "doctor", "farmer", "fisher", "gardener", "mason", "miller", "painter", "singer",
           "smith", "tailor", "teacher", "weaver")  # fmt: skip
_COLOURS = ("amber", "black", "blue", "bronze", "copper", "green", "grey", "ivory", "red", "silver", "white", "yellow")
_THINGS = ("bell", "boat", "book", "clock", "coat", "drum", "harp", "kettle", "ladder", "lantern", "mirror", "ring",
           "saddle", "violin")  # fmt: skip
_WEATHER = ("bright", "cold", "dull", "foggy", "gentle", "long", "mild", "quiet", "rainy", "windy")
_TIMES = ("afternoon", "autumn", "dawn", "day", "evening", "morning", "night", "season", "spring", "winter")
_VERBS = ("crept", "hung", "lay", "passed", "rolled", "settled", "spread", "swept")
_PLACES = ("bridge", "canal", "field", "forest", "harbour", "hill", "market", "marsh", "orchard", "river", "road")
_BEASTS = ("cattle", "crows", "dogs", "geese", "goats", "horses", "owls", "sheep", "swallows")
_DEEDS = (
    "called to each other",
    "kept still",
    "looked for shelter",
    "moved on",
    "slept",
    "wandered home",
    "would not eat",
)
