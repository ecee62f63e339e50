"""Asking for an answer that a text holds, in both ways: which candidate is likeliest, and what the subject writes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from longspan.engines.base import Engine, Sampling
from longspan.foundation.errors import UserError
from longspan.probes.base import failure_of

Way = Literal["likelihood", "generation"]
NEEDS: dict[Way, Literal["score", "generate"]] = {"likelihood": "score", "generation": "generate"}

SPARE_TOKENS = 3
"""Tokens beyond the answer's own that a subject may write: it may cut the same answer into more tokens."""


@dataclass(frozen=True)
class Question:
    """A question about a text.

    Attributes:
        cue: ids that come between the text and the answer, at least one.
        candidates: ids of each candidate answer; without `likelihood` the true one is enough.
        truth: index of the true one.
        answer: the true answer as text.
    """

    cue: NDArray[np.int64]
    candidates: tuple[NDArray[np.int64], ...]
    truth: int
    answer: str

    @property
    def reach(self) -> int:
        """Tokens of the cue and the longest candidate."""
        return len(self.cue) + max(map(len, self.candidates))


def ways_of(wanted: Sequence[Way] | None, engine: Engine) -> tuple[Way, ...]:
    """The ways to ask: those wanted, else all that the engine can.

    Raises:
        UserError: it cannot do what is wanted, or nothing of what there is.
    """
    able = tuple(way for way, capability in NEEDS.items() if capability in engine.capabilities)
    for way in wanted or ():
        if way not in able:
            raise engine.refuse(NEEDS[way])
    if not able:
        raise UserError(
            f"{engine.name} can neither `score` nor `generate`",
            "an engine with one of the two",
            "leave out the probes that need them",
        )
    return tuple(wanted) if wanted else able


def by_likelihood(
    engine: Engine, texts: Sequence[NDArray[np.int64]], questions: Sequence[Sequence[Question]]
) -> list[list[list[float]]]:
    """Sums of NLL of every candidate of every question of every text; each text is computed once.

    Args:
        texts: with the engine's document prefix before them; those of one length go through together.
    """
    if not texts:
        return []
    choices = [
        [np.concatenate([question.cue, candidate]) for question in asked for candidate in question.candidates]
        for asked in questions
    ]
    answers = []
    for asked, scored in zip(questions, engine.score_many(texts, choices), strict=True):
        rows = iter(scored)
        answers.append([[float(next(rows)[-len(c) :].sum()) for c in question.candidates] for question in asked])
    return answers


def alone(engine: Engine, question: Question) -> NDArray[np.int64]:
    """The cue as the beginning of a document: what is asked without the text."""
    return np.concatenate([engine.document_prefix, question.cue])


def floor_by_likelihood(engine: Engine, questions: Sequence[Question]) -> list[list[float]]:
    """Sums of NLL of every candidate where the subject sees nothing but the cue."""
    scored = engine.score_many([alone(engine, q) for q in questions], [q.candidates for q in questions])
    return [[float(values.sum()) for values in row] for row in scored]


def by_generation(
    engine: Engine, prompts: Sequence[NDArray[np.int64]], questions: Sequence[Question]
) -> list[dict[str, Any]]:
    """What the subject writes after each prompt (greedily), and whether it is the answer; no answer is a wrong one."""
    if not prompts:
        return []
    longest = max(len(question.candidates[question.truth]) for question in questions)
    written = engine.generate(prompts, Sampling(max_new_tokens=longest + SPARE_TOKENS, stop=("\n",)))
    return [
        {"wrote": each.text[:200], "exact": is_exact(each.text, question.answer), **failure_of(each)}
        for each, question in zip(written, questions, strict=True)
    ]


def is_exact(text: str, answer: str) -> bool:
    """Whether a text begins with the answer as a whole: `4711` is not the beginning of `47112`."""
    found = text.lstrip()
    return found.startswith(answer) and not found[len(answer) : len(answer) + 1].isalnum()
