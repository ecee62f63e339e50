"""Jobs: a directory named by the hash of all that determines it, with a completion marker written last."""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from longspan.foundation.errors import DataError, MachineError, UserError
from longspan.foundation.files import digest, disk_errors, read_json, write_json
from longspan.study.environment import git_state, hardware, versions

Kind = Literal["prepare", "train", "import", "check", "probe"]
SPECIFICATION = "job.json"
DONE = "done.json"
DOWNLOADS = "downloads"
VERSION = 2
"""Raised when the meaning of a job's files changes, so that older directories are not taken for new ones."""


@contextmanager
def finished_job(folder: Path) -> Iterator[Path]:
    """The folder of a finished job, for reading.

    Raises:
        DataError: a file in it is damaged; the fix is for the whole folder, since its marker says that it is done.
    """
    try:
        yield folder
    except MachineError:
        raise
    except UserError as error:
        fix = f"remove {folder} and run the same command again: that job is done anew, the others are kept"
        raise DataError(error.given, error.allowed, fix) from error


@dataclass(frozen=True)
class Job:
    """One piece of work.

    Attributes:
        kind: what it does.
        title: what a person calls it, e.g. `train AMAM seed 0`.
        specification: everything that determines its result, as plain data.
        needs: keys of the jobs that must be done before.
        details: where to find what it needs; does not change the result and is not part of the key.
    """

    kind: Kind
    title: str
    specification: dict[str, Any]
    needs: tuple[str, ...] = ()
    details: dict[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> str:
        """sha256 over kind, specification and the keys of what it needs."""
        return digest([VERSION, self.kind, self.specification, list(self.needs)])

    def folder(self, runs: Path) -> Path:
        """The job's directory under the folder of all runs."""
        return runs / "jobs" / f"{self.kind}-{self.key[:16]}"

    def is_done(self, runs: Path) -> bool:
        """Whether the completion marker is there (and the directory is this job's own)."""
        folder = self.folder(runs)
        return (folder / DONE).is_file() and self._check(folder)

    def result(self, runs: Path) -> dict[str, Any]:
        """What the job wrote into its completion marker."""
        result: dict[str, Any] = read_json(self.folder(runs) / DONE)["result"]
        return result

    def _check(self, folder: Path) -> bool:
        found = read_json(folder / SPECIFICATION)
        if found.get("key") != self.key:
            raise UserError(
                f"{folder} belongs to another configuration ({found.get('title', 'unknown')})",
                f"a directory of the job `{self.title}`, key {self.key[:16]}",
                "move that directory away, or choose another folder with --runs",
            )
        return True

    @contextmanager
    def claim(self, runs: Path) -> Iterator[Path]:
        """Hold the job's directory for this process.

        Raises:
            UserError: the directory belongs to another configuration.
            MachineError: another process is working in it.
        """
        folder = self.folder(runs)
        with disk_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
            lock = (folder / ".lock").open("a+")
        try:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                lock.seek(0)
                raise MachineError(
                    f"{folder} ({self.title}) is in use by process {lock.read().strip() or 'unknown'}",
                    "one process at a time in a job's folder",
                    "wait until that one ends, then run the same command again: what it did is kept",
                ) from None
            lock.seek(0)
            lock.truncate()
            lock.write(str(os.getpid()))
            lock.flush()
            if (folder / SPECIFICATION).exists():
                self._check(folder)
            else:
                self._write_specification(folder)
            yield folder
        finally:
            lock.close()

    def _write_specification(self, folder: Path) -> None:
        write_json(
            folder / SPECIFICATION,
            {
                "key": self.key,
                "kind": self.kind,
                "title": self.title,
                "specification": self.specification,
                "needs": list(self.needs),
            },
        )

    def finish(self, folder: Path, result: dict[str, Any]) -> None:
        """Write the completion marker: the job counts as done from here on."""
        stamp = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        made_by = {"versions": versions(), "hardware": hardware(), "git": git_state()}
        write_json(folder / DONE, {"finished": stamp, "environment": made_by, "result": result})
