"""Text to token ids and back, exactly, with every special id in one place and the UTF-8 bytes of each token known.

Special ids are never part of the text encoder's matching: text that happens to read `<|endoftext|>` is encoded as the
plain characters it consists of, so no document can forge a boundary.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, Self

import numpy as np
from pydantic import Field, model_validator

from longspan.corpus import symbols
from longspan.foundation.config import Config
from longspan.foundation.errors import DataError, UserError
from longspan.foundation.files import atomic_write, digest, read_json, sha256_file, write_json

NUM_SPECIAL = 2
"""Rows of a trained vocabulary that are special: boundary and pad."""

_META = "longspan.json"


@dataclass(frozen=True, slots=True)
class SpecialTokens:
    """The one place for special ids.

    Attributes:
        boundary: marks the beginning of a document where packing uses markers.
        pad: fills rows; such positions have `doc_id` -1 and no target, so the model never learns from it.
    """

    boundary: int
    pad: int


class Encoder(Protocol):
    """What turns text into ids underneath a `Tokenizer`; knows nothing of Longspan's own special ids.

    Attributes:
        content: the bytes of its file; they determine it.
        filename: what that file is called.
        token_bytes: int32 (rows,), UTF-8 bytes of the text that each id stands for.
    """

    content: bytes
    filename: str
    token_bytes: np.ndarray

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """int32 ids of each text, without any special id."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids below `len(token_bytes)`."""
        ...

    def special_id(self, content: str) -> int:
        """The id of an existing special token, e.g. `<|endoftext|>`."""
        ...

    def tokenizer_json(self) -> dict[str, Any]:
        """The same encoder as the content of a tokenizer.json, which the `tokenizers` library reads."""
        ...


class TokenizerConfig(Config):
    """Which tokenizer: trained on the training split (`byte_bpe`, `sentencepiece`), loaded (`pretrained`), or a task's.

    Attributes:
        kind: `byte_bpe` is lossless byte-level BPE; `sentencepiece` is SentencePiece BPE with byte fallback (extra);
            `task` is what a task brings: it is filled in where the corpus is one.
        vocab_size: rows of the embedding, the two special ids included (trained kinds); reached exactly, or an error.
        min_frequency: how often a pair must occur to be merged (`byte_bpe`).
        character_coverage: share of characters that get a piece of their own; the rest are bytes (`sentencepiece`).
        training_bytes: train on a fixed sample of documents of about this many UTF-8 bytes at most (trained kinds).
        pretrained: a `tokenizer.json`, a folder that holds one, or a Hugging Face id (`pretrained`). A tokenizer that
            Longspan wrote is taken as it is, special ids included.
        revision: branch, tag or commit of the Hugging Face id.
        boundary, pad: the existing special token to use, e.g. `<|endoftext|>`; None appends a new id beyond the
            vocabulary (`pretrained`).
        prefix_space: keep the space that some tokenizers put before a text (`pretrained`). Off, token bytes add up
            exactly; on, ids equal the original tokenizer's.
    """

    kind: Literal["byte_bpe", "sentencepiece", "pretrained", "task"] = "byte_bpe"
    vocab_size: int = Field(default=4096, ge=3)
    min_frequency: int = Field(default=2, ge=1)
    character_coverage: float = Field(default=0.9995, gt=0, le=1)
    training_bytes: int = Field(default=256 * 2**20, ge=1)
    pretrained: str | None = None
    revision: str | None = None
    boundary: str | None = None
    pad: str | None = None
    prefix_space: bool = False

    @model_validator(mode="before")
    @classmethod
    def _pretrained_says_the_kind(cls, data: Any) -> Any:
        if isinstance(data, dict) and data.get("pretrained") and "kind" not in data:
            return {**data, "kind": "pretrained"}
        return data

    @model_validator(mode="after")
    def _only_what_the_kind_honours(self) -> Self:
        honoured = _HONOURED[self.kind]
        for name in sorted(type(self).model_fields.keys() - honoured - {"kind"}):
            if getattr(self, name) != type(self).model_fields[name].default:
                raise UserError(
                    f"`{name}` with a tokenizer of kind `{self.kind}`", ", ".join(sorted(honoured)), f"remove `{name}`"
                )
        if self.kind == "pretrained" and not self.pretrained:
            raise UserError(
                "a tokenizer of kind `pretrained` without `pretrained`",
                "a tokenizer.json, a folder that holds one, or a Hugging Face id",
                "add `pretrained: PATH_OR_ID`",
            )
        if self.kind == "byte_bpe" and self.vocab_size < 256 + NUM_SPECIAL:
            raise UserError(
                f"vocab_size = {self.vocab_size}",
                f"at least {256 + NUM_SPECIAL}: one token per byte value and {NUM_SPECIAL} special ids",
                "raise tokenizer.vocab_size",
            )
        return self


