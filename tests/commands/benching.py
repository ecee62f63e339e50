"""Tiny settings of `longspan bench`, and results that nobody measured."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from longspan.commands.bench.ceilings import Ceilings
from longspan.commands.bench.measured import Measured
from longspan.commands.bench.plan import Task
from longspan.commands.bench.setting import read_setting

TINY: dict[str, Any] = {
    "patterns": "AM,MM", "contexts": "32", "parameters": "130k", "device": "cpu", "dtype": None, "seconds": 0.01,
    "vocab_size": 258, "batch_tokens": 64, "new_tokens": 3,
}  # fmt: skip


AT_BEST = Ceilings("", 1e12, 1e11)


PEER: Any = SimpleNamespace(name="a peer", same_weights=True)


def tiny(**changes: Any) -> Any:
    return read_setting(**{**TINY, **changes})


def measured(task: Task) -> list[Measured]:
    cell = task.cell
    return [Measured(cell.pattern, cell.context, part, cell.who, 1, (1000.0, 3000.0)) for part in task.parts]
