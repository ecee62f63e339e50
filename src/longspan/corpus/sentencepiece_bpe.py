"""SentencePiece BPE with byte fallback, set up so that every text comes back exactly (extra `sentencepiece`)."""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from longspan.corpus.bpe import vocabulary_too_large
from longspan.foundation.errors import DataError, UserError
from longspan.foundation.extras import require

_SPACE = "\N{LOWER ONE EIGHTH BLOCK}"
_LONGEST = 1 << 16


class SentencePieceEncoder:
    """See `longspan.corpus.tokenizer.Encoder`.

    SentencePiece writes U+2581 for a space, so a U+2581 of the text would come back as a space; here it is encoded as
    its three bytes.

    Args:
        content: the bytes of a SentencePiece model that `train` made.
    """

    filename = "tokenizer.model"

    def __init__(self, content: bytes) -> None:
        module = require("sentencepiece")
        self.content = content
        try:
            self._model: Any = module.SentencePieceProcessor(model_proto=content)
        except RuntimeError as error:
            raise DataError(
                f"not a readable SentencePiece model ({error})", "the file as written", "train it again"
            ) from None
        rows = self._model.get_piece_size()
        self.token_bytes = np.zeros(rows, np.int32)
        for index in range(rows):
            if self._model.is_byte(index):
                self.token_bytes[index] = 1
            elif not (self._model.is_unknown(index) or self._model.is_control(index)):
                self.token_bytes[index] = len(self._model.id_to_piece(index).replace(_SPACE, " ").encode())
        self._escaped = [self._model.piece_to_id(f"<0x{byte:02X}>") for byte in _SPACE.encode()]

    @classmethod
    def train(
        cls, texts: Iterable[str], vocab_size: int, num_special: int, character_coverage: float
    ) -> SentencePieceEncoder:
        """Learn `vocab_size - num_special` pieces (256 bytes and an unused `<unk>` among them)."""
        module = require("sentencepiece")
        model = io.BytesIO()
        try:
            module.SentencePieceTrainer.train(
                sentence_iterator=_sentences(texts),
                model_writer=model,
                vocab_size=vocab_size - num_special,
                model_type="bpe",
                byte_fallback=True,
                character_coverage=character_coverage,
                hard_vocab_limit=True,
                max_sentence_length=4 * _LONGEST,
                # Nothing may be normalised away, or text would not come back.
                normalization_rule_name="identity",
                remove_extra_whitespaces=False,
                add_dummy_prefix=False,
                allow_whitespace_only_pieces=True,
                unk_id=0,
                bos_id=-1,
                eos_id=-1,
                pad_id=-1,
                num_threads=1,
                minloglevel=2,
            )
        except RuntimeError as error:
            raise _explain(error, vocab_size, num_special, character_coverage) from None
        return cls(model.getvalue())

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """int32 ids of each text."""
        parts = [text.split(_SPACE) for text in texts]
        flat = iter(self._model.encode([part for text in parts for part in text]))
        return [np.array(self._join([next(flat) for _ in text]), np.int32) for text in parts]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`."""
        return str(self._model.decode(list(ids)))

    def special_id(self, content: str) -> int:
        """Refused: models trained here have no special pieces."""
        raise UserError(
            f"special token {content!r}", "none: SentencePiece tokenizers get appended special ids", "remove it"
        )

    def tokenizer_json(self) -> dict[str, Any]:
        """The same merges for the `tokenizers` library; there, a U+2581 of the text is read as a space.

        The merges of a piece are all pairs of pieces that make it, and pieces merge in the order of their scores.
        """
        pieces = [self._model.id_to_piece(index) for index in range(len(self.token_bytes))]
        ids = {piece: index for index, piece in enumerate(pieces)}
        ranked = sorted(
            (-self._model.get_score(index), ids[left], ids[right])
            for index, piece in enumerate(pieces)
            if not (self._model.is_byte(index) or self._model.is_unknown(index))
            for left, right in ((piece[:at], piece[at:]) for at in range(1, len(piece)))
            if left in ids and right in ids
        )
        unknown = pieces[self._model.unk_id()]
        kept = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
        return {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": [{"id": ids[unknown], "content": unknown, **kept}],
            "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE},
            "pre_tokenizer": None,
            "post_processor": None,
            "decoder": {
                "type": "Sequence",
                "decoders": [
                    {"type": "Replace", "pattern": {"String": _SPACE}, "content": " "},
                    {"type": "ByteFallback"},
                    {"type": "Fuse"},
                ],
            },
            "model": {
                "type": "BPE",
                "dropout": None,
                "unk_token": unknown,
                "continuing_subword_prefix": None,
                "end_of_word_suffix": None,
                "fuse_unk": True,
                "byte_fallback": True,
                "ignore_merges": False,
                "vocab": ids,
                "merges": [[pieces[left], pieces[right]] for _, left, right in ranked],
            },
        }

    def _join(self, parts: list[list[int]]) -> list[int]:
        ids = list(parts[0])
        for part in parts[1:]:
            ids += self._escaped + part
        return ids


def _sentences(texts: Iterable[str]) -> Iterator[str]:
    """Lines of bounded length; the trainer would silently skip long ones and those with a tab or NUL in them."""
    for text in texts:
        for line in re.split(r"(?<=\n)|[\t\0]", text):
            for start in range(0, len(line), _LONGEST):
                yield line[start : start + _LONGEST]


def _explain(error: RuntimeError, vocab_size: int, num_special: int, coverage: float) -> UserError:
    message = str(error)
    if found := re.search(r"set it to a value <= (\d+)", message):
        return vocabulary_too_large(vocab_size, int(found[1]) + num_special, "")
    if found := re.search(r"required_chars\. (\d+) vs (\d+)", message):
        least = int(found[2]) + num_special
        return UserError(
            f"vocab_size {vocab_size}",
            f"at least {least} for this text: its characters at character_coverage {coverage}, 256 bytes, special ids",
            f"raise tokenizer.vocab_size to {least}, or lower tokenizer.character_coverage",
        )
    return UserError(
        f"SentencePiece cannot train on this text ({message})", "text with words in it", "use another text"
    )
