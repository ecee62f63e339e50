"""Why a reply holds no answer: every null has one cause, the first that applies."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from typing import Any, Literal, get_args

from longspan.probes.longbench_v2.extraction import ASKED_AGAIN, LETTERS, statements

NullCause = Literal[
    "transport_error",
    "context_overflow",
    "empty",
    "token_limit",
    "repetition",
    "several_answers",
    "refusal",
    "other_label",
    "no_format",
]
CAUSES: tuple[NullCause, ...] = get_args(NullCause)
"""In the order in which they are tried; `other_label` comes before `no_format`, which takes all that is left."""

_REFUSAL = re.compile(
    r"\b(?:I (?:can ?not|can['’]t|am unable|am not able|do not have|don['’]t have)|"
    r"(?:can ?not|can['’]t|impossible to|unable to) (?:be )?(?:determin|answer|provid|identif)\w*|"
    r"(?:not|n['’]t) (?:enough|sufficient) information|"
    r"(?:does|do) (?:not|n['’]t) (?:provide|contain|mention|specify|give|include)|insufficient information|"
    r"not (?:provided|mentioned|specified|given) in)",
    re.IGNORECASE,
)
_LOOP_WORDS = 40
"""A reply of fewer words is not called a loop."""
_LOOP_SHARE = 0.5


def null_cause(answer: Mapping[str, Any]) -> NullCause:
    """The cause of a null.

    Args:
        answer: of a record: `response`, and where they are known `finish_reason` and `failure`. Where nobody recorded
            the finish reason (answers from elsewhere) a reply that was cut off counts by its text.
    """
    text = str(answer.get("response", "")).split(ASKED_AGAIN, 1)[0]
    finish = answer.get("finish_reason")
    failure = answer.get("failure")
    if failure and failure not in ("context overflow", "empty reply"):
        return "transport_error"
    if finish == "context" or failure == "context overflow":
        return "context_overflow"
    if not text.strip():
        return "empty"
    if finish == "length":
        return "token_limit"
    if repeated_share(text) > _LOOP_SHARE:
        return "repetition"
    stated = statements(text)
    if len([label for label in stated if label in LETTERS]) > 1:
        return "several_answers"
    if _REFUSAL.search(text):
        return "refusal"
    if stated and not set(stated) & set(LETTERS):
        return "other_label"
    return "no_format"


def repeated_share(text: str, size: int = 6) -> float:
    """Share of the runs of `size` words that occurred before in the text; 0 for a short one."""
    words = text.split()
    if len(words) < _LOOP_WORDS:
        return 0.0
    runs = Counter(tuple(words[i : i + size]) for i in range(len(words) - size + 1))
    total = sum(runs.values())
    return 1.0 - len(runs) / total
