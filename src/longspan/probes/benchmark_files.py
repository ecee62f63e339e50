"""Where a benchmark's own items come from: a file that the user has, or one file of a data set on the hub."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from longspan.corpus.sources.compressed import read_chunks, read_lines
from longspan.corpus.sources.jsonl import parse_object
from longspan.foundation.errors import DataError, UserError, first_line
from longspan.foundation.extras import require
from longspan.foundation.files import sha256_file
from longspan.foundation.hub import fetch_file

Rows = Sequence[dict[str, Any]]


def read_rows(path: Path, fields: Sequence[str], what: str) -> Rows:
    """The rows of a JSON list (`.json`) or of JSON lines (`.jsonl`), plain, gzip, bzip2 or Zstandard.

    Args:
        path: of the file.
        fields: every row must have these.
        what: what the rows are, for errors.

    Raises:
        UserError: no such file.
        DataError: not JSON, or a row without one of the fields; names the row.
    """
    path = path.expanduser()
    if not path.is_file():
        raise UserError(f"{path} is not there", f"a .json or .jsonl file with {what}", "check the path")
    rows = _read(str(path.resolve()), os.stat(path).st_mtime_ns)
    for number, row in enumerate(rows, start=1):
        for field in fields:
            if field not in row:
                raise DataError(
                    f"{path}: row {number} has no field `{field}`",
                    f"{what}: rows with the fields {', '.join(fields)}",
                    "name the right file",
                )
    if not rows:
        raise DataError(f"{path} holds no rows", f"a file with {what}", "name the right file")
    return rows


@lru_cache(maxsize=2)
def _read(path: str, changed: int) -> Rows:
    del changed
    file = Path(path)
    if ".jsonl" in file.name:
        return [
            parse_object(line, f"{file}:{number}") for number, line in enumerate(read_lines(file), 1) if line.strip()
        ]
    try:
        rows = json.loads(b"".join(read_chunks(file)))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise DataError(f"{file} is not JSON ({error})", "a JSON list of objects, or JSON lines", "mend it") from None
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise DataError(f"{file} is not a list of objects", "a JSON list of objects, or JSON lines (.jsonl)", "mend it")
    return rows


def file_digest(path: Path) -> str:
    """sha256 (hex) of a file; part of a protocol, so that where a file lies does not matter, but what it holds does."""
    path = path.expanduser()
    if not path.is_file():
        raise UserError(f"{path} is not there", "the data file of the benchmark", "check the path")
    return _digest(str(path.resolve()), os.stat(path).st_mtime_ns)


@lru_cache(maxsize=16)
def _digest(path: str, changed: int) -> str:
    del changed
    return sha256_file(Path(path))


def hub_file(dataset: str, filename: str, revision: str | None) -> Path:
    """A file of a data set on the hub, fetched unless it is in the cache.

    Raises:
        MissingExtra: the hub's client is not installed.
        DataError: it cannot be fetched.
    """
    require("hub", "huggingface_hub")
    try:
        return fetch_file(dataset, filename, revision, dataset=True)
    except Exception as error:  # the client raises many kinds: offline, not found, gated, refused
        raise DataError(
            f"{filename} of the data set {dataset} cannot be fetched ({first_line(error)})",
            "a reachable hub, or a local copy of that file",
            "check the network, or name a local copy with `data: PATH`",
        ) from error
