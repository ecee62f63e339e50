"""The fast path of byte-level BPE: words are encoded once and looked up afterwards.

GPT-2's splitting rule makes every word's ids independent of its neighbours, and texts repeat their words. Python's
regular expressions lack the Unicode classes of that rule, so only text of characters whose class is written out here
goes this way (ASCII, Latin-1 and Latin Extended-A letters, general punctuation); the rest goes through the library.
Both ways give the same ids (tests/corpus/test_tokenizer.py).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from itertools import chain

import numpy as np

_LETTER = "A-Za-zªµºÀ-ÖØ-öø-ſ"
_NUMBER = "0-9²³¹¼-¾"
_SPACE = r" \t\n\v\f\r"
_WORD = re.compile(
    f"'(?:[sdmt]|ll|ve|re)| ?[{_LETTER}]+| ?[{_NUMBER}]+| ?[^{_SPACE}{_LETTER}{_NUMBER}]+"
    f"|[{_SPACE}]+(?![^{_SPACE}])|[{_SPACE}]+"
)
# U+001C to U+001F, U+0085 and U+00A0 are left out: what counts as white space there differs between libraries.
_OTHER_CLASS = re.compile("[^\x00-\x1b\x20-\x7f\xa1-ſ‐-‧‰-⁞€]")
# No word reaches across these places, and the words on either side do not depend on the other side.
_CUT = re.compile(r"(?<=\S)(?=\n)")
_MOST_WORDS = 1 << 18
_MOST_CHARS = 1 << 24


class WordCache:
    """Encodes texts word by word.

    Args:
        encode: the ids of each text, by the library; used for words not met before and for other text.
    """

    def __init__(self, encode: Callable[[list[str]], list[list[int]]]) -> None:
        self._encode = encode
        self._words: dict[str, list[int]] = {}
        self._chars = 0

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """int32 ids of each text."""
        segments = [[text] if not _OTHER_CLASS.search(text) else _CUT.split(text) for text in texts]
        words = [None if _OTHER_CLASS.search(part) else _WORD.findall(part) for text in segments for part in text]
        others = [part for part, split in zip(chain.from_iterable(segments), words, strict=True) if split is None]
        known = self._known(words)
        other_ids = iter(self._encode(others) if others else [])
        parts = iter([next(other_ids) if split is None else _look_up(split, known) for split in words])
        return [np.concatenate([np.asarray(next(parts), np.int32) for _ in text]) for text in segments]

    def _known(self, words: Sequence[list[str] | None]) -> dict[str, list[int]]:
        """A table that has all of `words`; it is started anew when it grows too large, so memory stays bounded."""
        known = self._words
        missing = sorted({word for split in words if split for word in split} - known.keys())
        if missing:
            if len(known) > _MOST_WORDS or self._chars > _MOST_CHARS:
                self._words = known = {}
                self._chars = 0
                missing = sorted({word for split in words if split for word in split})
            self._chars += sum(map(len, missing))
            known.update(zip(missing, self._encode(missing), strict=True))
        return known


def _look_up(words: list[str], known: dict[str, list[int]]) -> np.ndarray:
    return np.fromiter(chain.from_iterable(map(known.__getitem__, words)), np.int32)
