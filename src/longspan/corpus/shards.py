"""Token shards on disk: memory-mapped, checksummed, and refused by name where a file is not what was written.

A shard is two files, `00000.tokens` (little-endian ids, nothing else) and `00000.documents` (little-endian int64
(D, 3): tokens, UTF-8 bytes and name bytes of each document), beside `00000.names` (a JSON line `[id, title]` per
document). `index.json` is written last: without it the folder is not a set of shards. Documents are stored without
markers; packing adds them.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

import numpy as np

from longspan.foundation.errors import DataError, UserError
from longspan.foundation.files import disk_errors, read_json, sha256_file, sync_directory, write_json

INDEX = "index.json"
FORMAT = 1
SHARD_TOKENS = 1 << 26
"""Tokens after which `ShardWriter` begins another shard."""

_SUFFIXES = ("tokens", "documents", "names")


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """The smallest unsigned dtype that holds every id of the vocabulary."""
    if vocab_size <= 1 << 8:
        return np.dtype("u1")
    return np.dtype("<u2") if vocab_size <= 1 << 16 else np.dtype("<u4")


@dataclass(frozen=True, slots=True)
class ShardEntry:
    """What the index says about one shard.

    Attributes:
        name: e.g. `00000`.
        num_documents, num_tokens: what it holds.
        num_bytes: UTF-8 bytes of the documents' text.
        files: file name → its size in bytes and sha256.
    """

    name: str
    num_documents: int
    num_tokens: int
    num_bytes: int
    files: dict[str, dict[str, Any]]


class OneShard:
    """Writes the files of one shard; several processes may each write their own.

    Use as a context manager. Nothing becomes visible to readers before `write_index`.
    """

    def __init__(self, folder: Path, number: int, vocab_size: int) -> None:
        self._folder = folder
        self._name = f"{number:05d}"
        self._vocab_size = vocab_size
        self._dtype = token_dtype(vocab_size)
        self._digests = {suffix: hashlib.sha256() for suffix in _SUFFIXES}
        self._sizes = dict.fromkeys(_SUFFIXES, 0)
        self.num_documents = 0
        self.num_tokens = 0
        self.num_bytes = 0
        folder.mkdir(parents=True, exist_ok=True)
        with disk_errors(folder):
            self._files: dict[str, IO[bytes]] = {suffix: self._path(suffix).open("wb") for suffix in _SUFFIXES}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for file in self._files.values():
            try:
                file.close()
            except OSError:
                # The error that ends the block says what is wrong; a failing flush behind it says it again.
                if kind is None:
                    raise

    def add(self, doc_id: str, title: str, tokens: np.ndarray, num_bytes: int) -> None:
        """Append one document.

        Args:
            doc_id: its id.
            title: for people.
            tokens: (T,) integer ids below the vocabulary size, T ≥ 1, without markers.
            num_bytes: UTF-8 bytes of its text.

        Raises:
            DataError: no token, an id outside the vocabulary, or no space on the disk.
        """
        tokens = np.asarray(tokens)
        if tokens.size == 0:
            raise DataError(f"document {doc_id!r} has no tokens", "at least one token", "leave empty documents out")
        if int(tokens.min()) < 0 or int(tokens.max()) >= self._vocab_size:
            raise DataError(
                f"document {doc_id!r} holds a token id outside 0 to {self._vocab_size - 1}",
                "ids of the tokenizer that the shards are for",
                "tokenize it with that tokenizer",
            )
        name = json.dumps([doc_id, title], ensure_ascii=False).encode() + b"\n"
        self._write("tokens", tokens.astype(self._dtype).tobytes())
        self._write("documents", np.array([tokens.size, num_bytes, len(name)], "<i8").tobytes())
        self._write("names", name)
        self.num_documents += 1
        self.num_tokens += int(tokens.size)
        self.num_bytes += num_bytes

    def close(self) -> ShardEntry:
        """Flush to disk and return what the index needs to know."""
        with disk_errors(self._folder / self._name):
            for file in self._files.values():
                file.close()
            for suffix in _SUFFIXES:
                sync_file(self._path(suffix))
        return ShardEntry(
            name=self._name,
            num_documents=self.num_documents,
            num_tokens=self.num_tokens,
            num_bytes=self.num_bytes,
            files={
                self._path(suffix).name: {"size": self._sizes[suffix], "sha256": self._digests[suffix].hexdigest()}
                for suffix in _SUFFIXES
            },
        )

    def _path(self, suffix: str) -> Path:
        return self._folder / f"{self._name}.{suffix}"

    def _write(self, suffix: str, data: bytes) -> None:
        with disk_errors(self._path(suffix)):
            self._files[suffix].write(data)
        self._digests[suffix].update(data)
        self._sizes[suffix] += len(data)


def sync_file(path: Path) -> None:
    """Flush a closed file to disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def write_index(folder: Path, entries: Iterable[ShardEntry], *, vocab_size: int, tokenizer_fingerprint: str) -> None:
    """Make shards visible: write `index.json` over `entries`, in their order."""
    entries = list(entries)
    sync_directory(folder)
    write_json(
        folder / INDEX,
        {
            "format": FORMAT,
            "dtype": token_dtype(vocab_size).str,
            "vocab_size": vocab_size,
            "tokenizer": tokenizer_fingerprint,
            "num_documents": sum(entry.num_documents for entry in entries),
            "num_tokens": sum(entry.num_tokens for entry in entries),
            "num_bytes": sum(entry.num_bytes for entry in entries),
            "shards": [asdict(entry) for entry in entries],
        },
    )


