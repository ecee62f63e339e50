"""Scores of LongBench-v2: strict, answered and compensated accuracy always together, by group, with the letters."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from longspan.probes.longbench_v2.extraction import LETTERS, SCORERS, Scorer, robust
from longspan.probes.longbench_v2.nulls import CAUSES, NullCause, null_cause
from longspan.records import statistics

COMPENSATION = 0.25
"""What LongBench's `compensated` gives a null: the chance of four letters."""
GROUPS = ("all", "easy", "hard", "short", "medium", "long")


@dataclass(frozen=True, slots=True)
class Read:
    """An answer as a scorer reads it."""

    letter: str | None
    right: bool
    cause: NullCause | None


def read_answer(answer: Mapping[str, Any], scorer: Scorer) -> Read:
    """A record's answer under a scorer; a null has its cause."""
    letter = SCORERS[scorer](str(answer.get("response", "")))
    return Read(letter, letter == answer["gold"], null_cause(answer) if letter is None else None)


def read_re_asked(answer: Mapping[str, Any], first: Read) -> Read:
    """What a record's answer is after asking again: the first reply where it holds one, else the second.

    Args:
        answer: of a record whose protocol asks again; `re_asked` is there where that was done.
        first: the first reply as a scorer reads it. The second was to be a letter alone, of which no official rule
            knows, and is read by the robust one.
    """
    if first.letter is not None or "response" not in (again := answer.get("re_asked", {})):
        return first
    letter = robust(str(again["response"]))
    return Read(letter, letter == answer["gold"], null_cause(again) if letter is None else None)


@dataclass(frozen=True, slots=True)
class Score:
    """One group of items: counts, and the four numbers that belong together."""

    group: str
    correct: int
    n: int
    nulls: int

    @property
    def strict(self) -> float:
        """Right answers over all items; a null is wrong."""
        return self.correct / self.n

    @property
    def null_rate(self) -> float:
        """Nulls over all items."""
        return self.nulls / self.n

    @property
    def answered(self) -> float | None:
        """Right answers over the items that were answered, None where none was."""
        return self.correct / (self.n - self.nulls) if self.n > self.nulls else None

    @property
    def compensated(self) -> float:
        """A null counts a quarter."""
        return (self.correct + COMPENSATION * self.nulls) / self.n

    def to_json(self) -> dict[str, Any]:
        """Counts, shares and 95 % intervals (Wilson; Clopper-Pearson near 0 and 1)."""
        return {
            "group": self.group,
            "correct": self.correct,
            "n": self.n,
            "null": self.nulls,
            "strict": self.strict,
            "strict_interval": interval(self.correct, self.n),
            "null_rate": self.null_rate,
            "null_interval": interval(self.nulls, self.n),
            "answered": self.answered,
            "answered_interval": interval(self.correct, self.n - self.nulls) if self.n > self.nulls else None,
            "compensated": self.compensated,
        }


def interval(successes: int, trials: int) -> list[float]:
    """The 95 % interval of a share of independent items."""
    if min(successes, trials - successes) <= 5:
        found = statistics.clopper_pearson(successes, trials)
    else:
        found = statistics.wilson(successes, trials)
    return [found.low, found.high]


@dataclass(frozen=True)
class Scores:
    """All that one set of answers says under one scorer.

    Attributes:
        groups: `all`, difficulty, length, then one a domain (`domain: NAME`), those that occur.
        letters: how often each letter was said; `null` for none.
        gold: how often each letter is right.
        causes: how often each cause of a null occurred.
        asked_again: items of which a second reply is stored, None where the protocol asks once.
        re_asked: the groups with the second reply in place of a first one that held no answer: another protocol.
    """

    groups: tuple[Score, ...]
    letters: Mapping[str, int]
    gold: Mapping[str, int]
    causes: Mapping[str, int]
    asked_again: int | None = None
    re_asked: tuple[Score, ...] = ()

    @property
    def constant(self) -> tuple[str, float]:
        """The most frequent right letter of these items, and what always saying it scores."""
        letter = max(self.gold, key=lambda each: self.gold[each])
        return letter, self.gold[letter] / max(1, sum(self.gold.values()))

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        letter, share = self.constant
        return {
            "groups": [score.to_json() for score in self.groups],
            "letters": dict(self.letters),
            "gold": dict(self.gold),
            "causes": dict(self.causes),
            "constant_letter": {"letter": letter, "accuracy": share},
            "chance": 1 / len(LETTERS),
            **({} if self.asked_again is None else self._again()),
        }

    def _again(self) -> dict[str, Any]:
        return {"asked_again": self.asked_again, "re_asked": [score.to_json() for score in self.re_asked]}


def score(answers: Iterable[Mapping[str, Any]], scorer: Scorer, *, re_ask: bool = False) -> Scores:
    """Score answers.

    Difficulties other than `easy` count as `hard`, lengths other than `short` and `medium` as `long`, as upstream has
    it; an answer without them counts in no such group.

    Args:
        answers: of records.
        scorer: the rule that reads the first replies.
        re_ask: whether their protocol asks again, which is then scored beside it.
    """
    counts: dict[str, list[int]] = {}
    counts_again: dict[str, list[int]] = {}
    letters: Counter[str] = Counter()
    gold: Counter[str] = Counter()
    causes: Counter[str] = Counter()
    asked_again = 0
    for answer in answers:
        read = read_answer(answer, scorer)
        letters[read.letter or "null"] += 1
        gold[answer["gold"]] += 1
        if read.cause is not None:
            causes[read.cause] += 1
        groups = groups_of(answer)
        _count(counts, groups, read)
        if re_ask:
            asked_again += "response" in answer.get("re_asked", {})
            _count(counts_again, groups, read_re_asked(answer, read))
    order = [*GROUPS, *sorted(name for name in counts if name not in GROUPS)]
    return Scores(
        tuple(Score(group, *counts[group]) for group in order if group in counts),
        {name: letters[name] for name in (*LETTERS, "null")},
        {name: gold[name] for name in LETTERS},
        {cause: causes[cause] for cause in CAUSES if causes[cause]},
        asked_again if re_ask else None,
        tuple(Score(group, *counts_again[group]) for group in order if group in counts_again),
    )


def _count(counts: dict[str, list[int]], groups: Iterable[str], read: Read) -> None:
    for group in groups:
        row = counts.setdefault(group, [0, 0, 0])
        row[0] += read.right
        row[1] += 1
        row[2] += read.letter is None


def groups_of(answer: Mapping[str, Any]) -> list[str]:
    """The groups that an answer counts in."""
    groups = ["all"]
    if difficulty := answer.get("difficulty"):
        groups.append("easy" if difficulty == "easy" else "hard")
    if length := answer.get("length"):
        groups.append(length if length in ("short", "medium") else "long")
    if domain := answer.get("domain"):
        groups.append(f"domain: {domain}")
    return groups
