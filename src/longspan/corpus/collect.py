"""The first stage of a preparation: stream documents from the source, decide what stays and in which split."""

from __future__ import annotations

import json
from array import array
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field, model_validator

from longspan.corpus.dedup import DedupConfig, Deduplicator
from longspan.corpus.document import SPLITS, Document, assign_split, check_ratios, check_split
from longspan.corpus.sources import SOURCES, AnySource
from longspan.corpus.spool import Part, SpoolWriter
from longspan.corpus.tokenizer import is_utf8
from longspan.foundation.config import Config, ConfigError, did_you_mean, unknown_key
from longspan.foundation.errors import DataError, UserError
from longspan.foundation.files import atomic_directory, read_json, write_json
from longspan.foundation.progress import Progress, Report

_EXAMPLES = 20
_NO_DEDUP = DedupConfig(exact=False, near=False)
_SUMMARY = "documents.json"
KEEP = "keep.npy"
"""bool (documents,), see `Collected`."""


class SplitConfig(Config):
    """Shares of the splits; which document falls where hangs on its id and `seed` alone."""

    train: float = Field(default=0.9, ge=0, le=1)
    validation: float = Field(default=0.05, ge=0, le=1)
    test: float = Field(default=0.05, ge=0, le=1)
    seed: int = 0

    @model_validator(mode="after")
    def _one_whole(self) -> SplitConfig:
        check_ratios(self.ratios())
        return self

    def ratios(self) -> dict[str, float]:
        """Split → share."""
        return {"train": self.train, "validation": self.validation, "test": self.test}


class CorpusConfig(Config):
    """A corpus: where its documents come from, which stay, and in which split.

    The settings of the source may stand beside its name: `{source: text, path: …}` is `{source: {source: text,
    path: …}}`.

    Attributes:
        source: where documents come from.
        splits: shares for documents that the source gives no split. A split with share 0 exists only if the source
            gives it; every other split must end up with a document.
        given_splits: `honour` what the source says, or `ignore` it and split everything by hash.
        carve: splits that the source does not give, to be taken out of its train documents by hash, at their share.
        min_chars: drop documents with fewer characters (white space around the text not counted).
        max_chars: cut documents after as many characters; the ledger says how many were cut. None keeps them whole.
        dedup: which duplicates go; across splits test stays before validation before train. None lets all stay,
            except documents that come twice under one id.
    """

    source: AnySource
    splits: SplitConfig = SplitConfig()
    given_splits: Literal["honour", "ignore"] = "honour"
    carve: tuple[Literal["validation", "test"], ...] = ()
    min_chars: int = Field(default=200, ge=1)
    max_chars: int | None = Field(default=None, ge=1)
    dedup: DedupConfig | None = DedupConfig()

    @model_validator(mode="before")
    @classmethod
    def _gather_source(cls, data: Any) -> Any:
        if not isinstance(data, dict) or not isinstance(data.get("source"), str):
            return data
        named = {str(kind.model_fields["source"].default): kind for kind in SOURCES}
        name = data["source"]
        if name not in named:
            fix = did_you_mean(name, [*named, "task"], "name one of these")
            allowed = f"{', '.join(sorted(named))}, or task"
            raise ConfigError("source", f"{ConfigError.PLACE} = {name!r}", allowed, fix)
        own = set(named[name].model_fields) - set(cls.model_fields)
        beside = {key: value for key, value in data.items() if key in own}
        rest = {key: value for key, value in data.items() if key not in beside}
        for key in rest.keys() - set(cls.model_fields):
            raise _not_of_the_source(str(key), name, {*own, *cls.model_fields})
        return {**rest, "source": named[name].parse({"source": name, **beside}, "")}

    @model_validator(mode="after")
    def _keep_something(self) -> CorpusConfig:
        if self.max_chars is not None and self.max_chars < self.min_chars:
            raise UserError(f"max_chars = {self.max_chars}", f"at least min_chars = {self.min_chars}", "raise it")
        return self

    @model_validator(mode="after")
    def _carve_something(self) -> CorpusConfig:
        for split in self.carve:
            if self.splits.ratios()[split] == 0:
                raise UserError(
                    f"carve {split} with splits.{split} 0", "a share above 0", f"raise splits.{split}, or remove carve"
                )
        return self

    def fingerprint(self, cache: Path) -> dict[str, Any]:
        """Everything that determines the documents and their splits, JSON-able."""
        return {"source": self.source.fingerprint(cache), **self.model_dump(mode="json", exclude={"source"})}

    def split_of(self, document: Document) -> str:
        """Where a document goes."""
        ratios, seed = self.splits.ratios(), self.splits.seed
        if document.split is None or self.given_splits == "ignore":
            return assign_split(document.id, ratios, seed)
        given = check_split(document.split, f"document {document.id}")
        if given == "train" and self.carve:
            drawn = assign_split(document.id, ratios, seed)
            return drawn if drawn in self.carve else given
        return given


def _not_of_the_source(key: str, name: str, allowed: set[str]) -> ConfigError:
    others = [str(kind.model_fields["source"].default) for kind in SOURCES if key in kind.model_fields]
    if not others:
        return unknown_key(key, key, allowed)
    given = f"`{ConfigError.PLACE}` is no setting of the source `{name}`"
    return ConfigError(key, given, ", ".join(sorted(allowed)), f"remove it, or set the source to {' or '.join(others)}")


