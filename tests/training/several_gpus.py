"""Trains one small model again and again with all processes that torchrun started, one for each GPU:

    python -m torch.distributed.run --standalone --nproc-per-node 2 several_gpus.py FOLDER

With `lost` after the folder it trains once, and process 1 kills itself on the way.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import small_run as small
import torch

from longspan.corpus.packing import Batch
from longspan.foundation.errors import Stopped
from longspan.foundation.progress import Progress
from longspan.foundation.randomness import numpy_generator
from longspan.training import distributed
from longspan.training.ranks import ALONE, Ranks, joined

CONTEXT, STEPS, STOPPED_AT = 256, 12, 7
LOST_AT = 8
"""The batch at which process 1 kills itself; graphs are replayed from the third on."""
# name → how the model is shared, micro-batches a step, and whether layers are gathered again for the backward pass.
RUNS: dict[str, tuple[str, int, bool]] = {
    "fsdp": ("fsdp", 1, False),
    "fsdp, accumulating": ("fsdp", 4, False),
    "fsdp, gathered twice": ("fsdp", 1, True),
    "fsdp, gathered twice, accumulating": ("fsdp", 4, True),
    "ddp, accumulating": ("ddp", 4, False),
}


def documents(rows: int, last: int | None = None) -> Any:
    """Rows of documents whose number and boundaries change from row to row; whoever draws batch `last` dies."""

    def make(number: int) -> Batch:
        if number == last:
            os.kill(os.getpid(), signal.SIGKILL)
        generator = numpy_generator(5, "documents", number)
        whole = small.rows_of(rows, CONTEXT, generator)
        starts = generator.random((rows, CONTEXT)) < 1 / 40
        return Batch(whole.tokens, whole.targets, starts.cumsum(1).astype(np.int32))

    return small.Stream(make)


def validation() -> Iterator[Batch]:
    return iter([next(documents(4)) for _ in range(3)])


def run(
    folder: Path, device: torch.device, ranks: Ranks, accumulation: int = 1, graph: bool = True, **more: Any
) -> None:
    training = small.settings(
        context=CONTEXT,
        batch_tokens=8 * CONTEXT,
        accumulation=accumulation,
        steps=STEPS,
        # Twice while there are no graphs, and between replays.
        evaluate_every=2,
        checkpoint_every=50,
        log_every=1,
        compile=False,
        graph=graph,
        parallel=ranks.parallel,
    )
    sizes = {"width": 64, "heads": 4, "mamba_head_dim": 16, "state": 16, "chunk": 64}
    net = small.model(pattern="AM", **sizes)
    make = {"batches": lambda: documents(training.rows), "validation": validation}
    small.run(folder, training, net, device=device, ranks=ranks, **{**make, **more})


def stop(progress: Progress, /) -> None:
    if progress.stage == "train" and progress.done == STOPPED_AT * 8 * CONTEXT:
        raise Stopped("enough")


def main(folder: Path, lost: bool) -> None:
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    # Every layer is a unit of its own.
    distributed.UNIT_BYTES = 1
    limit = distributed.GATHERED_BYTES
    with joined(rank, size, device) as ranks:
        if lost:
            last = LOST_AT if rank == 1 else None
            run(folder, device, replace(ranks, parallel="fsdp"), batches=lambda: documents(8, last))
        if rank == 0:
            run(folder / "alone", device, ALONE, graph=False)
            run(folder / "alone, accumulating", device, ALONE, 4, graph=False)
        for name, (parallel, accumulation, twice) in RUNS.items():
            distributed.GATHERED_BYTES = 0 if twice else limit
            run(folder / name, device, replace(ranks, parallel=parallel), accumulation)
            if rank == 0:
                print(f"trained: {name}", flush=True)
        try:
            run(folder / "stopped, accumulating", device, replace(ranks, parallel="fsdp"), 4, report=stop)
        except Stopped:
            if rank == 0:
                run(folder / "stopped, accumulating", device, ALONE, 4, graph=False)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:] == ["lost"])
