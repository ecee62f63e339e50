"""A run of seconds that every training test shares; as a script it makes one run in a process that it kills again
and again, and one that is left alone.

    python small_run.py KILLED STRAIGHT
"""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from longspan.corpus.packing import Batch
from longspan.foundation.progress import silent
from longspan.foundation.randomness import numpy_generator
from longspan.models.language_model import IGNORE, LanguageModel, ModelConfig
from longspan.training.config import TrainingConfig
from longspan.training.loop import train
from longspan.training.ranks import joined
from longspan.training.result import TrainingResult

VOCAB = 32
CONTEXT = 16


class Stream:
    """An endless stream of batches, each made from its number."""

    def __init__(self, make: Callable[[int], Batch]) -> None:
        self.make, self.taken = make, 0

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        self.taken += 1
        return self.make(self.taken - 1)

    def state_dict(self) -> dict[str, Any]:
        return {"taken": self.taken}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.taken = state["taken"]


class Rows(Stream):
    """Rows of two documents each; learnable, since every token fixes the next."""

    def __init__(self, rows: int, seed: int = 0, context: int = CONTEXT) -> None:
        super().__init__(lambda number: rows_of(rows, context, numpy_generator(seed, "rows", number)))


def rows_of(rows: int, context: int, generator: np.random.Generator) -> Batch:
    start = generator.integers(0, VOCAB, (rows, 1))
    stride = generator.integers(1, 3, (rows, 1))
    tokens = ((start + stride * np.arange(context + 1)) % VOCAB).astype(np.int32)
    doc_id = np.repeat((np.arange(context + 1) >= context // 2).astype(np.int32)[None], rows, 0)
    targets = tokens[:, 1:].copy()
    targets[doc_id[:, 1:] != doc_id[:, :-1]] = IGNORE
    return Batch(tokens[:, :-1].copy(), targets, doc_id[:, :-1].copy())


def model(seed: int = 0, **changes: Any) -> LanguageModel:
    settings: dict[str, Any] = {"pattern": "AM", "width": 16, "heads": 2, "state": 4, "mamba_head_dim": 8, "chunk": 8}
    return LanguageModel(ModelConfig(**{**settings, **changes}), VOCAB, seed)


def settings(**changes: Any) -> TrainingConfig:
    basis: dict[str, Any] = {
        "context": CONTEXT,
        "batch_tokens": 8 * CONTEXT,
        "accumulation": 2,
        "steps": 12,
        "peak_lr": 1e-2,
        "warmup": 2,
        "evaluate_every": 5,
        "checkpoint_every": 4,
        "log_every": 3,
        "dtype": "fp32",
    }
    return TrainingConfig(**{**basis, **changes})


def run(
    directory: Path,
    training: TrainingConfig | None = None,
    net: LanguageModel | None = None,
    batches: Callable[[], Any] | None = None,
    **more: Any,
) -> TrainingResult:
    training = training or settings()
    arguments: dict[str, Any] = {
        "make_batches": batches or (lambda: Rows(training.rows)),
        "validation": lambda: (rows_of(4, CONTEXT, numpy_generator(9, i)) for i in range(2)),
        "isolation": "full",
        "token_bytes": np.ones(VOCAB, dtype=np.int32),
        "directory": directory,
    }
    return train(net or model(dropout=0.1), training, **{**arguments, **more})


def together(directory: Path, size: int, training: TrainingConfig | None = None, **more: Any) -> list[Any]:
    """`run` by `size` processes that train one model; what each returned or raised, or how it was killed, by rank.

    `more` goes to `run`; `report_of` is asked by rank.
    """
    training = training or settings()
    report_of = more.pop("report_of", lambda rank: silent)
    directory.mkdir(parents=True, exist_ok=True)
    meeting = directory / f".meeting-{time.monotonic_ns()}"
    pipes = []
    for rank in range(size):
        mine, theirs = multiprocessing.Pipe(duplex=False)
        child = os.fork()
        if child == 0:
            torch.set_num_threads(1)
            try:
                device = torch.device("cpu")
                with joined(rank, size, device, training.parallel, meeting=f"file://{meeting}") as ranks:
                    outcome: Any = run(directory, training, ranks=ranks, report=report_of(rank), **more)
            except Exception as error:
                outcome = error
            theirs.send(outcome)
            os._exit(0)
        theirs.close()
        pipes.append((child, mine))
    outcomes = []
    for child, pipe in pipes:
        try:
            outcomes.append(pipe.recv())
        except EOFError:
            outcomes.append(None)
        os.waitpid(child, 0)
    return outcomes


def kill_until_done(directory: Path, training: TrainingConfig, kills: int, chance: random.Random) -> int:
    """Run in child processes; SIGKILL the first `kills` of them at random moments. Returns how many were hit."""
    hit = 0
    while not (directory / "result.json").exists():
        child = os.fork()
        if child == 0:
            run(directory, training)
            os._exit(0)
        if kills:
            kills -= 1
            time.sleep(chance.uniform(0.0, 0.4))
            os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        hit += os.WIFSIGNALED(status)
        assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return hit


if __name__ == "__main__":
    torch.set_num_threads(1)
    chosen = settings(steps=30, checkpoint_every=3, evaluate_every=7, log_every=2)
    killed, straight = map(Path, sys.argv[1:])
    print(kill_until_done(killed, chosen, 6, random.Random(0)))
    kill_until_done(straight, chosen, 0, random.Random(0))
