"""What is measured of LongBench-v2, and how a record is read for it: pure, without a model."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import numpy as np

from longspan.probes.base import credit
from longspan.probes.longbench_v2.extraction import LETTERS, Scorer
from longspan.probes.longbench_v2.nulls import CAUSES
from longspan.probes.longbench_v2.scores import COMPENSATION, groups_of, read_answer, read_re_asked
from longspan.records.measures import Kind
from longspan.records.observation import Metric, Observation
from longspan.records.store import Record

Better = Literal["higher", "lower"]
SLICES = ("easy", "hard", "short", "medium", "long")


def metrics_of(*, re_ask: bool) -> tuple[Metric, ...]:
    """In order of importance; slices and ledger are shown and not compared."""
    chance = 1 / len(LETTERS)

    def main(name: str, title: str, *, better: Better = "higher", chance: float | None = None) -> Metric:
        return Metric(name, title, "", "proportion", better, x_name="context", chance=chance)

    def detail(name: str, title: str, kind: Kind = "proportion") -> Metric:
        return Metric(name, title, "", kind, "higher", x_name="context", compare=False, detail=True)

    return (
        main("accuracy", "Accuracy (strict)", chance=chance),
        main("null_rate", "No answer", better="lower"),
        detail("answered", "Accuracy on answered"),
        detail("compensated", "Compensated accuracy"),
        *(
            (
                main("accuracy_re_asked", "Accuracy (strict), asked again", chance=chance),
                main("null_rate_re_asked", "No answer, asked again", better="lower"),
            )
            if re_ask
            else ()
        ),
        main("letter_accuracy", "Accuracy by likelihood", chance=chance),
        main("letter_accuracy_calibrated", "Accuracy by likelihood over the prior", chance=chance),
        *(
            Metric(
                f"cause_{cause}",
                f"No answer: {cause.replace('_', ' ')}",
                "",
                "proportion",
                "lower",
                x_name="context",
                compare=False,
                detail=True,
                sparse=True,
            )
            for cause in CAUSES
        ),
        detail("fully_visible", "Whole document seen"),
        detail("kept_fraction", "Share of document seen", "ratio"),
        detail("accuracy_visible", "Accuracy, whole document seen"),
        *(detail(f"accuracy_{name}", f"Accuracy, {name}") for name in SLICES),
        *(detail(f"said_{letter}", f"Said {letter}") for letter in LETTERS),
        *(detail(f"right_{letter}", f"{letter} is right") for letter in LETTERS),
    )


def observations(record: Record, scorer: Scorer, *, re_ask: bool) -> Iterator[Observation]:
    """Right, null, answered, compensated, by slice; how much of the document was seen; which letter was said."""
    answer = record.answer
    if "response" not in answer:
        return
    x = None if answer.get("context") is None else float(answer["context"])
    copy = answer.get("copy", 1)
    item = answer["id"] if copy == 1 else f"{answer['id']}#{copy}"
    cluster = str(answer.get("document") or answer["id"])

    def seen(metric: str, numerator: float) -> Observation:
        return Observation(record.subject, record.seed, item, cluster, metric, x, numerator, 1.0)

    read = read_answer(answer, scorer)
    right, null = float(read.right), float(read.letter is None)
    yield seen("accuracy", right)
    yield seen("null_rate", null)
    yield seen("compensated", right + COMPENSATION * null)
    if re_ask:
        again = read_re_asked(answer, read)
        yield seen("accuracy_re_asked", float(again.right))
        yield seen("null_rate_re_asked", float(again.letter is None))
    if not null:
        yield seen("answered", right)
    for group in groups_of(answer):
        if group in SLICES:
            yield seen(f"accuracy_{group}", right)
    for cause in CAUSES:
        yield seen(f"cause_{cause}", float(read.cause == cause))
    for letter in LETTERS:
        yield seen(f"said_{letter}", float(read.letter == letter))
        yield seen(f"right_{letter}", float(answer["gold"] == letter))
    if "letters" in answer:
        letters_4, right_one = np.array(answer["letters"]), LETTERS.index(answer["gold"])
        yield seen("letter_accuracy", credit(letters_4, right_one))
        if "letters_prior" in answer:
            over_4 = letters_4 - np.array(answer["letters_prior"])
            yield seen("letter_accuracy_calibrated", credit(over_4, right_one))
    if "fully_visible" in (ledger := answer.get("truncation", {})):
        yield seen("fully_visible", float(ledger["fully_visible"]))
        yield seen("kept_fraction", ledger["kept_fraction"])
        if ledger["fully_visible"]:
            yield seen("accuracy_visible", right)
