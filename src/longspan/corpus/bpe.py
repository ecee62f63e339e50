"""Byte-level (or byte-fallback) BPE with the `tokenizers` library: trained here, or adopted from a tokenizer.json."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer as RustTokenizer
from tokenizers import decoders, models, pre_tokenizers, trainers

from longspan.corpus.words import WordCache
from longspan.foundation.errors import DataError, UserError, first_line
from longspan.foundation.hub import fetch_file

_BYTE_PIECE = re.compile(r"<0x([0-9A-F]{2})>")
_SPACE = "\N{LOWER ONE EIGHTH BLOCK}"  # what SentencePiece-like vocabularies write for a space
_PROBE = "One  two\tthree\n\n四五六 ünï 🙂 don't 1234 <x>"


class BpeEncoder:
    """See `longspan.corpus.tokenizer.Encoder`.

    Args:
        content: the bytes of a tokenizer.json.
        origin: what the reader knows it as, for errors.

    Raises:
        DataError: not a tokenizer.json.
        UserError: a tokenizer that cannot express every text.
    """

    filename = "tokenizer.json"

    def __init__(self, content: bytes, *, origin: str) -> None:
        try:
            self._rust = RustTokenizer.from_buffer(content)
        except Exception as error:  # the library raises bare `Exception`
            raise DataError(
                f"{origin} is not a readable tokenizer.json ({error})",
                "a file that the `tokenizers` library wrote",
                "fetch or write it again",
            ) from None
        self.content = content
        self._origin = origin
        self._rust.no_truncation()
        self._rust.no_padding()
        # Text that reads like a special token stays text.
        self._rust.encode_special_tokens = True
        description = json.loads(content)
        self._special = {token["content"]: token["id"] for token in description["added_tokens"] if token["special"]}
        self.token_bytes = _token_bytes(self._rust, description, origin)
        self._words = WordCache(self._encode_by_library) if _splits_like_gpt2(description) else None

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int, num_special: int, min_frequency: int) -> BpeEncoder:
        """Learn `vocab_size - num_special` byte-level tokens; the same texts in the same order give the same bytes."""
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        if vocab_size < len(alphabet) + num_special:
            raise UserError(
                f"vocab_size {vocab_size}",
                f"at least {len(alphabet) + num_special}: one token per byte value and {num_special} special ids",
                "raise tokenizer.vocab_size",
            )
        rust = RustTokenizer(models.BPE())
        rust.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        rust.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size - num_special,
            min_frequency=min_frequency,
            show_progress=False,
            initial_alphabet=sorted(alphabet),
        )
        rust.train_from_iterator(texts, trainer=trainer)
        reached = rust.get_vocab_size() + num_special
        if reached < vocab_size:
            raise vocabulary_too_large(
                vocab_size, reached, f" at min_frequency {min_frequency}" if min_frequency > 1 else ""
            )
        return cls(rust.to_str().encode(), origin="the trained tokenizer")

    @classmethod
    def adopt(cls, path: Path, origin: str, *, prefix_space: bool) -> BpeEncoder:
        """A tokenizer.json from elsewhere; what it adds to texts (start tokens, padding, truncation) is left out.

        Args:
            path: the file.
            origin: what the reader knows it as.
            prefix_space: keep the space that it puts before a text, if it does.
        """
        content = path.read_bytes()
        try:
            description = json.loads(content)
        except (UnicodeDecodeError, json.JSONDecodeError) as error:
            raise DataError(f"{path} is not readable JSON ({error})", "a tokenizer.json", "fetch it again") from None
        if not prefix_space:
            content = json.dumps(_without_prefix_space(description), ensure_ascii=False).encode()
        encoder = cls(content, origin=origin)
        encoder._check_lossless(prefix_space)
        return encoder

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """int32 ids of each text."""
        if self._words is not None:
            return self._words.encode_batch(texts)
        return [np.array(ids, np.int32) for ids in self._encode_by_library(texts)]

    def _encode_by_library(self, texts: Sequence[str]) -> list[list[int]]:
        return [encoding.ids for encoding in self._rust.encode_batch_fast(list(texts), add_special_tokens=False)]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`."""
        return str(self._rust.decode(list(ids), skip_special_tokens=True))

    def special_id(self, content: str) -> int:
        """The id of the special token that reads `content`."""
        if content not in self._special:
            raise UserError(
                f"{self._origin} has no special token {content!r}",
                ", ".join(sorted(self._special)) or "none: it has no special tokens",
                "choose one of these, or leave it out: a new id is then appended",
            )
        return int(self._special[content])

    def tokenizer_json(self) -> dict[str, Any]:
        """The content of the file, parsed."""
        description: dict[str, Any] = json.loads(self.content)
        return description

    def _check_lossless(self, prefix_space: bool) -> None:
        ids = self.encode_batch([_PROBE])[0]
        added = int(self.token_bytes[ids].sum()) - len(_PROBE.encode())
        if added not in ((0, 1) if prefix_space else (0,)) or self.decode(ids.tolist()).lstrip(" ") != _PROBE:
            raise _lossy(self._origin)


