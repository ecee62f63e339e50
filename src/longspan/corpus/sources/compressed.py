"""Plain, gzip, bzip2 and Zstandard files behind one stream; a truncated one is refused by name."""

from __future__ import annotations

import bz2
import gzip
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import zstandard

from longspan.foundation.errors import DataError

CHUNK_BYTES = 1 << 18


def read_chunks(path: Path) -> Iterator[bytes]:
    """Yield the decompressed content piece by piece; the ending (`.gz`, `.bz2`, `.zst`) says what the file is.

    Raises:
        DataError: a damaged or truncated file, by name.
    """
    with path.open("rb") as file:
        try:
            if path.suffix == ".zst":
                yield from _zstandard_chunks(file)
            elif path.suffix in (".gz", ".bz2"):
                with gzip.open(file) if path.suffix == ".gz" else bz2.open(file) as stream:
                    while chunk := stream.read(CHUNK_BYTES):
                        yield chunk
            else:
                while chunk := file.read(CHUNK_BYTES):
                    yield chunk
        except (EOFError, OSError, zlib.error, zstandard.ZstdError) as error:
            raise DataError(
                f"{path} is truncated or damaged ({error})", f"a whole {path.suffix} file", "get the file again"
            ) from None


def read_lines(path: Path) -> Iterator[str]:
    r"""Yield the decoded lines of a UTF-8 file, each with its line feed; only `\n` ends a line.

    Raises:
        DataError: damaged, truncated or not UTF-8, by name and line.
    """
    rest, line_number = b"", 0

    def decoded(line: bytes) -> str:
        try:
            return line.decode()
        except UnicodeDecodeError:
            raise DataError(f"{path}:{line_number}: not UTF-8", "text in UTF-8", "convert the file") from None

    for chunk in read_chunks(path):
        # The byte of a line feed is part of no other character in UTF-8.
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            line_number += 1
            yield decoded(line) + "\n"
    if rest:
        line_number += 1
        yield decoded(rest)


def _zstandard_chunks(file: BinaryIO) -> Iterator[bytes]:
    # The library's own stream reader ends without a word where a frame is cut short; `eof` tells.
    frame = zstandard.ZstdDecompressor().decompressobj()
    fresh = True
    while data := file.read(CHUNK_BYTES):
        while data:
            fresh = False
            if chunk := frame.decompress(data):
                yield chunk
            data = b""
            if frame.eof:
                data = frame.unused_data
                frame, fresh = zstandard.ZstdDecompressor().decompressobj(), True
    if not fresh:
        raise EOFError("the last frame is cut short")
