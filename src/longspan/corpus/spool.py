"""Documents on their way to the tokenizer: compressed JSON lines on disk, so that no stage holds a corpus in memory.

Each split is a run of parts; a part later becomes one shard, so parts are cut by the size of their text and by nothing
else, and shards do not depend on how many processes write them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

import numpy as np
import zstandard

from longspan.corpus.document import SPLITS, Document
from longspan.corpus.sources.compressed import read_lines
from longspan.foundation.files import disk_errors

PART_BYTES = 16 * 2**20
"""UTF-8 bytes of text after which a part is full."""


@dataclass(frozen=True, slots=True)
class Part:
    """One part of one split."""

    split: str
    number: int

    @property
    def name(self) -> str:
        """E.g. `train-00003`."""
        return f"{self.split}-{self.number:05d}"


class SpoolWriter:
    """Sorts documents into parts; use as a context manager.

    Args:
        folder: an existing folder.
        part_bytes: a part is full from this many UTF-8 bytes of text on.
    """

    def __init__(self, folder: Path, part_bytes: int) -> None:
        self._folder = folder
        self._part_bytes = part_bytes
        self._open: dict[str, _PartWriter] = {}
        self.num_parts = dict.fromkeys(SPLITS, 0)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for split in list(self._open):
            self._open.pop(split).close()

    def add(self, split: str, number: int, document: Document, num_bytes: int) -> None:
        """Append a document to its split.

        Args:
            split: where it goes.
            number: its place among all documents kept so far; comes back from `read_part`.
            document: the document.
            num_bytes: UTF-8 bytes of its text.
        """
        if split not in self._open:
            part = Part(split, self.num_parts[split])
            self._open[split] = _PartWriter(part_path(self._folder, part))
            self.num_parts[split] += 1
        writer = self._open[split]
        writer.write(json.dumps([number, document.id, document.title, document.text], ensure_ascii=False))
        writer.text_bytes += num_bytes
        if writer.text_bytes >= self._part_bytes:
            self._open.pop(split).close()


class _PartWriter:
    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: BinaryIO = path.open("wb")
        self._stream: Any = zstandard.ZstdCompressor(level=1).stream_writer(self._file)
        self.text_bytes = 0

    def write(self, line: str) -> None:
        with disk_errors(self._path):
            self._stream.write(line.encode() + b"\n")

    def close(self) -> None:
        with disk_errors(self._path):
            self._stream.close()
            self._file.close()


def part_path(folder: Path, part: Part) -> Path:
    """Where a part lies."""
    return folder / f"{part.name}.jsonl.zst"


def read_part(folder: Path, part: Part, keep: np.ndarray) -> Iterator[Document]:
    """The documents of a part that `keep` (bool, by the number given to `add`) keeps, in the order of adding."""
    for line in read_lines(part_path(folder, part)):
        number, doc_id, title, text = json.loads(line)
        if keep[number]:
            yield Document(id=doc_id, title=title, text=text, split=part.split)
