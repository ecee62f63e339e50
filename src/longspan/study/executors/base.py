"""The contract of an executor."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

from longspan.foundation.errors import SubjectError
from longspan.foundation.progress import Progress
from longspan.study.jobs import Job

Observe = Callable[[Job, Progress], None]
Finished = Callable[[Job, dict[str, Any]], None]
Failed = Callable[[Job, str], None]


class Executor(Protocol):
    """Runs jobs so that each starts after those it needs."""

    def run(self, jobs: Sequence[Job], runs: Path, observe: Observe, finished: Finished, failed: Failed) -> None:
        """Execute what is not done.

        Args:
            jobs: in an order in which every job follows those it needs.
            runs: folder of all runs.
            observe: told of every progress; may raise `Stopped`, which ends the run in order.
            finished: told of every job that ended, with its result.
            failed: told of every job that ended in a `SubjectError`, with its text; jobs that need it are left out.

        Raises:
            Exception: the first other error of a job; jobs already done stay done.
        """


def one_by_one(
    jobs: Iterable[Job], execute: Callable[[Job], dict[str, Any]], finished: Finished, failed: Failed
) -> None:
    """Execute jobs in their order, those left out that need one that failed."""
    lost: set[str] = set()
    for job in jobs:
        if lost & set(job.needs):
            lost.add(job.key)
            continue
        try:
            result = execute(job)
        except SubjectError as error:
            lost.add(job.key)
            failed(job, str(error))
        else:
            finished(job, result)
