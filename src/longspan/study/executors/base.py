"""The contract of an executor."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from longspan.foundation.progress import Progress
from longspan.study.jobs import Job

Observe = Callable[[Job, Progress], None]
Finished = Callable[[Job, dict[str, Any]], None]


class Executor(Protocol):
    """Runs jobs so that each starts after those it needs."""

    def run(self, jobs: Sequence[Job], runs: Path, observe: Observe, finished: Finished) -> None:
        """Execute what is not done.

        Args:
            jobs: in an order in which every job follows those it needs.
            runs: folder of all runs.
            observe: told of every progress; may raise `Stopped`, which ends the run in order.
            finished: told of every job that ended, with its result.

        Raises:
            Exception: the first error of a job; jobs already done stay done.
        """
