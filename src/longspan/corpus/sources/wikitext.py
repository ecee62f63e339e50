"""WikiText's raw files: its documents are articles, not lines."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from longspan.corpus.document import SPLITS, Document
from longspan.corpus.sources.base import SourceConfig, describe_files
from longspan.corpus.sources.compressed import read_lines
from longspan.foundation.errors import DataError, UserError
from longspan.foundation.progress import Report

# Level 1 only: a level-2 heading reads ` = = Title = = `.
_HEADING = re.compile(r" = (?!= )(?P<title>.*\S)(?<! =) = \n?")


def split_articles(lines: Iterable[str]) -> Iterator[tuple[str, str]]:
    r"""Cut WikiText lines into articles, losing nothing: the texts joined are the lines joined.

    An article begins with the blank line before its level-1 heading. A real heading has a blank line on both sides;
    lines such as ` = 1 henry and capacitance C = ` (the rest of a formula) do not, and stay in their paragraph.

    Args:
        lines: lines with their line feeds, as in the published raw files (blank lines are ` \n`).

    Yields:
        (title, text) of each article. What comes before the first heading belongs to the first article.
    """
    title, article = "", [""]
    before, line = "", ""
    for after in _with_end(lines):
        heading = _HEADING.fullmatch(line)
        if heading and not before.strip() and not after.strip():
            opening = article.pop()
            if title:
                yield title, "".join(article)
                article = []
            title = heading["title"]
            article.append(opening)
        article.append(line)
        before, line = line, after
    if title or "".join(article).strip():
        yield title, "".join(article)


def _with_end(lines: Iterable[str]) -> Iterator[str]:
    yield from lines
    yield ""


class WikitextSource(SourceConfig):
    """Raw WikiText files by split, plain or `.zst` or `.gz`, one document per article, split as published."""

    source: Literal["wikitext"] = "wikitext"
    path: dict[Literal["train", "validation", "test"], Path]

    def read(self, cache: Path, report: Report) -> Iterator[Document]:
        """Articles of train, validation and test, in the order of the files; ids are `test-00012`."""
        for split, file in self._files().items():
            number = -1
            articles = enumerate(split_articles(read_lines(file)))
            for number, (title, text) in islice(articles, self.max_documents):
                if not title:
                    raise DataError(
                        f"{file} has no article heading", "lines such as ` = Title = `", "use the source `text`"
                    )
                yield Document(id=f"{split}-{number:05d}", text=text, title=title, split=split)
            if number < 0:
                raise DataError(f"{file} is empty", "a raw WikiText file", f"change corpus.path.{split}")

    def inputs(self, cache: Path) -> dict[str, Any]:
        """Size and sha256 of each split's file."""
        return {"files": describe_files(self._files())}

    def _files(self) -> dict[str, Path]:
        in_order = sorted(self.path.items(), key=lambda item: SPLITS.index(item[0]))
        files: dict[str, Path] = {split: path.expanduser() for split, path in in_order}
        for split, file in files.items():
            if not file.is_file():
                where = f"corpus.path.{split}"
                raise UserError(f"{where}: {file} is not a file", "a raw WikiText file", f"change `{where}`")
        return files
