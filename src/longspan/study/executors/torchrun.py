"""Processes that torchrun started, on one machine or several: rank 0 runs the study, the others train with it.

All of them need the same folder of runs, on a file system that all machines share.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from longspan.foundation.errors import SubjectError, UserError
from longspan.foundation.plugins import load_file
from longspan.foundation.progress import Report, silent
from longspan.study.executors.base import Failed, Finished, Observe, one_by_one
from longspan.study.executors.processes import processes_of
from longspan.study.jobs import Job
from longspan.study.stages import execute, train_stage
from longspan.training.ranks import Ranks, joined


class TorchrunExecutor:
    """Rank 0's side: jobs one after the other, training ones with all ranks, the rest alone."""

    def __init__(self, ranks: Ranks, device: str) -> None:
        self.ranks, self.device = ranks, device
        self.training = False

    def run(self, jobs: Sequence[Job], runs: Path, observe: Observe, finished: Finished, failed: Failed) -> None:
        """See `Executor.run`."""

        def together(job: Job) -> dict[str, Any]:
            check_processes(job, self.ranks.size)

            def report(progress: Any) -> None:
                observe(job, progress)

            return execute(job, runs, report, self.device, train_with=self._train)

        one_by_one([job for job in jobs if not job.is_done(runs)], together, finished, failed)

    def _train(self, job: Job, folder: Path, runs: Path, report: Report) -> dict[str, Any]:
        self.training = True
        _tell((job, folder, runs))
        try:
            result = train_stage(job, folder, runs, report, self.device, _sharing(self.ranks, job))
        except SubjectError:
            # All ranks see it at the same step and wait for the next job.
            self.training = False
            raise
        self.training = False
        return result


def check_processes(job: Job, launched: int) -> None:
    """Refuse a training that asks for other processes than torchrun started.

    Raises:
        UserError: with what to do.
    """
    if processes_of(job) not in (1, launched):
        raise UserError(
            f"training.processes = {processes_of(job)} under torchrun with {launched} processes",
            "as many as torchrun starts, or none",
            "leave training.processes out",
        )


@contextmanager
def leading() -> Iterator[TorchrunExecutor]:
    """For rank 0: the executor, and an end for those that follow."""
    device = own_device()
    with joined(0, int(os.environ["WORLD_SIZE"]), torch.device(device)) as ranks:
        executor = TorchrunExecutor(ranks, device)
        try:
            yield executor
        finally:
            # In the middle of training the others have ended by themselves.
            if not executor.training:
                _tell(None)


def follow() -> None:
    """For every other rank: train whatever rank 0 trains, until it is done."""
    device = own_device()
    with joined(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), torch.device(device)) as ranks:
        while True:
            with ranks.noticing_loss():
                order: list[Any] = [None]
                dist.broadcast_object_list(order)
            if order[0] is None:
                return
            job, folder, runs = order[0]
            for plugin in job.details.get("plugins", ()):
                load_file(plugin)
            with suppress(SubjectError):
                train_stage(job, folder, runs, silent, device, _sharing(ranks, job))


def own_device() -> str:
    """This process's GPU; the CPU where there is none.

    Raises:
        UserError: more processes on this machine than GPUs.
    """
    if not torch.cuda.is_available():
        return "cpu"
    local, found = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if local >= found:
        raise UserError(
            f"process {local + 1} on a machine with {found} GPUs",
            "one process for each GPU",
            f"start torchrun with --nproc-per-node {found}",
        )
    return f"cuda:{local}"


def _sharing(ranks: Ranks, job: Job) -> Ranks:
    return replace(ranks, parallel=job.details["parallel"])


def _tell(order: Any) -> None:
    dist.broadcast_object_list([order])
