"""Ada-LEval's items from files that the user has: BestAnswer (`stackselect_*.json`) and TSort (`textsort_*.json`)."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from longspan.foundation.errors import DataError
from longspan.probes.ada_leval.extraction import PIECES, SAMPLE_CANDIDATE
from longspan.probes.benchmark_files import read_rows

Task = Literal["best_answer", "tsort"]
FIELDS: Mapping[Task, tuple[str, ...]] = {
    "best_answer": ("question_id", "question", "all_answers", "answer"),
    "tsort": ("book_id", "para_offset", "answer", "prompt"),
}


@dataclass(frozen=True)
class AdaItem:
    """One question.

    Attributes:
        id: as upstream indexes it.
        document: of the question or book: the unit of resampling.
        prompt: the user's message.
        gold: `A7`, or the order as a list.
        candidates: how many there are to choose from; None for TSort.
    """

    id: str
    document: str
    prompt: str
    gold: str | list[int]
    candidates: int | None


def read_items(path: Path, task: Task) -> list[AdaItem]:
    """The items of a file in its order.

    Raises:
        UserError: no such file.
        DataError: a row that is not of the task; names it.
    """
    path = path.expanduser()
    changed = path.stat().st_mtime_ns if path.is_file() else 0
    return _read(path, changed, task)


@lru_cache(maxsize=2)
def _read(path: Path, changed: int, task: Task) -> list[AdaItem]:
    del changed
    rows = read_rows(path, FIELDS[task], f"Ada-LEval's {task} items")
    make = _best_answer if task == "best_answer" else _tsort
    return [make(row, f"{path}: row {number}") for number, row in enumerate(rows, start=1)]


def best_answer_prompt(question: str, answers: Sequence[str]) -> str:
    """The message: what to do, the question, the candidates by number, and what to do once more.

    In the order and with the sample designation of the official prompt; worded here, since its repository has no
    licence.
    """
    task = (
        "Choose, among the answers listed below, the one that helps most with the question. "
        f'Reply with its designation alone, for example "{SAMPLE_CANDIDATE}".'
    )
    listed = "".join(f"A{number}:\n\n{text}\n\n" for number, text in enumerate(answers, start=1))
    return (
        f"{task}\n\nThe question is given below.\n\n{question}\n\nPossible answers are given below.\n\n{listed}"
        f"Which of these answers helps most with the question? Give only the designation of the MOST helpful answer."
    )


def _best_answer(row: Mapping[str, Any], where: str) -> AdaItem:
    answers, gold = row["all_answers"], row["answer"]
    names = [f"A{number}" for number in range(1, len(answers) + 1)] if isinstance(answers, list) else []
    if gold not in names:
        raise DataError(
            f"{where}: answer {gold!r} with {len(names)} candidates", "one of A1, A2, …", "get the file again"
        )
    name = str(row["question_id"])
    prompt = best_answer_prompt(str(row["question"]), [str(each) for each in answers])
    return AdaItem(f"{name}_{gold}", name, prompt, gold, len(names))


def _tsort(row: Mapping[str, Any], where: str) -> AdaItem:
    gold = row["answer"]
    if isinstance(gold, str):
        try:
            gold = json.loads(gold)
        except json.JSONDecodeError:
            gold = None
    if not isinstance(gold, list) or sorted(gold) != list(range(1, PIECES + 1)):
        raise DataError(f"{where}: answer {row['answer']!r}", "an order of 1, 2, 3 and 4", "get the file again")
    offsets = "_".join(map(str, row["para_offset"]))
    return AdaItem(f"{row['book_id']}_{offsets}", str(row["book_id"]), str(row["prompt"]), gold, None)
