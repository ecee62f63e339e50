"""Remove repeated and nearly repeated documents, across splits too: what is tested must not have been trained on.

Documents stream through `Deduplicator.add`, which keeps a digest and a MinHash signature of each (on disk, so memory
does not grow with the texts); `finish` then finds the duplicates. The better protected copy stays: test before
validation before train, and within a split the earlier one.
"""

from __future__ import annotations

import hashlib
import unicodedata
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Self

import numpy as np
from pydantic import Field

from longspan.corpus.document import SPLITS, Document, check_split
from longspan.foundation.config import Config
from longspan.foundation.errors import DataError
from longspan.foundation.files import disk_errors

_PRECEDENCE = {"test": 0, "validation": 1, "train": 2}
_EXAMPLES = 20
_MINHASH_SEED = 20_417


class DedupConfig(Config):
    """What counts as a duplicate.

    Attributes:
        exact: drop documents whose normalised texts are equal (`normalise`).
        near: drop documents whose sets of word n-grams have a Jaccard similarity of at least `threshold`, as estimated
            from MinHash signatures (standard error at most 0.5 / sqrt(num_hashes), 0.044 at the default).
        threshold: the similarity from which two documents count as the same.
        shingle_words: words per n-gram.
        num_hashes: signature length; each costs 4 bytes of disk per document.
    """

    exact: bool = True
    near: bool = True
    threshold: float = Field(default=0.8, gt=0, le=1)
    shingle_words: int = Field(default=5, ge=1)
    num_hashes: int = Field(default=128, ge=16, le=4096)


@dataclass(frozen=True, slots=True)
class Removal:
    """One document that went, and why: `reason` is `repeated` (same id, same text), `exact` or `near`."""

    reason: str
    dropped: str
    dropped_split: str
    kept: str
    kept_split: str
    similarity: float


@dataclass(frozen=True)
class DedupResult:
    """What stays and what went.

    Attributes:
        keep: bool (documents,), in the order of `add`.
        counts: reason → split → number of documents dropped.
        across_splits: how many of them had their kept copy in another split.
        examples: the first removals of each reason.
    """

    keep: np.ndarray
    counts: dict[str, dict[str, int]]
    across_splits: int
    examples: list[Removal] = field(default_factory=list)

    def report(self) -> dict[str, Any]:
        """JSON-able summary for the ledger."""
        return {
            "documents": len(self.keep),
            "kept": int(self.keep.sum()),
            "dropped": self.counts,
            "across_splits": self.across_splits,
            "examples": [asdict(example) for example in self.examples],
        }


def normalise(text: str) -> str:
    """The text as duplicates are compared: NFKC, case-folded, every run of white space one space."""
    folded = text.casefold() if text.isascii() else unicodedata.normalize("NFKC", text).casefold()
    return " ".join(folded.split())


def signature(normalised: str, config: DedupConfig) -> np.ndarray:
    """MinHash of the word n-grams of a normalised text: uint32 (num_hashes,), the same on every machine."""
    from rensa import RMinHash

    shingles = _shingles(normalised, config.shingle_words)
    offsets = np.array([0, len(shingles)], dtype=np.uint64)
    rows = RMinHash.digest_matrix_from_flat_token_hashes(shingles, offsets, config.num_hashes, _MINHASH_SEED).to_rows()
    return np.array(rows[0], dtype=np.uint32)


def _shingles(normalised: str, size: int) -> np.ndarray:
    """Word n-grams as uint64 hashes (repeats included: a MinHash ignores them); a shorter text is one n-gram.

    A word is a run of ASCII letters, digits, underscores and bytes beyond ASCII. Its hash, and that of an n-gram, is a
    polynomial in an odd base modulo 2^64, mixed; NumPy does it without a Python object per word.
    """
    text = np.frombuffer(normalised.encode(), dtype=np.uint8)
    in_word = _IS_WORD[text]
    edges = np.flatnonzero(np.diff(in_word, prepend=False, append=False))
    starts, ends = edges[::2], edges[1::2]
    if not len(starts):
        return np.zeros(1, dtype=np.uint64)
    lengths = ends - starts
    first = np.cumsum(lengths) - lengths
    place = np.arange(lengths.sum()) - np.repeat(first, lengths)
    words = np.add.reduceat((text[in_word] + np.uint64(1)) * _POWERS[place % len(_POWERS)], first)
    words = (words ^ (words >> np.uint64(31))) * _MIX
    grams = np.zeros(max(len(words) - size + 1, 1), dtype=np.uint64)
    for offset in range(min(size, len(words))):
        grams = grams * _BASE + words[offset : offset + len(grams)]
    mixed: np.ndarray = grams ^ (grams >> np.uint64(29))
    return mixed


