"""Subjects that failed: why, remembered in the job's folder, so that the others go on and nothing fails twice."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from longspan.foundation.errors import LongspanError, SubjectError
from longspan.foundation.files import read_json, write_json
from longspan.study.environment import git_state, hardware, versions
from longspan.study.jobs import Job

FAILED = "failed.json"
CHANGES_NOTHING = ("torch threads", "allocator")
"""Facts of the hardware that differ between processes of one machine."""


@contextmanager
def remembering(job: Job, folder: Path) -> Iterator[None]:
    """Keep why a training failed; a probe is asked again, since what answers it may be a server."""
    try:
        yield
    except SubjectError as error:
        if job.kind == "train":
            write_json(folder / FAILED, {"reason": str(error), "environment": _environment()})
        raise
    (folder / FAILED).unlink(missing_ok=True)


def failure(job: Job, runs: Path) -> str:
    """Why a job failed; empty where it did not, or did with another Longspan, torch or machine than these."""
    path = job.folder(runs) / FAILED
    if not path.is_file():
        return ""
    found = read_json(path)
    return str(found["reason"]) if found["environment"] == _environment() else ""


def known_failures(jobs: Iterable[Job], runs: Path) -> list[tuple[Job, str]]:
    """The jobs that failed before and would fail again, and why."""
    return [(job, reason) for job in jobs if not job.is_done(runs) and (reason := failure(job, runs))]


def standing(jobs: Iterable[Job], failed: Iterable[str]) -> list[Job]:
    """The jobs that are neither failed nor need one that is.

    Args:
        jobs: each after those it needs.
        failed: keys.
    """
    lost, found = set(failed), []
    for job in jobs:
        if job.key in lost or lost & set(job.needs):
            lost.add(job.key)
        else:
            found.append(job)
    return found


def told(failed: Sequence[tuple[Job, str]], runs: Path) -> LongspanError:
    """What a study ends with when all is done that does not need a job that failed."""
    parts = [f"{len(failed)} of the study's jobs failed; all that does not need them is done"]
    for job, reason in failed:
        parts.append(f"  {job.title}: {reason}")
        if failure(job, runs):
            kept = job.folder(runs) / FAILED
            parts.append(f"  not tried again until its settings, Longspan or this machine change, or you remove {kept}")
    return LongspanError("\n".join(parts))


def _environment() -> dict[str, Any]:
    machine = {name: fact for name, fact in hardware().items() if name not in CHANGES_NOTHING}
    return {"versions": dict(versions()), "hardware": machine, "git": dict(git_state())}