class ShardWriter:
    """Writes documents one after another and begins another shard whenever one is full.

    Args:
        folder: where the shards go; it must not hold finished shards.
        vocab_size: ids lie below it; decides the dtype.
        tokenizer_fingerprint: sha256 of the tokenizer that made the ids.
        shard_tokens: a shard is full from this many tokens on.

    Raises:
        UserError: the folder already holds shards.
    """

    def __init__(
        self, folder: Path, vocab_size: int, tokenizer_fingerprint: str, shard_tokens: int = SHARD_TOKENS
    ) -> None:
        if (folder / INDEX).exists():
            raise UserError(f"{folder} already holds shards", "an empty folder", "choose another, or remove it")
        self._folder = folder
        self._vocab_size = vocab_size
        self._fingerprint = tokenizer_fingerprint
        self._shard_tokens = shard_tokens
        self._entries: list[ShardEntry] = []
        self._shard: OneShard | None = None

    def add(self, doc_id: str, title: str, tokens: np.ndarray, num_bytes: int) -> None:
        """Append one document; see `OneShard.add`."""
        if self._shard is None:
            self._shard = OneShard(self._folder, len(self._entries), self._vocab_size)
        self._shard.add(doc_id, title, tokens, num_bytes)
        if self._shard.num_tokens >= self._shard_tokens:
            self._finish_shard()

    def close(self) -> TokenShards:
        """Finish the last shard, write the index, and open the result."""
        self._folder.mkdir(parents=True, exist_ok=True)
        self._finish_shard()
        write_index(self._folder, self._entries, vocab_size=self._vocab_size, tokenizer_fingerprint=self._fingerprint)
        return TokenShards.open(self._folder, verify=False)

    def _finish_shard(self) -> None:
        if self._shard is not None:
            self._entries.append(self._shard.close())
            self._shard = None


