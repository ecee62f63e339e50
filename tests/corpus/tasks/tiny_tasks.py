"""The tasks at sizes that a test draws thousands of, and strings of them."""

from __future__ import annotations

import numpy as np

from longspan.corpus.tasks import Example, Task, make_task

SMALL: dict[str, dict[str, object]] = {
    "copy": {},
    "prefix_ngram": {"ngram": 3},
    "suffix_ngram": {"ngram": [2, 4]},
    "duplicate_ngram": {"ngram": 2},
    "mqar": {"vocab_size": 128, "length": 64, "pairs": [4, 8]},
    "induction": {"min_length": 16, "max_length": 32},
    "selective_copy": {"tokens": 4, "min_length": 12, "max_length": 20},
}


def task_of(name: str, **more: object) -> Task:
    return make_task({"task": name, **SMALL[name], **more}, "corpus")


def draw(task: Task, seed: int, size: int | None = None) -> Example:
    generator = np.random.default_rng(seed)
    return task.example(generator, task.draw_size(generator, 0) if size is None else size)


def text(task: Task, ids: np.ndarray) -> str:
    symbols = task.vocabulary().symbols
    return task.vocabulary().separator.join(symbols[i] for i in ids)