_BASE, _MIX = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xD6E8FEB86659FD93)
_POWERS = np.cumprod(np.full(64, _BASE, dtype=np.uint64))
_IS_WORD = np.array([byte >= 128 or chr(byte).isalnum() or byte == ord("_") for byte in range(256)])


def band_rows(config: DedupConfig) -> int:
    """Signature rows per LSH band: the most that still find 99 % of the pairs at the threshold.

    A pair of similarity s shares at least one of b bands of r rows with probability 1 - (1 - s^r)^b.
    """
    for rows in range(config.num_hashes // 2, 1, -1):
        if (1 - config.threshold**rows) ** (config.num_hashes // rows) <= 0.01:
            return rows
    return 1


class Deduplicator:
    """Finds duplicates among documents that stream by.

    Args:
        config: what counts as a duplicate.
        folder: an empty or missing folder for signatures; about 0.5 KiB per document. The caller removes it.
    """

    def __init__(self, config: DedupConfig, folder: Path) -> None:
        self.config = config
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self._files: dict[str, BinaryIO] = {name: (folder / name).open("wb") for name in ("facts", "ids", "signatures")}
        self._count = 0
        self._id_bytes = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for file in self._files.values():
            file.close()

    def add(self, document: Document, split: str) -> None:
        """Take the next document; `split` is where it would go."""
        normalised = normalise(document.text)
        encoded = document.id.encode()
        fact = np.zeros(1, dtype=_FACTS)
        fact["text"] = np.frombuffer(hashlib.sha256(normalised.encode()).digest()[:16], dtype="V16")
        fact["verbatim"] = np.frombuffer(hashlib.sha256(document.text.encode()).digest()[:16], dtype="V16")
        fact["id"] = np.frombuffer(hashlib.sha256(encoded).digest()[:16], dtype="V16")
        fact["id_start"], fact["id_length"] = self._id_bytes, len(encoded)
        fact["rank"] = _PRECEDENCE[check_split(split, f"document {document.id}")]
        with disk_errors(self._folder / "signatures"):
            self._files["facts"].write(fact.tobytes())
            self._files["ids"].write(encoded)
            if self.config.near:
                self._files["signatures"].write(signature(normalised, self.config).tobytes())
        self._id_bytes += len(encoded)
        self._count += 1

    def finish(self) -> DedupResult:
        """Decide what stays.

        Raises:
            DataError: one id with two different texts; records and splits are keyed by the id, so it must be mended.
        """
        self.__exit__()
        if not self._count:
            return DedupResult(np.ones(0, dtype=bool), {}, 0)
        facts = np.fromfile(self._folder / "facts", dtype=_FACTS)
        kept_for = np.full(self._count, -1, dtype=np.int64)
        similarity = np.ones(self._count, dtype=np.float32)
        reason = np.zeros(self._count, dtype=np.int8)
        # Earlier in `order` = better protected.
        order = np.lexsort((np.arange(self._count), facts["rank"]))
        for code, field_name in ((1, "id"), (2, "text")):
            if field_name == "text" and not self.config.exact:
                continue
            for first, others in _equal(facts[field_name], order, kept_for):
                if field_name == "id" and (facts["verbatim"][others] != facts["verbatim"][first]).any():
                    raise DataError(
                        f"two documents have the id {self._id(facts, first)!r} and different texts",
                        "one id per document",
                        "name another field with corpus.id_field, or mend the ids",
                    )
                kept_for[others], reason[others] = first, code
        if self.config.near:
            for dropped, kept, value in self._near(order, kept_for):
                kept_for[dropped], similarity[dropped], reason[dropped] = kept, value, 3
        return self._result(facts, kept_for, similarity, reason)

    def _near(self, order: np.ndarray, kept_for: np.ndarray) -> Iterator[tuple[int, int, float]]:
        """(dropped, kept, similarity) by going from best to least protected and comparing with what stayed so far."""
        signatures = np.memmap(
            self._folder / "signatures", dtype=np.uint32, mode="r", shape=(self._count, self.config.num_hashes)
        )
        alive = order[kept_for[order] < 0]
        buckets = _shared_buckets(signatures, alive, band_rows(self.config))
        stayed: dict[int, list[int]] = {}
        for document in alive:
            if not (mine := buckets.get(int(document))):
                continue
            candidates = np.array(
                sorted({other for bucket in mine for other in stayed.get(bucket, ())}), dtype=np.int64
            )
            if len(candidates):
                values = (signatures[candidates] == signatures[document]).mean(axis=1)
                best = int(values.argmax())
                if values[best] >= self.config.threshold:
                    yield int(document), int(candidates[best]), float(values[best])
                    continue
            for bucket in mine:
                stayed.setdefault(bucket, []).append(int(document))

    def _result(
        self, facts: np.ndarray, kept_for: np.ndarray, similarity: np.ndarray, reason: np.ndarray
    ) -> DedupResult:
        names = sorted(_PRECEDENCE, key=_PRECEDENCE.__getitem__)
        counts: dict[str, dict[str, int]] = {}
        examples: list[Removal] = []
        dropped = np.flatnonzero(kept_for >= 0)
        for code, name in enumerate(("repeated", "exact", "near"), start=1):
            members = dropped[reason[dropped] == code]
            if not len(members):
                continue
            per_split = Counter(names[rank] for rank in facts["rank"][members])
            counts[name] = {split: per_split[split] for split in SPLITS if per_split[split]}
            for member in members[:_EXAMPLES]:
                kept = self._root(kept_for, int(member))
                examples.append(
                    Removal(
                        name,
                        self._id(facts, int(member)),
                        names[facts["rank"][member]],
                        self._id(facts, kept),
                        names[facts["rank"][kept]],
                        round(float(similarity[member]), 4),
                    )
                )
        across = int((facts["rank"][dropped] != facts["rank"][kept_for[dropped]]).sum())
        return DedupResult(kept_for < 0, counts, across, examples)

    @staticmethod
    def _root(kept_for: np.ndarray, document: int) -> int:
        # The copy that an exact duplicate was dropped for may itself have gone as a near duplicate of another.
        while kept_for[document] >= 0:
            document = int(kept_for[document])
        return document

    def _id(self, facts: np.ndarray, document: int) -> str:
        with (self._folder / "ids").open("rb") as file:
            file.seek(int(facts["id_start"][document]))
            return file.read(int(facts["id_length"][document])).decode()


_FACTS = np.dtype(
    [
        ("text", "V16"),
        ("verbatim", "V16"),
        ("id", "V16"),
        ("id_start", "<i8"),
        ("id_length", "<i4"),
        ("rank", "<i4"),
    ]
)


def _equal(values: np.ndarray, order: np.ndarray, kept_for: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """Groups of equal values among what is still kept: (best protected member, the others)."""
    alive = order[kept_for[order] < 0]
    _, inverse, counts = np.unique(values[alive], return_inverse=True, return_counts=True)
    members = np.flatnonzero(counts[inverse] > 1)
    # A stable sort leaves the best protected member first in its group.
    members = members[np.argsort(inverse[members], kind="stable")]
    for group in np.split(members, np.flatnonzero(np.diff(inverse[members])) + 1):
        if len(group):
            yield int(alive[group[0]]), alive[group[1:]]


def _shared_buckets(signatures: np.ndarray, alive: np.ndarray, rows: int) -> dict[int, list[int]]:
    """document → the LSH buckets it shares with another; band by band, so that memory holds one band at a time."""
    shared: dict[int, list[int]] = {}
    next_bucket = 0
    for band in range(signatures.shape[1] // rows):
        content = np.ascontiguousarray(signatures[:, band * rows : (band + 1) * rows][alive])
        keys = content.view(np.dtype((np.void, content.dtype.itemsize * rows))).ravel()
        _, inverse, counts = np.unique(keys, return_inverse=True, return_counts=True)
        for place in np.flatnonzero(counts[inverse] > 1):
            shared.setdefault(int(alive[place]), []).append(next_bucket + int(inverse[place]))
        next_bucket += len(counts)
    return shared
