"""Where documents come from: one file per source, chosen in a study by `source:`."""

from __future__ import annotations

from typing import Annotated, get_args

from pydantic import Field

from longspan.corpus.sources.base import SourceConfig
from longspan.corpus.sources.huggingface import HuggingFaceSource
from longspan.corpus.sources.jsonl import JsonlSource
from longspan.corpus.sources.sotu import SotuSource
from longspan.corpus.sources.synthetic import SyntheticSource
from longspan.corpus.sources.text import TextSource
from longspan.corpus.sources.wikipedia import WikipediaSource
from longspan.corpus.sources.wikitext import WikitextSource

AnySource = Annotated[
    SotuSource | TextSource | JsonlSource | HuggingFaceSource | WikitextSource | WikipediaSource | SyntheticSource,
    Field(discriminator="source"),
]
"""Any source; the field `source` says which."""

SOURCES: tuple[type[SourceConfig], ...] = get_args(get_args(AnySource)[0])
"""Every source."""

__all__ = [
    "SOURCES",
    "AnySource",
    "HuggingFaceSource",
    "JsonlSource",
    "SotuSource",
    "SourceConfig",
    "SyntheticSource",
    "TextSource",
    "WikipediaSource",
    "WikitextSource",
]
