"""What a document is, and which split it belongs to."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

from longspan.foundation.errors import UserError

SPLITS = ("train", "validation", "test")


@dataclass(frozen=True, slots=True)
class Document:
    """One text that stands for itself.

    Attributes:
        id: stable and unique within a corpus; the hash split, shards and records are keyed by it.
        text: the text, as the tokenizer will see it.
        title: for people; may be empty.
        split: `train`, `validation` or `test` where the source says so, None where the hash split decides.
    """

    id: str
    text: str
    title: str = ""
    split: str | None = None


def content_id(text: str) -> str:
    """The id of a document whose source names none: it hangs on the text alone, never on order or neighbours."""
    return hashlib.sha256(text.encode()).hexdigest()[:20]


def assign_split(document_id: str, ratios: Mapping[str, float], seed: int) -> str:
    """The split of a document by a hash of its id: documents that come or go move no other.

    The test share lies first on the unit interval, then validation, then train. So a document leaves or enters `test`
    only when the test ratio itself changes.

    Args:
        document_id: the document's id.
        ratios: shares of `train`, `validation`, `test`; a missing one counts as 0; they add up to 1.
        seed: another seed gives another, independent split.

    Raises:
        UserError: unknown split name, negative share, or shares that do not add up to 1.
    """
    check_ratios(ratios)
    key = f"{seed}\x1f{document_id}".encode()
    position = int.from_bytes(hashlib.sha256(key).digest()[:8], "big") / 2**64
    if position < (test := ratios.get("test", 0.0)):
        return "test"
    return "validation" if position < test + ratios.get("validation", 0.0) else "train"


def check_ratios(ratios: Mapping[str, float]) -> None:
    """Refuse shares that are not a split of one whole."""
    if unknown := sorted(set(ratios) - set(SPLITS)):
        raise UserError(f"unknown split `{unknown[0]}`", ", ".join(SPLITS), "use these names")
    if any(not 0 <= share <= 1 for share in ratios.values()) or abs(sum(ratios.values()) - 1) > 1e-9:
        given = ", ".join(f"{name} {share}" for name, share in ratios.items())
        raise UserError(
            f"the split shares {given}",
            "shares from 0 to 1 that add up to 1",
            "give all three shares, e.g. {train: 0.8, validation: 0.05, test: 0.15}",
        )


def check_split(split: str, where: str) -> str:
    """Return `split`, or refuse a name that is not one of `SPLITS`."""
    if split not in SPLITS:
        raise UserError(f"{where}: split {split!r}", ", ".join(SPLITS), "rename the split or map it to one of these")
    return split