def vocabulary_too_large(asked: int, supported: int, condition: str) -> UserError:
    """The error for a vocabulary that the text does not support."""
    return UserError(
        f"vocab_size {asked}, but the training text supports only {supported} (special ids included){condition}",
        f"at most {supported} for this text",
        f"set tokenizer.vocab_size to {supported} or less, or use more text",
    )


def find_tokenizer_file(name: str, revision: str | None) -> Path:
    """The tokenizer.json behind a path, a folder or a Hugging Face id."""
    path = Path(name).expanduser()
    if path.is_file():
        return path
    if path.is_dir():
        if (path / "tokenizer.json").is_file():
            return path / "tokenizer.json"
        raise UserError(
            f"{path} holds no tokenizer.json",
            "a folder with a tokenizer.json, beside the weights where it is a model's",
            "put the file there, or name another folder",
        )
    allowed = "a tokenizer.json, a folder that holds one, or a Hugging Face id like `HuggingFaceTB/SmolLM-135M`"
    if name.count("/") > 1 or name.startswith((".", "~", "/")) or name.endswith(".json"):
        raise UserError(f"tokenizer {name} does not exist", allowed, "check the path")
    try:
        return fetch_file(name, "tokenizer.json", revision)
    except Exception as error:  # the hub client raises many kinds: offline, not found, gated, refused
        raise UserError(
            f"tokenizer {name} is neither a path nor can it be fetched from the hub ({first_line(error)})",
            allowed,
            "check the name and the connection (HF_HUB_OFFLINE, HF_TOKEN for gated models)",
        ) from error


def _token_bytes(rust: RustTokenizer, description: dict[str, Any], origin: str) -> np.ndarray:
    vocabulary: dict[str, int] = rust.get_vocab(with_added_tokens=True)
    sizes = np.zeros(max(vocabulary.values()) + 1, np.int32)
    added = {token["content"]: token["special"] for token in description["added_tokens"]}
    kinds = set(_kinds(description["pre_tokenizer"])) | set(_kinds(description["decoder"]))
    byte_level = "ByteLevel" in kinds
    if not byte_level and not description["model"].get("byte_fallback"):
        raise _lossy(origin)
    for token, index in vocabulary.items():
        if token in added:
            sizes[index] = 0 if added[token] else len(token.encode())
        elif byte_level:
            sizes[index] = len(token)  # one printable character stands for each byte
        elif _BYTE_PIECE.fullmatch(token):
            sizes[index] = 1
        else:
            sizes[index] = len(token.replace(_SPACE, " ").encode())
    return sizes


def _splits_like_gpt2(description: dict[str, Any]) -> bool:
    splitter = description["pre_tokenizer"] or {}
    return (
        description["normalizer"] is None
        and splitter.get("type") == "ByteLevel"
        and splitter.get("use_regex", True)
        and not splitter["add_prefix_space"]
        and all(token["special"] for token in description["added_tokens"])
    )


def _lossy(origin: str) -> UserError:
    return UserError(
        f"the tokenizer {origin} does not give every text back (lower-casing, unknown tokens, stripped spaces, …)",
        "byte-level BPE, or BPE with byte fallback",
        "choose another tokenizer, or train one with `kind: byte_bpe`",
    )


def _kinds(node: Any) -> list[str]:
    """The types in a component and in those it consists of."""
    if isinstance(node, dict):
        own = [node["type"]] if isinstance(node.get("type"), str) else []
        return own + [kind for child in node.values() for kind in _kinds(child)]
    if isinstance(node, list):
        return [kind for child in node for kind in _kinds(child)]
    return []


def _without_prefix_space(description: dict[str, Any]) -> dict[str, Any]:
    """The same tokenizer, except that it puts no space before a text (nor takes one away when decoding)."""
    adds = "Prepend" in _kinds(description["normalizer"])
    return {
        **description,
        "normalizer": _drop(description["normalizer"], "Prepend"),
        "pre_tokenizer": _no_prefix(description["pre_tokenizer"]),
        "decoder": _no_prefix(_drop(description["decoder"], "Strip") if adds else description["decoder"]),
    }


def _drop(node: Any, kind: str) -> Any:
    if not isinstance(node, dict):
        return node
    if node.get("type") == kind:
        return None
    for field in ("normalizers", "decoders"):
        if field in node:
            kept = [child for child in (_drop(child, kind) for child in node[field]) if child is not None]
            return {**node, field: kept} if kept else None
    return node


def _no_prefix(node: Any) -> Any:
    if isinstance(node, list):
        return [_no_prefix(child) for child in node]
    if not isinstance(node, dict):
        return node
    changed = {key: _no_prefix(value) for key, value in node.items()}
    if changed.get("type") == "ByteLevel" and "add_prefix_space" in changed:
        changed["add_prefix_space"] = False
    if changed.get("type") == "Metaspace":
        changed["prepend_scheme"] = "never"
        changed.pop("add_prefix_space", None)
    return changed
