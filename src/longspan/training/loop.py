"""Training a model from its first step, or from where it was interrupted, to its result."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from longspan.foundation.errors import Stopped, UserError
from longspan.foundation.files import digest
from longspan.foundation.progress import Progress, Report, silent
from longspan.foundation.randomness import stream_seed
from longspan.training.batches import ResumableBatches
from longspan.training.checkpoint import (
    load_weights,
    recover_checkpoint,
)
from longspan.training.config import TrainingConfig
from longspan.training.identity import claim, run_configuration
from longspan.training.interruption import Interruption
from longspan.training.ranks import ALONE, Ranks
from longspan.training.result import TrainingResult
from longspan.training.run import Run
from longspan.training.trackers import Tracker

if TYPE_CHECKING:
    from longspan.corpus.packing import Batch
    from longspan.models.language_model import LanguageModel
    from longspan.models.segments import Isolation

__all__ = ["TrainingConfig", "TrainingResult", "train"]


def train(
    model: LanguageModel,
    training: TrainingConfig,
    *,
    make_batches: Callable[[], ResumableBatches],
    validation: Callable[[], Iterable[Batch]],
    isolation: Isolation,
    token_bytes: np.ndarray,
    directory: Path,
    device: torch.device | str = "cpu",
    report: Report = silent,
    trackers: Sequence[Tracker] = (),
    configuration: Mapping[str, Any] | None = None,
    ranks: Ranks = ALONE,
    clock: Callable[[], float] = time.perf_counter,
) -> TrainingResult:
    """Train `model` in place, or go on where an interrupted run in `directory` stopped.

    A run that was killed at any instant and is started again ends as an uninterrupted one: on CPU bit for bit, in
    weights and in `metrics.jsonl` (but for its timings). Afterwards the model holds the last weights; the best are in
    `checkpoints/best` (`load_weights`).

    Several processes train one model when each calls this with equal arguments and its own `ranks` and `device`: every
    batch is that of one process, each rank computes its rows of it, and the update is the same but for rounding. They
    may go on from a checkpoint of any number of processes.

    Args:
        model: freshly built from its own seed, fp32; it is moved to `device`.
        make_batches: a fresh stream of training batches, each (training.rows, training.context).
        validation: one pass over the whole validation split.
        isolation: what is kept apart at document boundaries.
        token_bytes: (V,) UTF-8 bytes per token id.
        directory: gets `metrics.jsonl`, `checkpoints/{last,best}/`, `configuration.json` and, last, `result.json`.
        report: called after every step; it may raise `Stopped`.
        configuration: what else determines the run (corpus, packing, …); JSON values, kept in every checkpoint.
        ranks: this process among those that train together; rank 0 alone reports, tracks and writes.
        clock: seconds, for tests.

    Raises:
        UserError: `directory` belongs to another configuration, or a setting is impossible here.
        DivergenceError: a loss or gradient is not finite; the weights from before that step are untouched.
        Stopped: the user asked to stop; a checkpoint was written and the same call goes on from it.
        DataError: a file is damaged or the disk is full; the last checkpoint is still there.
        LostRank: another process of the run has ended.
    """
    device = torch.device(device)
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"device = {device}", "cpu or cuda", "train on one of these")
    if str(device) == "cuda":
        # The feed's thread has a current device of its own.
        device = torch.device("cuda", torch.cuda.current_device())
    model.to(device)
    whole = run_configuration(model, training, isolation=isolation, device=device, more=configuration)
    training.check_shares(ranks.size)
    ranks.check_equal(digest(whole), "configurations")
    last = directory / "checkpoints" / "last"

    def is_done() -> bool:
        directory.mkdir(parents=True, exist_ok=True)
        claim(directory, whole)
        for name in ("last", "best"):
            recover_checkpoint(directory / "checkpoints" / name)
        # Without its last weights a run is trained again, as it is where somebody removed them.
        return (directory / "result.json").exists() and last.exists()

    if ranks.on_first(is_done):
        load_weights(last, model)
        return TrainingResult.read(directory / "result.json")
    # Dropout draws from torch's global generators; the caller's stay as they were.
    with (
        torch.random.fork_rng(devices=[device] if device.type == "cuda" else []),
        Interruption() as interruption,
        ranks.noticing_loss(),
    ):
        # Each rank drops other activations.
        torch.manual_seed(stream_seed(training.seed, "training", *([ranks.rank] if ranks.rank else [])))

        def listen(progress: Progress, /) -> None:
            requested = False
            try:
                if ranks.is_first:
                    report(progress)
            except (KeyboardInterrupt, Stopped):
                requested = True
            if ranks.agreed(requested or interruption.requested):
                raise Stopped("asked to stop")

        run = Run(
            model=model,
            training=training,
            batches=make_batches(),
            validation=validation,
            isolation=isolation,
            token_bytes=token_bytes,
            directory=directory,
            device=device,
            report=listen,
            trackers=trackers if ranks.is_first else (),
            configuration=whole,
            ranks=ranks,
            clock=clock,
        )
        return run.to_end()
