"""Names, numbers and filler that nobody can know beforehand: drawn from a seed, plain letters and digits only.

They tokenise in every vocabulary, and since a truth is drawn in the same way as what it is to be told from, a subject
that has not read it can only guess.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

import numpy as np

from longspan.corpus.tokenizer import Tokenizer

_ONSETS = ("b", "br", "d", "dr", "f", "g", "gr", "h", "k", "l", "m", "n", "p", "r", "s", "st", "t", "tr", "v", "w", "z")
_VOWELS = ("a", "e", "i", "o", "u", "ai", "ea", "or")
_CODAS = ("", "", "", "l", "m", "n", "r", "s", "t", "nd", "rk")
_ADJECTIVES = (
    "old", "small", "quiet", "green", "cold", "bright", "narrow", "heavy", "early", "plain", "warm", "slow", "dark",
    "wide", "empty", "soft",
)  # fmt: skip
_NOUNS = (
    "river", "house", "road", "field", "door", "wall", "garden", "tree", "stone", "boat", "hill", "bridge",
    "window", "market", "table", "letter",
)  # fmt: skip
_VERBS = (
    "stood", "lay", "waited", "turned", "moved", "rested", "leaned", "ended", "began", "stayed", "opened", "closed",
)  # fmt: skip
_PLACES = (
    "near", "behind", "beside", "above", "below", "before", "beyond", "against",
)  # fmt: skip

TRIES = 200
"""Draws per wanted value before its kind counts as exhausted."""


def name(generator: np.random.Generator) -> str:
    """A capitalised name of two or three syllables."""
    syllables = int(generator.integers(2, 4))
    return "".join(_one(part, generator) for part in (_ONSETS, _VOWELS, _CODAS) * syllables).capitalize()


def number(generator: np.random.Generator, digits: int) -> str:
    """A number of so many digits, the first not zero."""
    return str(generator.integers(1, 10)) + "".join(map(str, generator.integers(0, 10, size=digits - 1)))


def distinct(draw: Callable[[], str], count: int, taken: Collection[str] = ()) -> list[str]:
    """`count` different values, none of which is taken.

    Raises:
        ValueError: there are not so many.
    """
    found: dict[str, None] = {}
    for _ in range(TRIES * max(1, count)):
        if len(found) == count:
            break
        value = draw()
        if value not in taken:
            found[value] = None
    if len(found) < count:
        raise ValueError(f"only {len(found)} of {count} different values")
    return list(found)


def equally_long(draw: Callable[[], str], count: int, tokenizer: Tokenizer, absent_from: str) -> list[str]:
    """`count` different values of equally many tokens (each after a space), none of which occurs in a text.

    All are drawn alike and only then compared in length, so that none of them is likelier than another.

    Raises:
        ValueError: there are not so many.
    """
    by_length: dict[int, dict[str, None]] = {}
    for _ in range(TRIES * count):
        value = draw()
        if value in absent_from:
            continue
        same = by_length.setdefault(len(tokenizer.encode(f" {value}")), {})
        same[value] = None
        if len(same) == count:
            return list(same)
    raise ValueError(f"no {count} different values of equally many tokens")


def sentence(generator: np.random.Generator) -> str:
    """A sentence of common words that says nothing of importance."""
    first, last = (f"{_one(_ADJECTIVES, generator)} {_one(_NOUNS, generator)}" for _ in range(2))
    return f"The {first} {_one(_VERBS, generator)} {_one(_PLACES, generator)} the {last}."


def _one(words: Sequence[str], generator: np.random.Generator) -> str:
    return words[int(generator.integers(len(words)))]
