"""The engine of a probe job's subject; one that is slow to start is kept for the jobs that follow."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from longspan.engines.base import Engine
from longspan.engines.loading import engine_of
from longspan.engines.opening import describe, open_engine
from longspan.engines.source import ModelSource
from longspan.engines.trained_run import TrainedRun
from longspan.foundation.files import digest
from longspan.foundation.progress import Report
from longspan.study.jobs import Job, finished_job

_held: dict[str, Engine] = {}


def asked_engine(job: Job, runs: Path, device: str, report: Report) -> tuple[Engine, str]:
    """The engine that answers a probe job, and what tells the weights it asks from others."""
    source = ModelSource.parse(job.details["source"], "subjects") if "source" in job.details else None
    if source is not None and (source.engine != "native" or source.kind == "shape"):
        engine = held_engine(source, device, report)
        return engine, engine.fingerprint
    which = job.specification["weights"]
    with finished_job(runs / "jobs" / job.details["train"]) as folder:
        run = TrainedRun.open(folder)
        weights = run.weights_sha256(which)
        if source is not None:
            return imported_engine(run, source, device), weights
        return engine_of(run, which, device=device), weights


def imported_engine(run: TrainedRun, source: ModelSource, device: str) -> Engine:
    """The native engine of a model from elsewhere that was imported, asked as the study says."""
    engine = engine_of(run, dtype="bf16" if source.dtype == "bf16" else "fp32", device=device)
    if source.kind == "pretrained":
        engine.prompting = describe(source).prompting()
        if source.template is not None:
            engine.fingerprint = digest([engine.fingerprint, source.asked_how()])
    return engine


def held_engine(source: ModelSource, device: str, report: Report) -> Engine:
    """The engine of another's model: the one that was opened last, if it is its, else a new one in its place."""
    key = digest([source.model_dump(mode="json"), device])
    if key not in _held:
        let_go()
        _held[key] = open_engine(source, device, report)
    return _held[key]


def let_go() -> None:
    """Close the engine that is kept, if there is one."""
    if not _held:
        return
    while _held:
        _held.popitem()[1].close()
    # Models of others refer to themselves; their memory is wanted now.
    gc.collect()


@contextmanager
def letting_go() -> Iterator[None]:
    """Close whatever engine is kept at the end, however it comes."""
    try:
        yield
    finally:
        let_go()
