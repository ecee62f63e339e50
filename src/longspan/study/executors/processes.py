"""One training job in several processes of this machine, each on a device of its own; this one watches over them."""

from __future__ import annotations

import multiprocessing
import os
import signal
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import TYPE_CHECKING, Any

from longspan.foundation.errors import Stopped, UserError, sendable
from longspan.foundation.failures import killed_process
from longspan.foundation.machine import available_cores
from longspan.foundation.plugins import load_file
from longspan.foundation.progress import Progress, Report
from longspan.study.jobs import Job
from longspan.study.stages import Train, train_stage
from longspan.training.config import Parallel
from longspan.training.ranks import LostRank, joined

if TYPE_CHECKING:
    from multiprocessing.context import SpawnProcess

POLL_SECONDS = 0.2
GRACE_SECONDS = 10.0
"""How long the others may take to end by themselves when one has failed; waiting for a dead one on a GPU never ends."""


def processes_of(job: Job) -> int:
    """How many processes do this job together."""
    return int(job.details.get("processes", 1)) if job.kind == "train" else 1


def together(job: Job, devices: Sequence[str]) -> Train | None:
    """How to train on these devices; None where one process does it alone.

    Raises:
        UserError: FSDP for one process.
    """
    parallel: Parallel = job.details.get("parallel", "ddp")
    if processes_of(job) == 1:
        if job.kind == "train" and parallel != "ddp":
            raise UserError(
                f"training.parallel = {parallel} with one process",
                "it together with training.processes of 2 or more, or torchrun",
                "raise training.processes, or remove training.parallel",
            )
        return None

    def train_with(job: Job, folder: Path, runs: Path, report: Report) -> dict[str, Any]:
        with tempfile.TemporaryDirectory(prefix="longspan-") as place:
            members = _Members(
                job, folder, runs, tuple(devices[: processes_of(job)]), parallel, Path(place) / "meeting"
            )
            return members.watch(report)

    return train_with


@dataclass
class _Members:
    """The processes of one job, and what they have said so far."""

    job: Job
    folder: Path
    runs: Path
    devices: tuple[str, ...]
    parallel: Parallel
    meeting: Path
    processes: list[SpawnProcess] = field(default_factory=list)
    pipes: list[Connection] = field(default_factory=list)
    result: dict[str, Any] = field(default_factory=dict)
    errors: list[Exception] = field(default_factory=list)

    def watch(self, report: Report) -> dict[str, Any]:
        """Run them to their end and return the result; one that fails takes the others with it."""
        context = multiprocessing.get_context("spawn")
        stop = context.Event()
        try:
            for rank in range(len(self.devices)):
                mine, theirs = context.Pipe(duplex=False)
                arguments = (self.job, self.folder, self.runs, rank, self.devices, self.parallel, self.meeting)
                process = context.Process(target=_member, args=(*arguments, theirs, stop), name=f"rank {rank}")
                process.start()
                theirs.close()
                self.processes.append(process)
                self.pipes.append(mine)
            deadline: float | None = None
            while self.pipes and (deadline is None or time.monotonic() < deadline):
                for pipe in wait(self.pipes, timeout=POLL_SECONDS):
                    assert isinstance(pipe, Connection)
                    try:
                        self._hear(pipe, report)
                    except Stopped:
                        stop.set()
                if self.errors and deadline is None:
                    deadline = time.monotonic() + GRACE_SECONDS
        finally:
            for process in self.processes:
                process.kill()
                process.join()
        if self.errors:
            raise min(self.errors, key=lambda error: isinstance(error, LostRank))
        return self.result

    def _hear(self, pipe: Connection, report: Report) -> None:
        """Take one message; the end of a pipe without a last word is a process that was killed."""
        try:
            kind, content = pipe.recv()
        except (EOFError, OSError):
            self.pipes.remove(pipe)
            self.errors.append(killed_process(self.job.title))
            return
        if kind == "progress":
            report(content)
            return
        self.pipes.remove(pipe)
        if kind == "error":
            self.errors.append(content)
        elif content:
            self.result = content


def _member(
    job: Job,
    folder: Path,
    runs: Path,
    rank: int,
    devices: tuple[str, ...],
    parallel: Parallel,
    meeting: Path,
    pipe: Connection,
    stop: Any,
) -> None:
    import torch

    # Ctrl-C reaches the whole process group; only the parent decides when to stop.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(max(1, min(torch.get_num_threads(), available_cores() // len(devices))))

    def report(progress: Progress) -> None:
        if stop.is_set():
            raise Stopped(Stopped.GO_ON)
        pipe.send(("progress", progress))

    try:
        for plugin in job.details.get("plugins", ()):
            load_file(plugin)
        with joined(rank, len(devices), torch.device(devices[rank]), parallel, meeting=f"file://{meeting}") as ranks:
            result = train_stage(job, folder, runs, report, devices[rank], ranks)
        pipe.send(("result", result))
    except BaseException as error:
        pipe.send(("error", sendable(error)))
    pipe.close()
    # Destructors of connections to processes that are gone may wait for ever.
    os._exit(0)
