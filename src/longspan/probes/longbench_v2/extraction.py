"""From a reply to a letter: the official rule, the rule of an earlier project, and one that means what it reads.

The official rule (THUDM/LongBench, `pred.py:extract_answer`, MIT) and the earlier one are kept with their defects, so
that published numbers come out again: both read "The correct answer is Both" as B, and the earlier one even
"is based on".
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Literal

LETTERS = ("A", "B", "C", "D")
ASKED_AGAIN = "[REPROMPT]"
"""What the earlier project wrote between a reply and the reply to its second question, which left the document out."""
PLACEHOLDER = "X"
"""What some prompts write where the letter belongs ("Final answer: X (X is A, B, C, or D)"); models echo it."""

Scorer = Literal["official", "earlier", "first_pass", "robust"]

_OFFICIAL = (re.compile(r"The correct answer is \(([A-D])\)"), re.compile(r"The correct answer is ([A-D])"))
_EARLIER = (
    re.compile(r"(?:final\s*answer|answer)\s*[:\-]\s*\(?([A-D])\)?", re.IGNORECASE),
    re.compile(r"the\s+correct\s+answer\s+is\s*\(?([A-D])\)?", re.IGNORECASE),
)
_LAST_LINE = re.compile(r"(?:^|\n)\s*([A-D])\s*$")
_THINKING = re.compile(r"^.*</think>", re.DOTALL)
_NEXT_TURN = re.compile(
    r"\n\s*(?:###?\s*)?"
    r"(?:User|Human|Question|Instruction|Format your response|<\|?(?:user|im_start|start_header_id)\|?>)\s*:?.*",
    re.DOTALL,
)
_END = r"(?![A-Za-z0-9'’])"
_LETTER = rf"[\(\[\{{\"“'$]*(?:\\boxed\{{\s*)?(?:\\text\{{\s*)?(?:[Oo]ption |[Cc]hoice )?\(?([A-Z]|\d+){_END}"
_HEADS = (re.compile("nswer"), re.compile("NSWER"))
"""A literal is found many times faster than a pattern that begins with a choice; most replies hold one or two."""
_AFTER_HEAD = re.compile(rf"(?:\s+choice)?\s*(?:is|would be|:|-|=)\s*:?\s*{_LETTER}")
_FINAL = re.compile(r"\b(?:[Ff]inal|FINAL)\s*$")
_BOXED = re.compile(r"\\boxed\{\s*(?:\\text\{\s*)?\(?([A-Z])\)?\s*\}")
_ALONE = re.compile(r"\s*[\(\[]?([A-D])[\)\]]?\s*[.:]?\s*")
_LEADING = re.compile(r"\s*(?:\(([A-D])\)|([A-D])[.):])(?=\s|$)")


def official(text: str) -> str | None:
    """LongBench-v2's own rule: stars removed, first match anywhere, capital letters only."""
    plain = text.replace("*", "")
    for pattern in _OFFICIAL:
        if found := pattern.search(plain):
            return found[1]
    return None


def first_pass(text: str) -> str | None:
    """The earlier project's rule on the first reply alone: it looks at the last 1,000 characters only."""
    return _earlier(text.split(ASKED_AGAIN, 1)[0])


def earlier(text: str) -> str | None:
    """The earlier project's rule: the first reply, then the reply to the second question where there was one."""
    first, asked, second = text.partition(ASKED_AGAIN)
    return _earlier(first) or (_earlier(second) if asked else None)


def robust(text: str) -> str | None:
    """The one letter that a reply states, None where it states none, or several.

    Reasoning before `</think>` does not count, nor does what follows an invented next turn, nor a second question.
    A letter is one where nothing else of a word follows; a statement called final outweighs the others.
    """
    stated = statements(text)
    return stated[0] if len(stated) == 1 and stated[0] in LETTERS else None


def statements(text: str) -> list[str]:
    """The different labels that a reply states as its answer, in order; also such as nobody asked for, e.g. `E`."""
    reply = first_turn(text)
    final, stated = _announced(reply)
    for found in (final, stated, [match[1] for match in _BOXED.finditer(reply)]):
        if labels := [label for label in dict.fromkeys(found) if label != PLACEHOLDER]:
            return labels
    if found_alone := _ALONE.fullmatch(reply):
        return [found_alone[1]]
    lines = [line for line in reply.splitlines() if line.strip()]
    if lines and (leading := _LEADING.match(lines[0])):
        return [leading[1] or leading[2]]
    if lines and (last := _ALONE.fullmatch(lines[-1])):
        return [last[1]]
    return []


def _announced(reply: str) -> tuple[list[str], list[str]]:
    """The labels after "final answer" and after "answer", in order."""
    final: list[str] = []
    stated: list[str] = []
    for head in sorted(match.start() for pattern in _HEADS for match in pattern.finditer(reply)):
        start = head - 1
        if start < 0 or reply[start] not in "Aa" or not (after := _AFTER_HEAD.match(reply, head + len("nswer"))):
            continue
        if _FINAL.search(reply[max(0, start - 12) : start]):
            final.append(after[1])
        elif start == 0 or not reply[start - 1].isalnum():
            stated.append(after[1])
    return final, stated


def first_turn(text: str) -> str:
    """The reply itself: no marks of emphasis, no reasoning, no invented dialogue after it, no second question."""
    reply = text.split(ASKED_AGAIN, 1)[0].replace("*", "").replace("`", "")
    reply = _THINKING.sub("", reply)
    if "<think>" in reply:
        # Reasoning that never ended holds no answer.
        return ""
    return _NEXT_TURN.sub("", reply.strip())


def _earlier(text: str) -> str | None:
    plain = text.replace("*", "").strip()
    end = plain[-1000:]
    for pattern in _EARLIER:
        if found := pattern.search(end):
            return found[1].upper()
    found = _LAST_LINE.search(plain[-10:])
    return found[1].upper() if found else None


SCORERS: Mapping[Scorer, Callable[[str], str | None]] = {
    "official": official,
    "earlier": earlier,
    "first_pass": first_pass,
    "robust": robust,
}
