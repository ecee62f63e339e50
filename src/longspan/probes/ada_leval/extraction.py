"""From a reply to an order or a candidate: the official rules with their defects, and strict ones.

Written from the description of open-compass/Ada-LEval's scorers, whose repository has no licence.
"""

from __future__ import annotations

import json
import re
from itertools import permutations
from typing import Literal

Scorer = Literal["official", "official_lengths", "strict"]
PIECES = 4
ORDERS: tuple[tuple[int, ...], ...] = tuple(permutations(range(1, PIECES + 1)))
"""The 24 orders of four pieces."""
SAMPLE_ORDER = (4, 1, 3, 2)
"""The order that the official TSort prompt shows as a sample of the format."""
SAMPLE_CANDIDATE = "A4"
"""The candidate that the BestAnswer prompt shows as a sample of the format."""

_LIST = re.compile(r"\[\s*\d+(?:\s*,\s*\d+)*\s*\]")
_DESIGNATION = re.compile(r"\bA(\d+)\b")


def official_order(text: str) -> list[int] | None:
    """What upstream reads as an order: JSON after the first `Answer:`, else the one order that is a subsequence.

    JSON of any length and content is taken as it is, so this may be `[]` or `[2]`.
    """
    said = text.split("Answer:", 1)[1].strip() if "Answer:" in text else text.strip()
    try:
        found = json.loads(said)
    except json.JSONDecodeError:
        found = None
    if isinstance(found, list) and all(isinstance(each, int) and not isinstance(each, bool) for each in found):
        return found
    fitting = [order for order in ORDERS if _is_subsequence(order, said)]
    return list(fitting[0]) if len(fitting) == 1 else None


def order_is_right(order: list[int] | None, gold: list[int], scorer: Scorer) -> bool:
    """Whether an order counts as right.

    `official` compares as far as the shorter of the two reaches, as upstream's `zip` does: `[]` is right for every
    item. `official_lengths` is the same rule with that mended.
    """
    if order is None:
        return False
    if scorer == "official":
        return all(a == b for a, b in zip(order, gold, strict=False))
    return order == gold


def strict_order(text: str) -> list[int] | None:
    """The one order of the numbers 1 to 4 that the reply writes as a list, None where it writes none or several."""
    found = {tuple(json.loads(each)) for each in _LIST.findall(text.rsplit("</think>", 1)[-1])}
    orders = [order for order in found if order in ORDERS]
    return list(orders[0]) if len(orders) == 1 else None


def read_order(text: str, scorer: Scorer) -> list[int] | None:
    """The order that a rule reads."""
    return strict_order(text) if scorer == "strict" else official_order(text)


def official_candidate(text: str, candidates: int) -> str | None:
    """What upstream reads as a candidate: the highest of A1 ... An that occurs in the text, else of the bare numbers.

    So "A3 is better than A7" is A7, "A1" is also found in "A12", and "the 2nd of 14" is A14.
    """
    for pattern in ("A{}", "{}"):
        for number in range(candidates, 0, -1):
            if pattern.format(number) in text:
                return f"A{number}"
    return None


def strict_candidate(text: str, candidates: int) -> str | None:
    """The one candidate that the reply names as a word, None where it names none or several."""
    named = {int(number) for number in _DESIGNATION.findall(text.rsplit("</think>", 1)[-1])}
    (only,) = named if len(named) == 1 else (0,)
    return f"A{only}" if 1 <= only <= candidates else None


def read_candidate(text: str, candidates: int, scorer: Scorer) -> str | None:
    """The candidate that a rule reads."""
    return strict_candidate(text, candidates) if scorer == "strict" else official_candidate(text, candidates)


def follows_instruction(text: str, candidates: int | None) -> bool:
    """Whether a reply holds what was asked for at all: an order of the pieces, or at least one candidate's name."""
    if candidates is None:
        return any(_is_subsequence(order, text) for order in ORDERS)
    return any(1 <= int(number) <= candidates for number in _DESIGNATION.findall(text))


def _is_subsequence(order: tuple[int, ...], text: str) -> bool:
    place = 0
    for number in order:
        place = text.find(str(number), place) + 1
        if place == 0:
            return False
    return True
