"""What every source of documents offers, and the helpers they share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, ClassVar

from pydantic import Field

from longspan.corpus.document import Document
from longspan.foundation.config import Config
from longspan.foundation.errors import UserError
from longspan.foundation.files import sha256_file
from longspan.foundation.progress import Report, silent


class SourceConfig(Config, ABC):
    """Settings of a source, and the source itself: it streams documents in a fixed order with bounded memory.

    A sub-class adds a field `source: Literal["name"]` and says how to `read` and what its `inputs` are.

    Attributes:
        max_documents: take at most so many, the first ones; of each split where the source gives splits.
    """

    max_documents: int | None = Field(default=None, ge=1)

    place_only: ClassVar[frozenset[str]] = frozenset({"path"})
    """Fields that say where the input lies or how it is read, not what is in it: no part of the fingerprint."""

    def documents(self, cache: Path, report: Report = silent) -> Iterator[Document]:
        """Stream the documents; the same settings and inputs give the same documents in the same order.

        Args:
            cache: a folder for downloads; kept between runs.
            report: takes the progress of slow preparations, e.g. a download.

        Raises:
            UserError: for settings that cannot be honoured; `DataError` for damaged input, named.
            MissingExtra: where the source needs a package that is not installed.
        """
        taken: Counter[str | None] = Counter()
        for document in self.read(cache, report):
            if self.max_documents is not None and taken[document.split] >= self.max_documents:
                # Without given splits there is nothing more to wait for.
                if set(taken) == {None}:
                    return
                continue
            taken[document.split] += 1
            yield document

    @abstractmethod
    def read(self, cache: Path, report: Report) -> Iterator[Document]:
        """Stream all documents, without regard to `max_documents`."""

    @abstractmethod
    def inputs(self, cache: Path) -> dict[str, Any]:
        """What lies outside the settings and determines the documents: versions, sizes, digests. JSON-able."""

    def fingerprint(self, cache: Path) -> dict[str, Any]:
        """Everything that determines the documents, JSON-able. Where a file lies does not; what is in it does."""
        return {"settings": self.model_dump(mode="json", exclude=set(self.place_only)), "inputs": self.inputs(cache)}


def as_paths(path: Path | Iterable[Path]) -> list[Path]:
    """One path or several, with `~` expanded."""
    return [part.expanduser() for part in ([path] if isinstance(path, Path) else path)]


def named_files(paths: Iterable[Path], patterns: Iterable[str], where: str) -> dict[str, Path]:
    """The files under `paths` by name: a folder gives all files that match, by relative path; a file gives itself.

    Args:
        paths: files and folders.
        patterns: glob patterns of the files to take from folders, e.g. `*.txt`.
        where: the setting that the paths come from, for the error.

    Returns:
        name → file, sorted within each folder.

    Raises:
        UserError: a path that does not exist, a folder without a matching file, or a name that comes twice.
    """
    patterns, paths = tuple(patterns), tuple(paths)
    found: dict[str, Path] = {}
    if not paths:
        raise UserError(f"{where} = []", "at least one file or folder", "name one")
    for path in paths:
        if not path.exists():
            raise UserError(f"{where}: {path} does not exist", "an existing file or folder", f"change `{where}`")
        files = {path.name: path}
        if path.is_dir():
            matches = {file for pattern in patterns for file in path.rglob(pattern) if file.is_file()}
            files = {file.relative_to(path).as_posix(): file for file in sorted(matches)}
        if not files:
            raise UserError(
                f"{where}: no file in {path}", f"files named {', '.join(patterns)}", "add some to the folder"
            )
        if twice := sorted(files.keys() & found.keys()):
            raise UserError(f"{where}: two files are called {twice[0]}", "distinct names", "put them under one folder")
        found |= files
    return found


def describe_files(files: dict[str, Path]) -> dict[str, Any]:
    """Size and sha256 of each named file, for `inputs`."""
    return {name: {"bytes": file.stat().st_size, "sha256": sha256_file(file)} for name, file in files.items()}