_HONOURED = {
    "byte_bpe": {"vocab_size", "min_frequency", "training_bytes"},
    "sentencepiece": {"vocab_size", "character_coverage", "training_bytes"},
    "task": {"vocab_size"},
    "pretrained": {"pretrained", "revision", "boundary", "pad", "prefix_space"},
}


def settings_of_kind(kind: Any) -> frozenset[str]:
    """The settings that a kind of tokenizer honours; all of them for a kind that is none."""
    return frozenset({"kind", *_HONOURED.get(kind, TokenizerConfig.model_fields)})


class Tokenizer:
    """Token ids for text, plus the special ids.

    Attributes:
        name: kind (or origin), vocabulary size and the beginning of the fingerprint, e.g. `byte_bpe-4096-1a2b3c4d`.
        fingerprint: sha256 (hex) of all that determines ids.
        vocab_size: rows a model needs, special ids included.
        special: the special ids.
        token_bytes: int32 (V,). UTF-8 bytes of each token's text; 0 for special ids. Summed over the ids of a
            document it is the document's size in UTF-8 (of the normalised text where a pretrained tokenizer
            normalises, plus one where `prefix_space` adds a space).
        provenance: how the tokenizer came about, for ledgers and reports; takes no part in the fingerprint.
    """

    def __init__(
        self, encoder: Encoder, special: SpecialTokens, *, stem: str, provenance: dict[str, Any] | None = None
    ) -> None:
        rows = len(encoder.token_bytes)
        self.special = special
        self.vocab_size = max(rows, special.boundary + 1, special.pad + 1)
        self.token_bytes = np.zeros(self.vocab_size, np.int32)
        self.token_bytes[:rows] = encoder.token_bytes
        self.token_bytes[[special.boundary, special.pad]] = 0
        self.token_bytes.setflags(write=False)
        self.fingerprint = digest(
            {
                "file": hashlib.sha256(encoder.content).hexdigest(),
                "boundary": special.boundary,
                "pad": special.pad,
                "vocab_size": self.vocab_size,
            }
        )
        self.name = f"{stem}-{self.vocab_size}-{self.fingerprint[:8]}"
        self.provenance = dict(provenance or {})
        self._encoder = encoder
        self._stem = stem
        self._no_text = np.ones(self.vocab_size, bool)
        self._no_text[:rows] = False
        self._no_text[[special.boundary, special.pad]] = True

    def __repr__(self) -> str:
        return f"Tokenizer({self.name})"

    def encode(self, text: str) -> np.ndarray:
        """int32 (T,) ids of `text`; no special id is among them."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """int32 ids of each text; faster than one by one.

        Raises:
            DataError: a text that has no UTF-8 form (a lone surrogate).
        """
        for text in texts:
            if not is_utf8(text):
                raise DataError(
                    f"the text {text[:40]!r}… holds a lone surrogate", "text that UTF-8 can express", "repair it"
                )
        return self._encoder.encode_batch(texts)

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text of `ids`; special ids stand for no text. `decode(encode(text)) == text`.

        Ids that cut a character in half give U+FFFD there.

        Raises:
            UserError: an id outside the vocabulary.
        """
        array = np.asarray(ids, np.int64)
        outside = (array < 0) | (array >= self.vocab_size)
        if outside.any():
            raise UserError(f"token id {array[outside][0]}", f"0 to {self.vocab_size - 1}", "use ids of this tokenizer")
        return self._encoder.decode(array[~self._no_text[array]].tolist())

    def tokenizer_json(self) -> dict[str, Any]:
        """The encoder as the content of a tokenizer.json; special ids beyond its vocabulary are not in it."""
        return self._encoder.tokenizer_json()

    def save(self, folder: Path) -> None:
        """Write the tokenizer: its file, and `longspan.json` last."""
        with atomic_write(folder / self._encoder.filename, "wb") as file:
            file.write(self._encoder.content)
        write_json(
            folder / _META,
            {
                "format": 1,
                "file": self._encoder.filename,
                "stem": self._stem,
                "boundary": self.special.boundary,
                "pad": self.special.pad,
                "vocab_size": self.vocab_size,
                "fingerprint": self.fingerprint,
                "provenance": self.provenance,
            },
        )

    @staticmethod
    def load(folder: Path) -> Tokenizer:
        """Read a tokenizer that `save` wrote.

        Raises:
            DataError: a missing or altered file.
            MissingExtra: a SentencePiece tokenizer without the package.
        """
        if not (folder / _META).is_file():
            raise DataError(
                f"{folder} holds no tokenizer (no {_META})", "a folder that Longspan wrote", "prepare the corpus again"
            )
        meta = read_json(folder / _META)
        path = folder / meta["file"]
        if not path.is_file():
            raise DataError(f"{path} is missing", "the tokenizer's files as written", "prepare the corpus again")
        tokenizer = Tokenizer(
            _read_encoder(path),
            SpecialTokens(boundary=meta["boundary"], pad=meta["pad"]),
            stem=meta["stem"],
            provenance=meta["provenance"],
        )
        if tokenizer.fingerprint != meta["fingerprint"]:
            raise DataError(
                f"{path} was altered: its fingerprint is not the one in {_META}",
                "the tokenizer's files as written",
                "prepare the corpus again",
            )
        return tokenizer


