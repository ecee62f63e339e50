"""Rows of which the right answers are known, and a subject that knows them where it is shown them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from longspan.probes.base import Probe, make_probe

Ask = Callable[..., list[Any]]


def rows() -> list[dict[str, Any]]:
    """All twelve cells of difficulty and length twice over; one document with a place in it, one over-long."""
    made = []
    for number in range(12):
        letter = "ABCD"[number % 4]
        text = (
            f"In room {number} the speaker asks the house. " * 8
            + f"The word is key{number}. "
            + "The house answers. " * 24
        )
        if number == 3:
            text += " It costs $Q$."
        if number == 5:
            text *= 12
        made.append(
            {
                "_id": f"id{number:02d}",
                "domain": ("Single-Document QA", "Code Repository Understanding")[number % 2],
                "sub_domain": "Legal",
                "difficulty": ("easy", "hard")[number % 2],
                "length": ("short", "medium", "long")[number // 2 % 3],
                "question": f"Which word is in room {number}?",
                **{f"choice_{each}": f"key{number}" if each == letter else f"no{each}" for each in "ABCD"},
                "answer": letter,
                "context": text,
            }
        )
    return made


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("longbench") / "data.json"
    path.write_text(json.dumps(rows()), encoding="utf-8")
    return path


@pytest.fixture
def probe(file: Path) -> Callable[..., Probe]:
    def make(**settings: Any) -> Probe:
        return make_probe("longbench_v2", {"data": str(file), "max_new_tokens": 32, **settings})

    return make


def know(prompt: str) -> str:
    """Right where the word is in what is shown of the document."""
    number = prompt.rsplit("Which word is in room ", 1)[1].split("?")[0]
    if f"The word is key{number}." in prompt:
        letter = prompt.rsplit(f") key{number}\n", 1)[0][-1]
        return f"The correct answer is ({letter})."
    return "I cannot say."


def by(summary: Any, metric: str, x: float | None = None) -> float:
    return next(m.value for m in summary.measurements if m.metric == metric and (x is None or m.x == x))
