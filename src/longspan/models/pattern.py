"""The layer string: `AAMM`, `(AM)4`, `[AM]M6`, so that an architecture is data that a study can vary."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from longspan.foundation.errors import UserError

MOST_LAYERS = 4096
DIGITS = "0123456789"
SHOWN = 64
"""Characters of a faulty pattern that an error shows."""
EXAMPLES = "`AAMM`, `(AM)4`, `M6A2`, `[AM]4`"


def parse_pattern(pattern: str, letters: Collection[str] | None = None) -> list[str]:
    """What mixes in every layer, first layer first: a letter, or a group such as `[AM]`.

    A letter is one layer, square brackets put two or more letters side by side in one layer (a letter may stand there
    twice: two mixers with weights of their own); a number repeats the layer or group before it; round brackets group,
    at any depth.

    Args:
        pattern: e.g. `AAMM`, `(AM)4`, `M6A2`, `([AM]M)2`, `((AM)2A)3`.
        letters: the letters that have a mixer; None takes any letter.

    Returns:
        One string per layer; joined they are the pattern written out.

    Raises:
        UserError: with a caret under the offending character.
    """
    if not pattern:
        raise UserError("the pattern is empty", f"at least one layer, e.g. {EXAMPLES}", "name a layer")
    return _Reader(pattern, letters).sequence(closing=None)


def letters_of(layer: str) -> str:
    """The letters of one layer: `A` of `A`, `AM` of `[AM]`."""
    return layer.strip("[]")


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
            start = self.at
            layers += self._item()
            if len(layers) > MOST_LAYERS:
                problem = f"the pattern has more than {MOST_LAYERS:,} layers here"
                raise self._error(start, problem, "repeat less often")
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
        elif character == "[":
            layers = [self._side_by_side(start)]
        elif _is_letter(character):
            self._check_letter(start, character)
            layers = [character]
        else:
            raise self._unexpected(start, character)
        return layers * self._count(len(layers))

    def _side_by_side(self, opened: int) -> str:
        """The rest of a group that began with `[` at `opened`."""
        while self.at < len(self.pattern):
            at, character = self.at, self.pattern[self.at]
            self.at += 1
            if character == "]":
                return self._group(opened, self.pattern[opened + 1 : at])
            if not _is_letter(character):
                raise self._not_in_group(at, character)
            self._check_letter(at, character)
        raise self._error(opened, "this bracket is never closed", "add `]`")

    def _group(self, opened: int, letters: str) -> str:
        if not letters:
            raise self._error(opened, "these brackets hold no mixer", "put two letters between them, e.g. `[AM]`")
        if len(letters) == 1:
            raise self._error(opened, "one mixer has none at its side", f"write `{letters}`, or add a letter")
        return f"[{letters}]"

    def _not_in_group(self, at: int, character: str) -> UserError:
        if character in DIGITS:
            fix = "write a letter as often as it should stand there, or repeat the layer: `[AM]2`"
            return self._error(at, "no number inside `[..]`, which is one layer", fix)
        if character == ")":
            return self._error(at, "`[` is still open here", "close it first with `]`")
        if character in "([":
            return self._error(at, "no brackets inside `[..]`, which is one layer", "put only letters there")
        return self._error(at, f"{character!r} has no meaning here", "remove it")

    def _count(self, num_layers: int) -> int:
        start = self.at
        while self.at < len(self.pattern) and self.pattern[self.at] in DIGITS:
            self.at += 1
        digits = self.pattern[start : self.at]
        if not digits:
            return 1
        if digits.startswith("0") or len(digits) > len(str(MOST_LAYERS)):
            raise self._error(start, f"cannot repeat {digits} times", f"repeat from 1 to {MOST_LAYERS:,} times")
        if num_layers * int(digits) > MOST_LAYERS:
            problem = f"this makes {num_layers * int(digits):,} layers, more than {MOST_LAYERS:,}"
            raise self._error(start, problem, "repeat less often")
        return int(digits)

    def _check_letter(self, at: int, letter: str) -> None:
        if self.letters is not None and letter not in self.letters:
            known = ", ".join(sorted(self.letters))
            raise self._error(at, f"no mixer has the letter `{letter}`", f"use one of {known}, or register a mixer")

    def _unexpected(self, at: int, character: str) -> UserError:
        if character in ")]":
            opening = "(" if character == ")" else "["
            return self._error(at, "this bracket was never opened", f"remove it or add `{opening}`")
        if character in DIGITS:
            return self._error(at, "a number repeats the layer or group before it", "put a letter first, e.g. `M6`")
        return self._error(at, f"{character!r} has no meaning here", "remove it")

    def _error(self, at: int, problem: str, fix: str) -> UserError:
        # One line of a terminal that holds the place; what does not print would move the caret.
        start = max(0, min(at - SHOWN // 2, len(self.pattern) - SHOWN))
        cut = self.pattern[start : start + SHOWN]
        before, after = "…" if start else "", "…" if start + SHOWN < len(self.pattern) else ""
        line = before + "".join(each if each.isprintable() else "\N{REPLACEMENT CHARACTER}" for each in cut) + after
        name = f"pattern {cut!r}" if cut == self.pattern else f"character {at + 1} of a pattern"
        shown = f"{name}: {problem}\n    {line}\n    {' ' * (len(before) + at - start)}^"
        return UserError(
            shown, f"letters, repeat counts, `(..)` around layers, `[..]` in one layer, e.g. {EXAMPLES}", fix
        )


def _is_letter(character: str) -> bool:
    return character.isascii() and character.isalpha()
