"""JSON Lines: one object `{id, title, text}` a line, plain, gzip or Zstandard."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from longspan.corpus.document import Document, check_split, content_id
from longspan.corpus.sources.base import SourceConfig, as_paths, describe_files, named_files
from longspan.corpus.sources.compressed import read_lines
from longspan.foundation.errors import DataError
from longspan.foundation.progress import Report


class JsonlSource(SourceConfig):
    """Objects, one a line, from a file, a folder or a list of them.

    Attributes:
        path: `.jsonl`, `.jsonl.gz` or `.jsonl.zst`.
        id_field: None makes the id from the text.
        title_field: may be absent from a line.
        split_field: where a line has it, it says the document's split; None ignores it.
    """

    source: Literal["jsonl"] = "jsonl"
    path: Path | tuple[Path, ...]
    id_field: str | None = "id"
    title_field: str | None = "title"
    text_field: str = "text"
    split_field: str | None = "split"

    def read(self, cache: Path, report: Report) -> Iterator[Document]:
        """Lines in order; blank lines are passed over. A bad line is refused as `file:line`."""
        for file in self._files().values():
            for number, line in enumerate(read_lines(file), start=1):
                if number == 1:
                    line = line.removeprefix("\ufeff")
                if not line.isspace():
                    yield self._document(line, f"{file}:{number}")

    def inputs(self, cache: Path) -> dict[str, Any]:
        """Size and sha256 of each file."""
        return {"files": describe_files(self._files())}

    def _files(self) -> dict[str, Path]:
        return named_files(as_paths(self.path), ("*.jsonl", "*.jsonl.gz", "*.jsonl.zst"), "corpus.path")

    def _document(self, line: str, where: str) -> Document:
        row = parse_object(line, where)
        text = _string(row, self.text_field, "text_field", where)
        if not isinstance(row[self.text_field], str):
            raise DataError(f"{where}: field `{self.text_field}` is {text}", "a string", "mend the line")
        split = row.get(self.split_field) if self.split_field else None
        has_title = self.title_field is not None and self.title_field in row
        return Document(
            id=_string(row, self.id_field, "id_field", where) if self.id_field else content_id(text),
            text=text,
            title=_string(row, str(self.title_field), "title_field", where) if has_title else "",
            split=None if split is None else check_split(split, where),
        )


def parse_object(line: str, where: str) -> dict[str, Any]:
    """One line of a JSON-lines file; `where` names it in errors.

    Raises:
        DataError: it is no JSON, or no object.
    """
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(
            f"{where}: not JSON ({error.msg}, column {error.colno})", "one JSON object a line", "mend the line"
        ) from None
    if not isinstance(row, dict):
        raise DataError(f"{where}: a {type(row).__name__}", "one JSON object a line", "mend the line")
    return row


def _string(row: dict[str, Any], field: str, setting: str, where: str) -> str:
    if field not in row:
        named = ", ".join(map(str, row)) or "none"
        without = "; `corpus.id_field=null` makes ids from the texts" if setting == "id_field" else ""
        fix = f"name the right one in `corpus.{setting}`{without}"
        raise DataError(f"{where}: no field `{field}`", f"one of the line's fields: {named}", fix)
    value = row[field]
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str):
        raise DataError(f"{where}: field `{field}` is {value!r:.40}", "a string", "mend the line")
    if not value.isascii() and _SURROGATE.search(value):
        raise DataError(f"{where}: field `{field}` holds half a surrogate pair", "Unicode text", "mend the line")
    return value


_SURROGATE = re.compile("[\ud800-\udfff]")
