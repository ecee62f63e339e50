"""A user's own text files: a folder or a list of files, one document each."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from longspan.corpus.document import Document
from longspan.corpus.sources.base import SourceConfig, as_paths, describe_files, named_files
from longspan.foundation.errors import DataError
from longspan.foundation.progress import Report


class TextSource(SourceConfig):
    """Text files in UTF-8; `id` is the path within the folder, `title` the name without its ending."""

    source: Literal["text"] = "text"
    path: Path | tuple[Path, ...]
    patterns: tuple[str, ...] = Field(("*.txt", "*.md"), min_length=1)

    def read(self, cache: Path, report: Report) -> Iterator[Document]:
        """Files in order of their names, folder by folder as given."""
        for name, file in self._files().items():
            try:
                # Universal newlines would be a silent change of the text in only some readers; one rule for all.
                text = file.read_bytes().decode("utf-8-sig").replace("\r\n", "\n")
            except UnicodeDecodeError as error:
                raise DataError(
                    f"{file} is not UTF-8 (byte {error.start})", "text files in UTF-8", "convert the file or remove it"
                ) from None
            yield Document(id=name, text=text, title=file.stem)

    def inputs(self, cache: Path) -> dict[str, Any]:
        """Size and sha256 of each file."""
        return {"files": describe_files(self._files())}

    def _files(self) -> dict[str, Path]:
        return named_files(as_paths(self.path), self.patterns, "corpus.path")