class TokenShards:
    """Documents as token ids, memory-mapped and read-only. Open with `TokenShards.open`.

    Attributes:
        num_documents, num_tokens: totals.
        num_bytes: UTF-8 bytes of all documents' text.
        lengths: int64 (documents,), tokens of each.
        byte_lengths: int64 (documents,), UTF-8 bytes of each document's text.
        ids, titles: of each document, read from disk when asked for.
        vocab_size: every id lies below it.
        tokenizer_fingerprint: of the tokenizer that made the ids.
        fingerprint: sha256 (hex) of `index.json`, and so of every file.
    """

    def __init__(self, folder: Path, index: dict[str, Any], fingerprint: str) -> None:
        self.folder = folder
        self.fingerprint = fingerprint
        self.vocab_size: int = index["vocab_size"]
        self.tokenizer_fingerprint: str = index["tokenizer"]
        self.num_documents: int = index["num_documents"]
        self.num_tokens: int = index["num_tokens"]
        self.num_bytes: int = index["num_bytes"]
        dtype = np.dtype(index["dtype"])
        names = [entry["name"] for entry in index["shards"]]
        tables = [_map(folder / f"{name}.documents", np.dtype("<i8")).reshape(-1, 3) for name in names]
        table = np.concatenate(tables) if tables else np.zeros((0, 3), np.int64)
        self.lengths = np.ascontiguousarray(table[:, 0], np.int64)
        self.byte_lengths = np.ascontiguousarray(table[:, 1], np.int64)
        per_shard = np.array([len(part) for part in tables], np.int64)
        self._shard_of = np.repeat(np.arange(len(tables), dtype=np.int32), per_shard)
        self._starts = _starts_within(self.lengths, per_shard)
        self._tokens = [_map(folder / f"{name}.tokens", dtype) for name in names]
        lines = [_map(folder / f"{name}.names", np.dtype("u1")) for name in names]
        name_lengths = np.ascontiguousarray(table[:, 2], np.int64)
        spans = _Names(lines, self._shard_of, _starts_within(name_lengths, per_shard), name_lengths)
        self.ids: Sequence[str] = _Column(spans, 0)
        self.titles: Sequence[str] = _Column(spans, 1)

    @staticmethod
    def open(folder: Path, verify: bool = True) -> TokenShards:
        """Open shards.

        Args:
            folder: where `index.json` lies.
            verify: compare each file's sha256 too; sizes and totals are compared in any case.

        Raises:
            DataError: a missing, truncated or altered file, by name.
        """
        path = folder / INDEX
        if not path.is_file():
            raise DataError(
                f"{folder} holds no finished shards (no {INDEX})", "a folder whose preparation ended", _PREPARE_AGAIN
            )
        index = read_json(path)
        try:
            if index["format"] != FORMAT:
                raise DataError(f"{path} is of format {index['format']}", f"format {FORMAT}", _PREPARE_AGAIN)
            for entry in index["shards"]:
                for name, facts in entry["files"].items():
                    _verify(folder / name, facts, verify)
            shards = TokenShards(folder, index, sha256_file(path))
        except (KeyError, TypeError, AttributeError) as error:
            raise DataError(f"{path} was altered ({error!r})", "the index as written", _PREPARE_AGAIN) from None
        totals = (len(shards.lengths), int(shards.lengths.sum()), int(shards.byte_lengths.sum()))
        if totals != (shards.num_documents, shards.num_tokens, shards.num_bytes):
            raise DataError(f"{path} disagrees with its shards", "the files as written", _PREPARE_AGAIN)
        return shards

    def __len__(self) -> int:
        return self.num_documents

    def __iter__(self) -> Iterator[np.ndarray]:
        return (self.document(index) for index in range(self.num_documents))

    def document(self, index: int) -> np.ndarray:
        """(T,) ids of one document: a read-only view of the mapped file, of the smallest dtype that fits."""
        start = self._starts[index]
        tokens: np.ndarray = self._tokens[self._shard_of[index]][start : start + self.lengths[index]]
        return tokens


_PREPARE_AGAIN = "remove the folder and prepare the corpus again"


def _verify(path: Path, facts: dict[str, Any], content_too: bool) -> None:
    if not path.is_file():
        raise DataError(f"shard file {path} is missing", "all files that the index names", _PREPARE_AGAIN)
    size = path.stat().st_size
    if size != facts["size"]:
        what = "truncated" if size < facts["size"] else "longer than written"
        raise DataError(
            f"shard file {path} is {what}: {size} bytes, the index says {facts['size']}",
            "the file as written",
            _PREPARE_AGAIN,
        )
    if content_too and sha256_file(path) != facts["sha256"]:
        raise DataError(
            f"shard file {path} was altered: its sha256 is not the one in the index",
            "the file as written",
            _PREPARE_AGAIN,
        )


def _map(path: Path, dtype: np.dtype[Any]) -> np.ndarray:
    # A plain array over the map: slicing the memmap class itself costs several times as much.
    return np.memmap(path, dtype, mode="r").view(np.ndarray)


def _starts_within(lengths: np.ndarray, per_shard: np.ndarray) -> np.ndarray:
    """Where each document begins in its own shard, from all lengths and the documents per shard."""
    starts = np.cumsum(lengths) - lengths
    first = np.cumsum(per_shard) - per_shard
    within: np.ndarray = starts - np.repeat(starts[first], per_shard) if len(lengths) else starts
    return within


@dataclass(frozen=True, slots=True)
class _Names:
    """The mapped name lines and where each document's line lies."""

    lines: list[np.ndarray]
    shard_of: np.ndarray
    starts: np.ndarray
    lengths: np.ndarray

    def __getitem__(self, index: int) -> tuple[str, str]:
        start = self.starts[index]
        line = self.lines[self.shard_of[index]][start : start + self.lengths[index]].tobytes()
        doc_id, title = json.loads(line)
        return doc_id, title


class _Column(Sequence[str]):
    """The ids, or the titles, of all documents."""

    def __init__(self, names: _Names, column: int) -> None:
        self._names = names
        self._column = column

    def __len__(self) -> int:
        return len(self._names.starts)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[position] for position in range(*index.indices(len(self)))]
        position = int(index)
        if not -len(self) <= position < len(self):
            raise IndexError(f"document {position} of {len(self)}")
        return self._names[position % len(self)][self._column]
