"""The prompts of LongBench-v2, word for word (THUDM/LongBench, `prompts/*.txt`, MIT): they are part of the protocol."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from longspan.foundation.errors import DataError

Variant = Literal["direct", "cot", "no_context", "rag"]

_QUESTION = "What is the correct answer to this question: $Q$\nChoices:\n(A) $C_A$\n(B) $C_B$\n(C) $C_C$\n(D) $C_D$\n\n"
_TEXT = "<text>\n$DOC$\n</text>\n\n"
_FORMAT = 'Format your response as follows: "The correct answer is (insert answer here)".'
_STEPS = "Let’s think step by step:"
TEMPLATES: Mapping[str, str] = {
    "direct": f"Please read the following text and answer the question below.\n\n{_TEXT}{_QUESTION}{_FORMAT}",
    "cot": f"Please read the following text and answer the questions below.\n\n{_TEXT}{_QUESTION}{_STEPS}",
    "cot_answer": (
        "Please read the following text and answer the questions below.\n\nThe text is too long and omitted here.\n\n"
        f"{_QUESTION}{_STEPS} $COT$\n\nBased on the above, what is the single, most likely answer choice? {_FORMAT}"
    ),
    "no_context": f"{_QUESTION}What is the single, most likely answer choice? {_FORMAT}",
    "rag": (
        f"Please read the following retrieved text chunks and answer the question below.\n\n{_TEXT}{_QUESTION}{_FORMAT}"
    ),
}
_REPLIED = (
    "You were asked this before, and your reply was:\n\n<reply>\n$COT$\n</reply>\n\nIt does not say which choice is "
    "right. Reply with nothing but the letter of the single, most likely choice: A, B, C or D."
)
RE_ASKED: Mapping[Variant, str] = {
    "direct": "re_ask",
    "cot": "re_ask",
    "rag": "re_ask_rag",
    "no_context": "re_ask_no_context",
}
"""Templates that ask again, showing what the variant showed; their wording is Longspan's, upstream asks once."""
_HEADS = {
    "re_ask": TEMPLATES["direct"].removesuffix(_FORMAT),
    "re_ask_rag": TEMPLATES["rag"].removesuffix(_FORMAT),
    "re_ask_no_context": _QUESTION,
}
_ALL = {**TEMPLATES, **{name: head + _REPLIED for name, head in _HEADS.items()}}
ANSWER_PREFIX = " The correct answer is ("
"""Before the letters whose likelihood is measured."""
_PLACES = ("$DOC$", "$Q$", "$C_A$", "$C_B$", "$C_C$", "$C_D$", "$COT$")
"""In the order in which upstream replaces them."""


@dataclass(frozen=True)
class Rendered:
    """A prompt.

    Attributes:
        text: the user's message.
        document: where the document stands in it, characters [start, end); None where there is none.
        differs: whether upstream's replacing one place after the other would have given another text, because what
            was put in looks like a place itself.
    """

    text: str
    document: tuple[int, int] | None
    differs: bool


def render(template: str, row: Mapping[str, Any], *, document: str | None = None, reasoning: str = "") -> Rendered:
    """Fill a template in one pass; everything put in is stripped of white space at its ends, as upstream has it.

    Args:
        template: a key of `TEMPLATES`, or one of `RE_ASKED`.
        row: of the data set.
        document: instead of the row's `context`.
        reasoning: the first reply, for `cot_answer` and to ask again.
    """
    values = {
        "$DOC$": (str(row.get("context", "")) if document is None else document).strip(),
        "$Q$": str(row["question"]).strip(),
        "$C_A$": str(row["choice_A"]).strip(),
        "$C_B$": str(row["choice_B"]).strip(),
        "$C_C$": str(row["choice_C"]).strip(),
        "$C_D$": str(row["choice_D"]).strip(),
        "$COT$": reasoning.strip(),
    }
    body = _ALL[template]
    pieces = re.split(r"(\$(?:DOC|Q|C_[A-D]|COT)\$)", body)
    text, place = "", None
    for piece in pieces:
        if piece in values:
            if piece == "$DOC$":
                place = (len(text), len(text) + len(values[piece]))
            text += values[piece]
        else:
            text += piece
    # Only a place that comes later in upstream's order would have been filled inside an earlier value.
    differs = any(
        later in values[place_] for n, place_ in enumerate(_PLACES) if place_ in body for later in _PLACES[n + 1 :]
    )
    return Rendered(text, place, differs)


def retrieved_document(row: Mapping[str, Any], count: int) -> str:
    """The first `count` retrieved chunks in the order of the document, as upstream joins them.

    Raises:
        DataError: the row has no `retrieved_context` (a list of `{content, c_idx}`), which upstream's own code drops.
    """
    chunks = row.get("retrieved_context")
    if not isinstance(chunks, Sequence) or isinstance(chunks, str) or not chunks:
        raise DataError(
            f"item {row.get('_id')} has no retrieved chunks",
            "rows with `retrieved_context`, a list of {content, c_idx}",
            "add them to the data file, or ask another variant",
        )
    kept = sorted(chunks[:count], key=lambda chunk: chunk["c_idx"])
    return "\n\n".join(f"Retrieved chunk {n}: {chunk['content']}" for n, chunk in enumerate(kept, start=1))
