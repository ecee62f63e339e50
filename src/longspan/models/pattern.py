"""The layer string: `AAMM`, `(AM)4`, `M6A2`, so that an architecture is data that a study can vary."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from longspan.foundation.errors import UserError

MOST_LAYERS = 4096


def parse_pattern(pattern: str, letters: Collection[str] | None = None) -> list[str]:
    """The mixer letter of every layer, first layer first.

    A letter is one layer; a number repeats the letter or group before it; brackets group, at any depth.

    Args:
        pattern: e.g. `AAMM`, `(AM)4`, `M6A2`, `((AM)2A)3`.
        letters: the letters that have a mixer; None takes any letter.

    Raises:
        UserError: with a caret under the offending character.
    """
    if not pattern:
        raise UserError("the pattern is empty", "at least one layer, e.g. `AAMM`, `(AM)4`, `M6A2`", "name a layer")
    reader = _Reader(pattern, letters)
    layers = reader.sequence(closing=None)
    if len(layers) > MOST_LAYERS:
        raise UserError(
            f"pattern {pattern!r} has {len(layers):,} layers", f"up to {MOST_LAYERS:,}", "repeat less often"
        )
    return layers


@dataclass
class _Reader:
    pattern: str
    letters: Collection[str] | None
    at: int = 0

    def sequence(self, closing: int | None) -> list[str]:
        """Layers up to the end, or up to the bracket that closes the one at `closing`."""
        layers: list[str] = []
        while self.at < len(self.pattern):
            if self.pattern[self.at] == ")" and closing is not None:
                return layers
            layers += self._item()
        if closing is not None:
            raise self._error(closing, "this bracket is never closed", "add `)`")
        return layers

    def _item(self) -> list[str]:
        start, character = self.at, self.pattern[self.at]
        self.at += 1
        if character == "(":
            layers = self.sequence(closing=start)
            if not layers:
                raise self._error(start, "these brackets hold no layer", "put a letter between them")
            self.at += 1
        elif character.isascii() and character.isalpha():
            self._check_letter(start, character)
            layers = [character]
        else:
            raise self._unexpected(start, character)
        return layers * self._count()

    def _count(self) -> int:
        start = self.at
        while self.at < len(self.pattern) and self.pattern[self.at] in "0123456789":
            self.at += 1
        digits = self.pattern[start : self.at]
        if not digits:
            return 1
        if digits.startswith("0") or len(digits) > len(str(MOST_LAYERS)):
            raise self._error(start, f"cannot repeat {digits} times", f"repeat from 1 to {MOST_LAYERS:,} times")
        return int(digits)

    def _check_letter(self, at: int, letter: str) -> None:
        if self.letters is not None and letter not in self.letters:
            known = ", ".join(sorted(self.letters))
            raise self._error(at, f"no mixer has the letter `{letter}`", f"use one of {known}, or register a mixer")

    def _unexpected(self, at: int, character: str) -> UserError:
        if character in "[]":
            problem = "`[..]` puts mixers side by side in one layer, which is not supported yet"
            return self._error(at, problem, "put the layers one after the other, e.g. `AM` in place of `[AM]`")
        if character == ")":
            return self._error(at, "this bracket was never opened", "remove it or add `(`")
        if character.isdigit():
            return self._error(at, "a number repeats the letter or group before it", "put a letter first, e.g. `M6`")
        return self._error(at, f"{character!r} has no meaning here", "remove it")

    def _error(self, at: int, problem: str, fix: str) -> UserError:
        shown = f"pattern {self.pattern!r}: {problem}\n    {self.pattern}\n    {' ' * at}^"
        return UserError(shown, "letters, repeat counts and round brackets, e.g. `AAMM`, `(AM)4`, `M6A2`", fix)