class Collected:
    """What `collect` left in its folder.

    Attributes:
        keep: bool (documents,), by number in the spool: False for duplicates.
        parts: of all splits, in order.
        text_bytes: split → UTF-8 bytes of the documents that stay.
        facts: what the ledger tells: documents seen, dropped by reason, the report on duplicates.
    """

    def __init__(self, folder: Path) -> None:
        summary = read_json(folder / _SUMMARY)
        self.folder = folder
        self.keep: np.ndarray = np.load(folder / KEEP, mmap_mode="r")
        self.parts = [Part(split, number) for split in SPLITS for number in range(summary["parts"][split])]
        self.text_bytes: dict[str, int] = summary["text_bytes"]
        self.facts: dict[str, Any] = summary["facts"]


class _Dropped:
    """Documents that went, by reason: how many, and the ids of the first ones."""

    def __init__(self) -> None:
        self.by_reason: dict[str, dict[str, Any]] = {}

    def add(self, reason: str, doc_id: str) -> None:
        entry = self.by_reason.setdefault(reason, {"documents": 0, "examples": []})
        entry["documents"] += 1
        if len(entry["examples"]) < _EXAMPLES:
            entry["examples"].append(doc_id.encode(errors="replace").decode())


def collect(config: CorpusConfig, folder: Path, cache: Path, part_bytes: int, report: Report) -> Collected:
    """Spool the documents that stay to `folder`, which appears only when it is whole.

    Raises:
        DataError: a split without documents, by name; damaged input; no space on the disk.
    """
    dropped = _Dropped()
    seen: dict[str, int] = {"documents": 0, "characters": 0}
    given: dict[str, int] = {}
    cut = {"documents": 0, "characters": 0}
    sizes, ranks = array("q"), array("b")
    with atomic_directory(folder) as partial:
        with (
            SpoolWriter(partial, part_bytes) as spool,
            Deduplicator(config.dedup or _NO_DEDUP, partial / "signatures") as dedup,
        ):
            for document in config.source.documents(cache, report):
                seen["documents"] += 1
                seen["characters"] += len(document.text)
                given[str(document.split)] = given.get(str(document.split), 0) + 1
                if seen["documents"] % 100 == 0:
                    megabytes = {"MB": seen["characters"] / 1e6}
                    report(
                        Progress("documents", seen["documents"], config.source.max_documents, "documents", megabytes)
                    )
                if reason := _unfit(document, config.min_chars):
                    dropped.add(reason, document.id)
                    continue
                split = config.split_of(document)
                if config.max_chars is not None and len(document.text) > config.max_chars:
                    cut["documents"] += 1
                    cut["characters"] += len(document.text) - config.max_chars
                    document = replace(document, text=document.text[: config.max_chars])
                num_bytes = len(document.text.encode())
                dedup.add(document, split)
                spool.add(split, len(sizes), document, num_bytes)
                sizes.append(num_bytes)
                ranks.append(SPLITS.index(split))
            report(Progress("duplicates", 0, None, "documents"))
            duplicates = dedup.finish()
        _remove(partial / "signatures")
        kept_sizes = np.where(duplicates.keep, np.frombuffer(sizes, np.int64) if sizes else np.zeros(0), 0)
        text_bytes = np.bincount(np.frombuffer(ranks, np.int8) if ranks else [], kept_sizes, minlength=len(SPLITS))
        np.save(partial / KEEP, duplicates.keep)
        for reason, per_split in duplicates.counts.items():
            dropped.by_reason[f"duplicate_{reason}"] = {
                "documents": sum(per_split.values()),
                "splits": per_split,
                "examples": [gone.dropped for gone in duplicates.examples if gone.reason == reason],
            }
        by_split = {split: int(size) for split, size in zip(SPLITS, text_bytes, strict=True)}
        facts = {
            "seen": {**seen, "given_splits": given},
            "cut": cut,
            "dropped": dropped.by_reason,
            "dedup": duplicates.report(),
        }
        _refuse_empty(config, by_split, facts)
        write_json(partial / _SUMMARY, {"parts": spool.num_parts, "text_bytes": by_split, "facts": facts})
    return Collected(folder)


def _unfit(document: Document, min_chars: int) -> str | None:
    if not (is_utf8(document.text) and is_utf8(document.id) and is_utf8(document.title)):
        return "not_utf8"
    return "too_short" if len(document.text.strip()) < min_chars else None


def _refuse_empty(config: CorpusConfig, text_bytes: Mapping[str, int], facts: dict[str, Any]) -> None:
    seen = facts["seen"]
    if not seen["documents"]:
        raise DataError("the source gives no document", "one document or more", "check `corpus.path` and what is there")
    for split in SPLITS:
        if text_bytes[split] or not config.splits.ratios()[split]:
            continue
        lost = ", ".join(
            f"{entry['documents']} {reason.replace('_', ' ')}" for reason, entry in facts["dropped"].items()
        )
        sorted_by_source = config.given_splits == "honour" and set(seen["given_splits"]) - {"None"}
        if sorted_by_source and split != "train":
            fix = (
                f"add `carve: [{split}]` to the corpus to take its share out of train, give the source documents of"
                f" that split, or set `corpus.splits.{split}: 0` (and raise another share) to do without it"
            )
        else:
            fix = f"use more documents, raise `corpus.splits.{split}`, or try another `corpus.splits.seed`"
            if "too_short" in facts["dropped"]:
                fix = f"use more or longer documents, raise `corpus.splits.{split}`, or lower `corpus.min_chars`"
        named = {name: count for name, count in seen["given_splits"].items() if name != "None"}
        given = f" ({json.dumps(named)} as given by the source)" if named else ""
        raise DataError(
            f"the split `{split}` is empty: {seen['documents']} documents were read"
            f"{given}, and none is left for it; dropped: {lost or 'none'}",
            "at least one document in each split whose share is not 0",
            fix,
        )


def _remove(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()
