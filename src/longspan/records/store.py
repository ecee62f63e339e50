"""Append-only records: killing the process at any instant loses at most the batch in flight and duplicates nothing."""

from __future__ import annotations

import fcntl
import hashlib
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from json.encoder import encode_basestring
from pathlib import Path
from typing import IO, Any, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from longspan.foundation.errors import DataError
from longspan.foundation.files import canonical_json, digest, disk_errors, sync_directory

RECORDS = "records.jsonl"
"""What the file is called in the folder of a probe's job, or of imported answers."""


class Record(BaseModel):
    """One answer of one subject to one item; all later numbers come from these.

    Attributes:
        key: `Record.make_key(probe, protocol, item, fingerprint)`.
        probe: kind of the probe.
        protocol: how the item was asked and scored: every setting that changes the answer.
        item: name of the item, the same for every subject.
        subject: label of the arm, e.g. the pattern or the model's name.
        seed: the subject's training seed.
        fingerprint: of the subject: weights, tokenizer, versions.
        answer: what the subject said, JSON with finite numbers only.
        seconds: wall time of the item, 0 where items were asked together and it cannot be told apart.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    key: str
    probe: str
    protocol: dict[str, Any]
    item: str
    subject: str
    seed: int
    fingerprint: str
    answer: dict[str, Any]
    seconds: float

    @staticmethod
    def make_key(probe: str, protocol: dict[str, Any], item: str, fingerprint: str) -> str:
        """The key of a record: sha256 (hex) of what was asked, how, and of whom."""
        return digest([probe, protocol, item, fingerprint])

    @classmethod
    def make(
        cls,
        *,
        probe: str,
        protocol: dict[str, Any],
        item: str,
        subject: str,
        seed: int,
        fingerprint: str,
        answer: dict[str, Any],
        seconds: float = 0.0,
    ) -> Record:
        """A record with its key computed."""
        return cls(
            key=cls.make_key(probe, protocol, item, fingerprint),
            probe=probe,
            protocol=protocol,
            item=item,
            subject=subject,
            seed=seed,
            fingerprint=fingerprint,
            answer=answer,
            seconds=seconds,
        )


class RecordStore:
    """Records in a JSON-lines file, one line each, only ever appended to.

    Opening reads the file once and repairs a torn last line (all that follows the last newline: what a killed process
    had not finished). Any other damage is refused by file and line, because it is not of our making. Several processes
    may append to one file: each append takes a lock and first reads what the others wrote.

    Raises:
        DataError: a complete line is not a record, or its key does not belong to its content.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._keys: set[str] = set()
        self._size = 0
        self._lines = 0
        if path.exists():
            with self._locked() as file:
                self._catch_up(file)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        """Nothing to close: every append opens, locks, flushes and closes."""

    def __len__(self) -> int:
        return len(self._keys)

    def __contains__(self, key: object) -> bool:
        return key in self._keys

    def __iter__(self) -> Iterator[Record]:
        """Every record in the order of writing, read from disk (bounded memory)."""
        if not self.path.exists():
            return
        with self.path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if line.endswith(b"\n"):
                    yield _parse(line, self.path, number)

    @property
    def keys(self) -> frozenset[str]:
        """Keys of all records."""
        return frozenset(self._keys)

    def append(self, records: Iterable[Record]) -> int:
        """Write the records whose key is not there yet, and flush them to the disk before returning.

        Returns:
            How many were written.

        Raises:
            DataError: the disk is full; the file is left as it was before the call.
            ValueError: an answer holds NaN or an infinity.
        """
        with self._locked() as file:
            self._catch_up(file)
            lines: dict[str, str] = {}
            for record in records:
                if record.key not in self._keys and record.key not in lines:
                    lines[record.key] = canonical_json(record.model_dump())
            if not lines:
                return 0
            payload = "".join(line + "\n" for line in lines.values()).encode()
            try:
                with disk_errors(self.path):
                    file.seek(self._size)
                    rest = memoryview(payload)
                    while rest:
                        # An unbuffered write may take only a part, e.g. what still fits on the disk.
                        rest = rest[file.write(rest) :]
                    os.fsync(file.fileno())
            except BaseException:
                # Nobody may find half a batch: what was there before the call is what stays.
                os.ftruncate(file.fileno(), self._size)
                raise
            self._keys.update(lines)
            self._size += len(payload)
            self._lines += len(lines)
            return len(lines)

    @contextmanager
    def _locked(self) -> Iterator[IO[bytes]]:
        is_new = not self.path.exists()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
        with os.fdopen(descriptor, "r+b", buffering=0) as file:
            fcntl.flock(file.fileno(), fcntl.LOCK_EX)
            if is_new:
                sync_directory(self.path.parent)
            yield file

    def _catch_up(self, file: IO[bytes]) -> None:
        """Read what was appended since the last look; cut a torn tail. The caller holds the lock."""
        file.seek(self._size)
        tail = file.read()
        complete = tail.rfind(b"\n") + 1
        for line in tail[:complete].splitlines(keepends=True):
            self._lines += 1
            record = _parse(line, self.path, self._lines)
            if record.key in self._keys:
                raise _damaged(self.path, self._lines, "repeats the record of an earlier line")
            self._keys.add(record.key)
        self._size += complete
        if complete < len(tail):
            os.ftruncate(file.fileno(), self._size)
            os.fsync(file.fileno())


def read_records(path: Path) -> Iterator[Record]:
    """Every complete record of a file, read once and without a lock: for those who only read.

    Raises:
        DataError: a line is not a record, its key does not belong to its content, or it repeats an earlier one.
    """
    keys: set[str] = set()
    protocols: dict[str, str] = {}
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n"):
                return
            record = _parse(line, path, number, protocols)
            if record.key in keys:
                raise _damaged(path, number, "repeats the record of an earlier line")
            keys.add(record.key)
            yield record


def _parse(line: bytes, path: Path, number: int, protocols: dict[str, str] | None = None) -> Record:
    """A record, its key checked; `protocols` keeps the text of those seen before, of which there are few."""
    try:
        record = Record.model_validate_json(line)
    except ValidationError:
        raise _damaged(path, number, "is not a record") from None
    name = repr(record.protocol)
    protocol = None if protocols is None else protocols.get(name)
    if protocol is None:
        protocol = canonical_json(record.protocol)
        if protocols is not None:
            protocols[name] = protocol
    # The canonical JSON of the list that `make_key` digests.
    probe, item, fingerprint = map(encode_basestring, (record.probe, record.item, record.fingerprint))
    if record.key != hashlib.sha256(f"[{probe},{protocol},{item},{fingerprint}]".encode()).hexdigest():
        raise _damaged(path, number, "was altered: its key does not belong to its content")
    return record


def _damaged(path: Path, number: int, what: str) -> DataError:
    return DataError(
        f"{path}:{number} {what}",
        "lines as Longspan wrote them",
        "restore the file from a copy, or remove that line: only what is missing is asked again",
    )
