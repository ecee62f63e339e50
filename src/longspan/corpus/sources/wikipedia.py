"""Wikipedia: from the published dump to clean articles."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BeforeValidator, Field, StringConstraints, model_validator

from longspan.corpus.cleaning import VERSION, CleaningConfig
from longspan.corpus.document import Document
from longspan.corpus.sources.base import SourceConfig, describe_files
from longspan.corpus.sources.wikimedia_download import DumpFile, download, is_verified, resolve
from longspan.corpus.sources.wikimedia_dump import read_dump
from longspan.foundation.errors import UserError
from longspan.foundation.files import read_json, write_json
from longspan.foundation.machine import available_cores
from longspan.foundation.progress import Report, silent


class WikipediaSource(SourceConfig):
    """Articles of a Wikipedia, from a dump fetched and verified here, or from a local one.

    Attributes:
        path: a local `.xml.bz2` dump; None fetches one.
        wiki: database name of the wiki to fetch, e.g. `enwiki`, `simplewiki`; beside `path`, what the local dump is of.
        date: `YYYYMMDD`, or `latest`, which is resolved once and then kept in the cache.
        file: which file of the dump, without wiki and date.
        mirror: the server.
        cleaning: what counts as running text.
        workers: processes for the extraction; None takes all cores. It changes no document.
    """

    source: Literal["wikipedia"] = "wikipedia"
    path: Path | None = None
    wiki: Annotated[str, StringConstraints(pattern=r"^[a-z0-9_]+$")] = "enwiki"
    date: Annotated[str, BeforeValidator(str), StringConstraints(pattern=r"^(\d{8}|latest)$")] = "latest"
    file: str = "pages-articles-multistream.xml.bz2"
    mirror: str = "https://dumps.wikimedia.org"
    cleaning: CleaningConfig = CleaningConfig()
    workers: int | None = Field(default=None, ge=1)

    place_only: ClassVar[frozenset[str]] = frozenset({"path", "mirror", "workers", "wiki", "date", "file"})

    @model_validator(mode="after")
    def _one_origin(self) -> Self:
        fetch = {"date", "file", "mirror"} & self.model_fields_set
        if self.path is not None and fetch:
            raise UserError(
                f"`path` together with `{min(fetch)}`", "a local dump or one to fetch", "remove one of them"
            )
        return self

    def read(self, cache: Path, report: Report) -> Iterator[Document]:
        """Articles in page order; `id` is the page id."""
        yield from read_dump(self.dump(cache, report), self.cleaning, self.workers or available_cores(), report)

    def inputs(self, cache: Path) -> dict[str, Any]:
        """The dump by checksum, and what cleans it."""
        cleaner = {"cleaning": VERSION, "mwparserfromhell": version("mwparserfromhell")}
        if self.path is not None:
            # Under one name whatever the file is called: what is in it counts.
            dump = self.path.expanduser()
            if not dump.is_file():
                raise UserError(f"corpus.path: {dump} is no file", "a dump, .xml.bz2", "change `corpus.path`")
            return cleaner | {"dump": describe_files({"dump": dump})}
        file = self._resolve(cache)
        return cleaner | {"dump": {"name": file.name, file.algorithm: file.checksum}}

    def dump(self, cache: Path, report: Report = silent) -> Path:
        """The local dump; fetches and verifies it where it is not there yet."""
        if self.path is not None:
            return self.path.expanduser()
        return download(self._resolve(cache), self._folder(cache), report)

    def _folder(self, cache: Path) -> Path:
        return cache / "wikipedia"

    def _resolve(self, cache: Path) -> DumpFile:
        # Kept, so that `latest` does not move while a study is under way, and so that a fetched dump needs no network.
        note = self._folder(cache) / f"{self.wiki}-{self.date}-{self.file}.resolved.json"
        if note.is_file():
            known = DumpFile(**read_json(note))
            if is_verified(self._folder(cache) / known.name, known) or self.date == "latest":
                return known
        file = resolve(self.mirror, self.wiki, self.date, self.file)
        write_json(note, {name: getattr(file, name) for name in DumpFile.__slots__})
        return file
