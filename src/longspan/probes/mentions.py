"""Words of a document that are whole tokens: names, numbers and other words, with the ids that spell them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from longspan.corpus.tokenizer import Tokenizer

MentionKind = Literal["name", "number", "word"]

_WORD = re.compile(
    rb"(?<![A-Za-z0-9\x80-\xff'.,-])(?:[A-Z]?[a-z]{3,}|\d{1,3}(?:,\d{3})+|\d{3,})(?![A-Za-z0-9\x80-\xff'-]|[.,]\d)"
)
_BEGINS_SENTENCE = re.compile(rb"(?:^|[.!?:;\"'()\n\]\[-])\s*$")


@dataclass(frozen=True, slots=True)
class Mention:
    """One word at one place.

    Attributes:
        word: as written.
        kind: `name` is capitalised inside a sentence, `number` has digits, `word` is lower-case.
        start: index of its first token in the document; the space before it may belong to that token.
        ids: of its tokens, which spell it and nothing else.
    """

    word: str
    kind: MentionKind
    start: int
    ids: tuple[int, ...]

    @property
    def stop(self) -> int:
        """Index behind its last token."""
        return self.start + len(self.ids)


@dataclass(frozen=True)
class Read:
    """A document that was read: its words, and its lower-case bytes with the end of each token in them."""

    mentions: tuple[Mention, ...]
    lower: bytes
    ends: NDArray[np.int64]

    def holds(self, word: str, first: int = 0, stop: int | None = None) -> bool:
        """Whether tokens [first, stop) hold a word, in whatever case and as whatever part of another."""
        begin = int(self.ends[first - 1]) if first else 0
        end = len(self.lower) if stop is None else int(self.ends[stop - 1]) if stop else 0
        return self.lower.find(word.lower().encode(), begin, end) >= 0


def read(document: NDArray[Any], tokenizer: Tokenizer) -> Read | None:
    """The words of a document; None where the bytes of its tokens do not add up to its text."""
    raw = tokenizer.decode(document).encode()
    sizes = tokenizer.token_bytes[document].astype(np.int64)
    ends = np.cumsum(sizes)
    if not len(ends) or ends[-1] != len(raw):
        return None
    found = []
    for match in _WORD.finditer(raw):
        begin, end = match.span()
        first, last = (int(np.searchsorted(ends, place, side="right")) for place in (begin, end - 1))
        opened = int(ends[first] - sizes[first])
        if ends[last] != end or not (opened == begin or (opened == begin - 1 and raw[opened:begin] == b" ")):
            continue
        word = match.group().decode()
        kind: MentionKind = "number" if word[0].isdigit() else "name" if word[0].isupper() else "word"
        if kind == "name" and _BEGINS_SENTENCE.search(raw, max(0, begin - 8), begin):
            continue
        found.append(Mention(word, kind, first, tuple(document[first : last + 1].tolist())))
    return Read(tuple(found), raw.lower(), ends)
