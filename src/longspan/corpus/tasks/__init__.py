"""Synthetic tasks with known answers, one file each, chosen in a study by `corpus: {source: task, task: NAME}`."""

from __future__ import annotations

from longspan.corpus.tasks.base import Example, Task, Vocabulary, make_task, register, registered
from longspan.corpus.tasks.batches import TaskBatches, validation_batches

__all__ = [
    "Example",
    "Task",
    "TaskBatches",
    "Vocabulary",
    "make_task",
    "register",
    "registered",
    "validation_batches",
]
