"""Batches of task strings: fresh in every training step, fixed for validation.

A batch is a pure function of (seed, step), so that going on from a checkpoint is exact and nothing is ever shown twice.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from longspan.corpus.packing.batches import IGNORE, Batch, check_identity
from longspan.corpus.packing.config import PackingConfig
from longspan.corpus.tasks.base import Example, Task
from longspan.foundation.errors import UserError
from longspan.foundation.randomness import numpy_generator

VALIDATION_STRINGS = 1024
"""Strings of the fixed validation set, the same for every subject."""
VALIDATION_SEED = 0


class TaskBatches(Iterator[Batch]):
    """Training batches without end.

    With packing `concat` a row is filled with one string after another; the last one is cut and has no loss, as
    published for copying. With `one_per_row` a row holds one string and padding.

    Args:
        task: what is drawn.
        packing: `concat` or `one_per_row`.
        context: positions of a row.
        rows: of a batch.
        seed: of all draws.

    Raises:
        UserError: a task for asking only, a packing without meaning for it, or rows too short for the longest string.
    """

    def __init__(self, task: Task, packing: PackingConfig, *, context: int, rows: int, seed: int) -> None:
        check_task(task, packing, context)
        self._rows = _Rows(task, packing, context)
        self._num_rows, self._seed = rows, seed
        self._identity = {
            "task": task.model_dump(mode="json"),
            "packing": packing.model_dump(mode="json"),
            "context": context,
            "rows": rows,
            "seed": seed,
        }
        self._step = 0

    def __next__(self) -> Batch:
        """The next batch."""
        generator = numpy_generator(self._seed, "task", self._step)
        step = self._step
        self._step += 1
        return self._rows.fill(self._num_rows, lambda: self._rows.draw(generator, step))

    def state_dict(self) -> dict[str, Any]:
        """How many batches went out, and the ledger so far; JSON-able."""
        return {"identity": self._identity, "step": self._step, "counts": dict(self._rows.counts)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on exactly where `state` was taken.

        Raises:
            UserError: the state is of another task or other settings.
        """
        check_identity(state["identity"], self._identity)
        self._step = state["step"]
        self._rows.counts = dict(state["counts"])

    def ledger(self) -> dict[str, Any]:
        """What went out: batches, rows, positions, padding, strings whose answer carried loss, cut ones, targets."""
        return {"batches": self._step, **self._rows.counts}


def validation_batches(
    task: Task, packing: PackingConfig, *, context: int, rows: int, strings: int = VALIDATION_STRINGS
) -> Iterator[Batch]:
    """A fixed set of whole strings, the same whatever is trained; strings have distinct numbers in `doc_id`.

    With packing `concat` rows are as full as in training, and a string that a row has no room for opens the next one.
    """
    check_task(task, packing, context)
    return _validation(_Rows(task, packing, context), packing, context, rows, strings)


def _validation(maker: _Rows, packing: PackingConfig, context: int, rows: int, strings: int) -> Iterator[Batch]:
    generator = numpy_generator(VALIDATION_SEED, "task validation")
    drawn = [maker.draw(generator, None) for _ in range(strings)]
    row: list[tuple[int, Example]] = []
    filled: list[list[tuple[int, Example]]] = []
    for number, example in enumerate(drawn):
        used = sum(len(each.inputs) for _, each in row)
        if row and (packing.method == "one_per_row" or used + len(example.inputs) > context):
            filled.append(row)
            row = []
        row.append((number, example))
    filled.append(row)
    for start in range(0, len(filled), rows):
        yield maker.lay_out(filled[start : start + rows], rows)


def check_task(task: Task, packing: PackingConfig, context: int) -> None:
    """Refuse what no training of this task can be.

    Raises:
        UserError: see `TaskBatches`.
    """
    if not task.trainable:
        raise UserError(f"{task.task} as a corpus to train on", "it is for asking only", "train on copy, and ask it")
    if packing.method not in ("concat", "one_per_row"):
        raise UserError(
            f"packing.method = {packing.method} for the task {task.task}",
            "concat (many strings in a row) or one_per_row",
            "choose one of these",
        )
    if packing.overlap or packing.loss_crosses_boundary:
        name = "overlap" if packing.overlap else "loss_crosses_boundary"
        raise UserError(f"packing.{name} for the task {task.task}", "loss on answers only, each once", f"remove {name}")
    task.check_context(context)


class _Rows:
    """Lays strings into rows, and counts."""

    def __init__(self, task: Task, packing: PackingConfig, context: int) -> None:
        self._task, self._context = task, context
        self._pad = task.vocabulary().pad
        self._alone = packing.method == "one_per_row"
        self.counts = dict.fromkeys(("rows", "positions", "padding", "strings", "cut", "targets"), 0)

    def draw(self, generator: np.random.Generator, step: int | None) -> Example:
        return self._task.example(generator, self._task.draw_size(generator, step))

    def fill(self, num_rows: int, draw: Any) -> Batch:
        rows: list[list[tuple[int, Example]]] = []
        for _ in range(num_rows):
            row: list[tuple[int, Example]] = []
            used = 0
            while used < self._context and not (self._alone and row):
                example = draw()
                row.append((len(row), example))
                used += len(example.inputs)
            rows.append(row)
        return self.lay_out(rows, num_rows)

    def lay_out(self, rows: list[list[tuple[int, Example]]], num_rows: int) -> Batch:
        shape = (num_rows, self._context)
        tokens, targets = np.full(shape, self._pad, np.int32), np.full(shape, IGNORE, np.int32)
        doc_id = np.full(shape, -1, np.int32)
        samples = 0
        for place, row in enumerate(rows):
            at = 0
            for number, example in row:
                end = min(at + len(example.inputs), self._context)
                tokens[place, at:end] = example.inputs[: end - at]
                doc_id[place, at:end] = number
                if end - at == len(example.inputs):
                    targets[place, at:end] = example.labels
                    samples += 1
                else:
                    self.counts["cut"] += 1
                at = end
        self.counts["rows"] += num_rows
        self.counts["positions"] += doc_id.size
        self.counts["padding"] += int((doc_id < 0).sum())
        self.counts["strings"] += samples
        self.counts["targets"] += int((targets != IGNORE).sum())
        return Batch(tokens=tokens, targets=targets, doc_id=doc_id, samples=samples)
