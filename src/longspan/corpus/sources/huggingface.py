"""Text columns of Hugging Face datasets, from the hub or a local folder, streamed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar, Literal

from longspan.corpus.document import SPLITS, Document, content_id
from longspan.corpus.sources.base import SourceConfig, describe_files, named_files
from longspan.corpus.sources.dataset_commit import commit_at_first_use
from longspan.corpus.sources.wikitext import split_articles
from longspan.foundation.errors import DataError, UserError, first_line
from longspan.foundation.extras import require
from longspan.foundation.progress import Progress, Report

Split = Literal["train", "validation", "test"]


def _is_load_error(error: Exception) -> bool:
    """Whether the hub's libraries raised it; their HTTP client, whose name changes, has errors of its own."""
    modules = {base.__module__.partition(".")[0] for base in type(error).__mro__}
    return isinstance(error, ValueError | OSError) or any(module.startswith("httpx") for module in modules)


class HuggingFaceSource(SourceConfig):
    """One text column of a dataset, one document a row (or an article, see `articles`).

    Attributes:
        dataset: a hub id such as `Salesforce/wikitext`, or a local folder in the same layout.
        config: the dataset's configuration (subset), e.g. `wikitext-2-raw-v1`.
        revision: branch, tag or commit; None is the main branch, fixed to its commit at first use.
        text_column, id_column, title_column: columns; without `id_column` the id is made from the text.
        hub_splits: the dataset's split for each of ours, e.g. `{train: train, test: test}`; or one split's name, whose
            documents the hash split divides.
        streaming: read rows as they come; otherwise the dataset is downloaded and prepared first.
        articles: `wikitext` joins WikiText's rows (lines) into articles, equal to those of the source `wikitext`.
    """

    source: Literal["huggingface"] = "huggingface"
    dataset: str
    config: str | None = None
    revision: str | None = None
    text_column: str = "text"
    id_column: str | None = None
    title_column: str | None = None
    hub_splits: str | dict[Split, str] = "train"
    streaming: bool = True
    articles: Literal["wikitext"] | None = None

    place_only: ClassVar[frozenset[str]] = frozenset({"dataset", "revision", "streaming"})

    def read(self, cache: Path, report: Report) -> Iterator[Document]:
        """Documents of train, validation and test in the order of the rows."""
        datasets = require("hub")
        revision = None if self._local() else self._commit(cache)
        for split, name in self._wanted():
            try:
                rows = datasets.load_dataset(
                    self._path(),
                    self.config,
                    split=name,
                    revision=revision,
                    streaming=self.streaming,
                    cache_dir=str(cache / "huggingface"),
                )
            except Exception as error:
                if not _is_load_error(error):
                    raise
                raise self._unloadable(error) from None
            columns = rows.column_names
            for column in (self.text_column, self.id_column, self.title_column):
                if column is not None and columns is not None and column not in columns:
                    raise UserError(
                        f"{self.dataset} has no column `{column}`", ", ".join(columns), "name another column"
                    )
            documents = self._articles(rows, split, name) if self.articles else self._rows(rows, split, name, report)
            yield from islice(documents, self.max_documents)

    def inputs(self, cache: Path) -> dict[str, Any]:
        """The commit of the dataset on the hub, or size and sha256 of each file of a local one."""
        if self._local():
            return {"files": describe_files(named_files([Path(self._path())], ("*",), "corpus.dataset"))}
        return {"dataset": self.dataset, "commit": self._commit(cache)}

    def _wanted(self) -> list[tuple[str | None, str]]:
        if isinstance(self.hub_splits, str):
            return [(None, self.hub_splits)]
        named = {str(split): name for split, name in self.hub_splits.items()}
        return [(split, named[split]) for split in SPLITS if split in named]

    def _local(self) -> bool:
        return Path(self.dataset).expanduser().is_dir()

    def _path(self) -> str:
        return str(Path(self.dataset).expanduser().resolve()) if self._local() else self.dataset

    def _commit(self, cache: Path) -> str:
        # Without the extra nothing could be read, reachable or not.
        require("hub")
        try:
            return commit_at_first_use(self.dataset, self.revision, cache)
        except Exception as error:
            if not _is_load_error(error):
                raise
            raise self._unloadable(error) from None

    def _unloadable(self, error: Exception) -> DataError:
        name = f"{self.dataset} ({self.config})" if self.config else self.dataset
        return DataError(
            f"the dataset {name} cannot be loaded: {first_line(error)}",
            "an existing dataset, configuration and split on a reachable hub, or a local folder",
            "check the network, and `dataset`, `config`, `hub_splits` and `revision` of the corpus; "
            "or take files that you have with another source (jsonl, text, wikitext)",
        )

    def _rows(
        self, rows: Iterable[Mapping[str, Any]], split: str | None, name: str, report: Report
    ) -> Iterator[Document]:
        without_text = 0
        for number, row in enumerate(rows):
            text = row[self.text_column]
            if text is None:
                without_text += 1
                continue
            if not isinstance(text, str):
                where = f"{self.dataset}, split {name}, row {number}"
                raise DataError(
                    f"{where}: `{self.text_column}` is a {type(text).__name__}", "text", "name another column"
                )
            title = row[self.title_column] if self.title_column else ""
            document_id = str(row[self.id_column]) if self.id_column else content_id(text)
            yield Document(document_id, text, str(title or ""), split)
        if without_text:
            message = f"{self.dataset}, split {name}: left out {without_text:,} rows without text"
            report(Progress("read", message=message))

    def _articles(self, rows: Iterable[Mapping[str, Any]], split: str | None, name: str) -> Iterator[Document]:
        # The published rows lost the blank lines' ` \n`; with it back, the articles equal the raw files byte for byte.
        lines = (row[self.text_column] or " \n" for row in rows)
        whole = (line if line.endswith("\n") else f"{line}\n" for line in lines)
        for number, (title, text) in enumerate(split_articles(whole)):
            if not title:
                raise DataError(f"{self.dataset}, split {name}: no article heading", "WikiText", "remove `articles`")
            yield Document(f"{split or name}-{number:05d}", text, title, split)
