"""The run's own record, `metrics.jsonl`: one line per log and evaluation, cut back on resume so none appears twice."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from longspan.foundation.errors import DataError
from longspan.foundation.files import disk_errors


class MetricsFile:
    """Append-only JSON lines, flushed line by line.

    Args:
        path: the file; created where it is missing.
        keep: bytes to keep, as `size` said at the checkpoint the run goes on from; later lines are cut off.

    Raises:
        DataError: the file is shorter than `keep`.
    """

    def __init__(self, path: Path, keep: int = 0) -> None:
        self.path = path
        found = path.stat().st_size if path.exists() else 0
        if found < keep:
            raise DataError(
                f"{path} has {found} bytes, the checkpoint beside it was made at {keep}",
                "the file as training wrote it",
                f"restore it, or remove {path.parent} to train from the start",
            )
        self._file = path.open("ab")
        self._file.truncate(keep)

    def append(self, record: Mapping[str, Any]) -> None:
        """Add one line. NaN and infinity are refused: a run that has them has stopped."""
        with disk_errors(self.path):
            self._file.write(json.dumps(dict(record), allow_nan=False).encode() + b"\n")
            self._file.flush()

    def sync(self) -> int:
        """Force all lines to the disk and return the size: what a checkpoint promises to find again."""
        with disk_errors(self.path):
            self._file.flush()
            os.fsync(self._file.fileno())
        return self._file.tell()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class NoMetrics:
    """In place of the file on ranks that write none."""

    def append(self, record: Mapping[str, Any]) -> None:
        """Nothing."""

    def sync(self) -> int:
        """Nothing; the size counts where it is written."""
        return 0

    def close(self) -> None:
        """Nothing."""


def read_metrics(path: Path, kind: str | None = None) -> list[dict[str, Any]]:
    """Lines of `metrics.jsonl`, all or those of one `kind` (`train`, `validation`); a torn last line is left out.

    Raises:
        DataError: the file is missing or a line of it is damaged.
    """
    fix = f"remove {path.parent} and run the same command again: that run is trained anew"
    try:
        lines = path.read_bytes().split(b"\n")[:-1]
        records: list[dict[str, Any]] = [json.loads(line) for line in lines]
    except FileNotFoundError:
        raise DataError(f"{path} is missing", "the file as training wrote it", fix) from None
    except ValueError as error:
        raise DataError(f"{path} is damaged ({error})", "the file as training wrote it", fix) from None
    return [record for record in records if kind is None or record["kind"] == kind]
