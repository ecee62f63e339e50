"""Files that are either whole or absent: atomic writes, digests, and a clear word when the disk is full."""

from __future__ import annotations

import errno
import glob
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from longspan.foundation.errors import DataError

DEFAULT_RUNS = Path("runs")
"""Folder of all runs, where a command names no other."""


def canonical_json(value: Any) -> str:
    """JSON with sorted keys and no spaces: equal values give equal text. NaN is refused."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def digest(value: Any) -> str:
    """sha256 (hex) of the canonical JSON of `value`."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()


def sha256_file(path: Path) -> str:
    """sha256 (hex) of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn "no space left on device" into a `DataError` that names the path and what is free."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        folder = path if path.is_dir() else path.parent
        free = shutil.disk_usage(folder).free if folder.exists() else 0
        raise DataError(
            f"no disk space left while writing {path} ({free / 2**20:.0f} MiB free)",
            "enough space for the file; everything written before it is kept",
            "free some space, then run the same command again: it goes on from here",
        ) from error


@contextmanager
def atomic_write(path: Path, mode: str = "w") -> Iterator[IO[Any]]:
    """Open a file that appears under `path` only when it was written whole and flushed to disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(path)
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        with disk_errors(path):
            with partial.open(mode, encoding=None if "b" in mode else "utf-8") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, path)
            sync_directory(path.parent)
    finally:
        partial.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Write readable JSON atomically."""
    with atomic_write(path) as file:
        json.dump(value, file, indent=2, ensure_ascii=False, allow_nan=False)
        file.write("\n")


def read_json(path: Path) -> Any:
    """Read JSON; a missing or damaged file is refused by name."""
    allowed, fix = "the file as Longspan wrote it", f"remove {path.parent} and run the same command again"
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"{path} is missing", allowed, fix) from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise DataError(f"{path} is not readable JSON ({error})", allowed, fix) from None


def sync_directory(folder: Path) -> None:
    """Flush a directory entry to disk, so that a rename survives a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def atomic_directory(path: Path) -> Iterator[Path]:
    """Yield an empty folder that becomes `path` (replacing an older one) only when the block ends without error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    previous = path.with_name(f".{path.name}.previous")
    _remove_abandoned(path)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        with disk_errors(path):
            yield partial
            for file in partial.rglob("*"):
                if file.is_file():
                    with file.open("rb") as handle:
                        os.fsync(handle.fileno())
            if path.exists():
                shutil.rmtree(previous, ignore_errors=True)
                os.replace(path, previous)
            os.replace(partial, path)
            sync_directory(path.parent)
            shutil.rmtree(previous, ignore_errors=True)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def recover_directory(path: Path) -> None:
    """Finish or undo an `atomic_directory` that was killed: call before reading `path`."""
    previous = path.with_name(f".{path.name}.previous")
    if previous.exists():
        if path.exists():
            shutil.rmtree(previous)
        else:
            os.replace(previous, path)
    _remove_abandoned(path)


def _remove_abandoned(path: Path) -> None:
    """Remove what killed processes left of `path`; what a living one is writing stays."""
    for partial in path.parent.glob(f"{glob.escape(f'.{path.name}.partial-')}*"):
        if _is_alive(partial.name.rpartition("-")[2]):
            continue
        if partial.is_dir():
            shutil.rmtree(partial, ignore_errors=True)
        else:
            partial.unlink(missing_ok=True)


def _is_alive(process: str) -> bool:
    if not process.isdigit():
        return False
    try:
        os.kill(int(process), 0)
    except ProcessLookupError:
        return False
    except OSError:
        # Another user's.
        return True
    return int(process) != os.getpid()
