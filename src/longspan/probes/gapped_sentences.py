"""Sentences of a text with a number or a name to be replaced, and where a text can be opened between two sentences."""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from longspan.corpus.tokenizer import Tokenizer

FEWEST_WORDS = 4
"""Words before the value: a shorter beginning could stand anywhere."""
NEAR = 32
"""Tokens behind the wanted place in which the end of a sentence is sought."""

_SENTENCE = re.compile(r"(?<=[.!?]\s)[A-Z](?:[^.!?\n]|\n(?!\n)){20,240}[.!?](?=\s)")
_VALUE = {
    "number": re.compile(r"(?<= )\d{1,3}(?:,\d{3})+(?=[ .;])|(?<= )\d{2,9}(?=[ .;])"),
    "name": re.compile(r"(?<= )[A-Z][a-z]{3,}(?=[ .,;])"),
}


@dataclass(frozen=True)
class Fact:
    """A sentence with a gap for its value: cue, value, rest.

    Attributes:
        kind: of the value: `number` or `name`.
        document: it comes from, -1 where it is made up.
    """

    kind: str
    cue: str
    rest: str
    document: int


def facts_of(text: str, document: int, kinds: Sequence[str]) -> list[Fact]:
    """The sentences of a text that hold a value, each cut at its last one of the first kind that it holds."""
    sentences = (" ".join(match.group().split()) for match in _SENTENCE.finditer(text))
    return [fact for sentence in sentences if (fact := _fact(sentence, document, kinds)) is not None]


def _fact(sentence: str, document: int, kinds: Sequence[str]) -> Fact | None:
    """The sentence cut at its last value that enough words stand before; None where there is none."""
    for kind in kinds:
        for match in reversed(list(_VALUE[kind].finditer(sentence))):
            cue = sentence[: match.start()].rstrip()
            if len(cue.split()) >= FEWEST_WORDS:
                return Fact(kind, cue, sentence[match.end() :], document)
    return None


def sentence_end(tokenizer: Tokenizer, hay: NDArray[np.int64], wanted: int) -> int:
    """The end of a sentence nearest behind `wanted`, `wanted` itself where none is near."""
    if wanted in (0, len(hay)):
        return wanted
    for place in range(wanted, min(wanted + NEAR, len(hay))):
        if _ends_sentence(tokenizer, int(hay[place - 1])):
            return place
    return wanted


@functools.lru_cache(maxsize=1 << 17)
def _ends_sentence(tokenizer: Tokenizer, token: int) -> bool:
    text = tokenizer.decode([token])
    return "\n" in text or text.rstrip().endswith((".", "!", "?"))
