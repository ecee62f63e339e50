"""This machine: one job at a time on one device, one process per device on several; `cpu` may be there several times.

A job that several processes train takes as many devices; then as many jobs run at a time as there is room for.
"""

from __future__ import annotations

import multiprocessing
import queue
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

from longspan.foundation.errors import Stopped, SubjectError, UserError, sendable
from longspan.foundation.failures import killed_process
from longspan.foundation.machine import available_cores
from longspan.foundation.progress import Progress, Report
from longspan.study.executors.base import Failed, Finished, Observe, one_by_one
from longspan.study.executors.processes import processes_of, together
from longspan.study.failures import standing
from longspan.study.jobs import Job
from longspan.study.stages import execute

POLL_SECONDS = 0.2


class LocalExecutor:
    """Runs jobs on the given devices (`cpu`, `cuda:0`, ...); jobs beside each other on the CPU share out its cores."""

    def __init__(self, devices: Sequence[str]) -> None:
        self.devices = tuple(devices)

    def run(self, jobs: Sequence[Job], runs: Path, observe: Observe, finished: Finished, failed: Failed) -> None:
        """See `Executor.run`.

        Raises:
            UserError: a job wants more GPUs than there are.
        """
        pending = [job for job in jobs if not job.is_done(runs)]
        if not pending:
            return
        places = places_for(self.devices, max(map(processes_of, pending)))
        if len(places) == 1 or len(pending) < 2:

            def here(job: Job) -> dict[str, Any]:
                return _execute(job, runs, _observer(job, observe), places[0])

            one_by_one(pending, here, finished, failed)
        else:
            _run_in_processes(pending, runs, observe, finished, failed, places)


def places_for(devices: Sequence[str], size: int) -> list[tuple[str, ...]]:
    """The devices, so many at a time; the CPU takes any number of processes.

    Raises:
        UserError: there are fewer GPUs.
    """
    if devices[0] == "cpu" and size > 1:
        return [("cpu",) * size]
    if len(devices) < size:
        raise UserError(
            f"training.processes = {size}",
            f"at most one for each GPU here, that is {len(devices)}",
            f"set training.processes to {len(devices)}, or start the study with torchrun on several machines",
        )
    return [tuple(devices[first : first + size]) for first in range(0, len(devices) - size + 1, size)]


def _execute(job: Job, runs: Path, report: Report, place: tuple[str, ...]) -> dict[str, Any]:
    return execute(job, runs, report, place[0], train_with=together(job, place))


def _observer(job: Job, observe: Observe) -> Callable[[Progress], None]:
    return lambda progress: observe(job, progress)


_worker: dict[str, Any] = {}


def _start_worker(devices: Any, events: Any, stop: Any, threads: int | None) -> None:
    import signal

    import torch

    # Ctrl-C reaches the whole process group; only the parent decides when to stop.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _worker.update(place=devices.get(), events=events, stop=stop)
    if threads is not None:
        torch.set_num_threads(min(threads, torch.get_num_threads()))


def _work(job: Job, runs: Path) -> dict[str, Any]:
    def report(progress: Progress) -> None:
        if _worker["stop"].is_set():
            raise Stopped(Stopped.GO_ON)
        _worker["events"].put((job.key, progress))

    try:
        return _execute(job, runs, report, _worker["place"])
    except Exception as error:
        raise sendable(error) from error


def _run_in_processes(
    pending: list[Job],
    runs: Path,
    observe: Observe,
    finished: Finished,
    failed: Failed,
    places: list[tuple[str, ...]],
) -> None:
    context = multiprocessing.get_context("spawn")
    threads = max(1, available_cores() // len(places)) if places[0] == ("cpu",) else None
    with context.Manager() as manager:
        free, events, stop = manager.Queue(), manager.Queue(), manager.Event()
        for place in places:
            free.put(place)
        with ProcessPoolExecutor(len(places), context, _start_worker, (free, events, stop, threads)) as pool:
            jobs = {job.key: job for job in pending}
            waiting = dict(jobs)
            running: dict[Future[dict[str, Any]], Job] = {}
            failure: BaseException | None = None
            while running or (waiting and failure is None):
                if failure is None:
                    # No more than there are places: what is next then stays in the order of the jobs.
                    ready = [job for job in waiting.values() if not set(job.needs) & set(waiting | _keys(running))]
                    for job in ready[: len(places) - len(running)]:
                        del waiting[job.key]
                        running[pool.submit(_work, job, runs)] = job
                done, _ = wait(running, timeout=POLL_SECONDS, return_when=FIRST_COMPLETED)
                try:
                    _drain(events, jobs, observe)
                    for future in done:
                        job = running.pop(future)
                        if isinstance(error := future.exception(), SubjectError):
                            failed(job, str(error))
                            waiting = {each.key: each for each in standing(waiting.values(), [job.key])}
                        else:
                            finished(job, future.result())
                except BrokenProcessPool:
                    failure = failure or killed_process(job.title)
                    stop.set()
                except BaseException as error:
                    failure = failure or error
                    stop.set()
            if failure is not None:
                raise failure


def _keys(running: dict[Future[dict[str, Any]], Job]) -> dict[str, Job]:
    return {job.key: job for job in running.values()}


def _drain(events: Any, jobs: dict[str, Job], observe: Observe) -> None:
    while True:
        try:
            key, progress = events.get_nowait()
        except queue.Empty:
            return
        observe(jobs[key], progress)