def is_utf8(text: str) -> bool:
    """Whether UTF-8 can express `text`; a lone surrogate, which JSON can smuggle in, cannot be."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def train_tokenizer(config: TokenizerConfig, texts: Iterable[str]) -> Tokenizer:
    """Train (or load) the tokenizer that `config` describes.

    Args:
        config: which one.
        texts: the training split's texts, as many as shall be seen; not read for a pretrained tokenizer.

    Raises:
        UserError: a vocabulary larger than the text supports (it says what the text supports), or a pretrained
            tokenizer that is not there, or one that loses text.
        MissingExtra: `sentencepiece` is asked for and not installed.
    """
    if config.kind == "pretrained":
        return _pretrained(config)
    if config.kind == "task":
        raise UserError("a tokenizer of kind `task` for text", "a kind that encodes text", "choose byte_bpe")
    counted = _Counted(texts)
    if config.kind == "byte_bpe":
        from longspan.corpus.bpe import BpeEncoder

        encoder: Encoder = BpeEncoder.train(counted, config.vocab_size, NUM_SPECIAL, config.min_frequency)
    else:
        from longspan.corpus.sentencepiece_bpe import SentencePieceEncoder

        encoder = SentencePieceEncoder.train(counted, config.vocab_size, NUM_SPECIAL, config.character_coverage)
    rows = len(encoder.token_bytes)
    assert rows + NUM_SPECIAL == config.vocab_size, "encoders reach the vocabulary or raise"
    return Tokenizer(
        encoder,
        SpecialTokens(boundary=rows, pad=rows + 1),
        stem=config.kind,
        provenance={
            "kind": config.kind,
            "trained_on_documents": counted.documents,
            "trained_on_bytes": counted.bytes,
        },
    )


def tokenizer_fingerprint(config: TokenizerConfig) -> dict[str, Any]:
    """All that determines the tokenizer besides its training text, JSON-able; a file counts by its content."""
    if config.kind != "pretrained":
        return config.model_dump(mode="json")
    from longspan.corpus.bpe import find_tokenizer_file

    assert config.pretrained is not None
    if (own := _own_tokenizer(config)) is not None:
        return {"longspan": Tokenizer.load(own).fingerprint}
    path = find_tokenizer_file(config.pretrained, config.revision)
    return {**config.model_dump(mode="json", exclude={"pretrained", "revision"}), "sha256": sha256_file(path)}


def _own_tokenizer(config: TokenizerConfig) -> Path | None:
    """The folder of a tokenizer that Longspan wrote, None where `pretrained` names none.

    Raises:
        UserError: settings that would change it.
    """
    folder = Path(config.pretrained or "").expanduser()
    if not (folder / _META).is_file():
        return None
    for name in ("revision", "boundary", "pad", "prefix_space"):
        if value := getattr(config, name):
            given = f"tokenizer.{name} = {value!r} for {folder}"
            raise UserError(given, "a tokenizer of Longspan as it is", f"remove `{name}`")
    return folder


class _Counted:
    """Passes texts on and remembers how much it passed on."""

    def __init__(self, texts: Iterable[str]) -> None:
        self._texts = texts
        self.documents = 0
        self.bytes = 0

    def __iter__(self) -> Iterator[str]:
        for text in self._texts:
            self.documents += 1
            self.bytes += len(text.encode())
            yield text


def _pretrained(config: TokenizerConfig) -> Tokenizer:
    from longspan.corpus.bpe import BpeEncoder, find_tokenizer_file

    assert config.pretrained is not None
    if (own := _own_tokenizer(config)) is not None:
        return Tokenizer.load(own)
    path = find_tokenizer_file(config.pretrained, config.revision)
    encoder = BpeEncoder.adopt(path, config.pretrained, prefix_space=config.prefix_space)
    following = len(encoder.token_bytes)
    boundary, pad = following, following + 1
    if config.boundary is not None:
        boundary, pad = encoder.special_id(config.boundary), following
    if config.pad is not None:
        pad = encoder.special_id(config.pad)
    provenance = {"kind": "pretrained", "pretrained": config.pretrained, "revision": config.revision}
    stem = Path(config.pretrained).stem if path == Path(config.pretrained) else Path(config.pretrained).name
    return Tokenizer(
        encoder, SpecialTokens(boundary=boundary, pad=pad), stem=stem.replace("/", "-"), provenance=provenance
    )


def _read_encoder(path: Path) -> Encoder:
    if path.suffix == ".model":
        from longspan.corpus.sentencepiece_bpe import SentencePieceEncoder

        return SentencePieceEncoder(path.read_bytes())
    if path.name == symbols.FILENAME:
        return symbols.SymbolEncoder(path.read_bytes())
    from longspan.corpus.bpe import BpeEncoder

    return BpeEncoder(path.read_bytes(), origin=str(path))
