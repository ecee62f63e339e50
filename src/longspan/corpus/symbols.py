"""An encoder of named symbols, one id each: the vocabulary of a task, which no text trains."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, Self

import numpy as np

from longspan.foundation.errors import DataError, UserError

FILENAME = "symbols.json"


class SymbolEncoder:
    """Text is symbols one after another, with a separator between them; see `Encoder` for the attributes."""

    filename = FILENAME

    def __init__(self, content: bytes) -> None:
        """Read what `content` holds.

        Raises:
            DataError: it is no list of distinct symbols.
        """
        try:
            found = json.loads(content)
            self._symbols, self._separator = [str(each) for each in found["symbols"]], str(found["separator"])
        except (ValueError, KeyError, TypeError):
            raise DataError(
                f"{FILENAME} is damaged", "the file as Longspan wrote it", "prepare the corpus again"
            ) from None
        self._ids = {symbol: number for number, symbol in enumerate(self._symbols)}
        if len(self._ids) < len(self._symbols):
            raise DataError(f"{FILENAME} holds a symbol twice", "distinct symbols", "prepare the corpus again")
        self.content = content
        self.token_bytes = np.array([len(symbol.encode()) for symbol in self._symbols], np.int32)

    @classmethod
    def of(cls, symbols: Sequence[str], separator: str) -> Self:
        """The encoder of these symbols, ids in their order."""
        return cls(json.dumps({"symbols": list(symbols), "separator": separator}, ensure_ascii=False).encode())

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """int32 ids of each text.

        Raises:
            UserError: a text holds what is no symbol.
        """
        return [np.array([self._id(symbol) for symbol in self._split(text)], np.int32) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        """The symbols of some ids."""
        return self._separator.join(self._symbols[number] for number in ids)

    def special_id(self, content: str) -> int:
        """The id of a symbol."""
        return self._id(content)

    def tokenizer_json(self) -> dict[str, Any]:
        """The same as a word-level tokenizer.json."""
        from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

        words = Tokenizer(models.WordLevel(self._ids, unk_token=self._symbols[0]))
        if self._separator:
            words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        else:
            words.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
            words.decoder = decoders.Fuse()
        found: dict[str, Any] = json.loads(words.to_str())
        return found

    def _split(self, text: str) -> Sequence[str]:
        return text.split(self._separator) if self._separator and text else text

    def _id(self, symbol: str) -> int:
        if symbol not in self._ids:
            shown = " ".join(self._symbols[:40]) + (" …" if len(self._symbols) > 40 else "")
            raise UserError(f"{symbol!r} is no symbol of this task", shown, "use symbols of the task only")
        return self._ids[symbol]
