"""A tokenizer as `AutoTokenizer` of transformers loads it, and the other way round."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer as RustTokenizer

from longspan.corpus.tokenizer import Tokenizer, TokenizerConfig, train_tokenizer
from longspan.foundation.errors import UserError
from longspan.foundation.files import write_json
from longspan.foundation.randomness import numpy_generator
from longspan.models.interchange.json_object import read_object

TOKENIZER = "tokenizer.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
SPECIAL_TOKENS = "special_tokens_map.json"
BOUNDARY, PAD = "<|endoftext|>", "<|pad|>"
_SPACE = "\N{LOWER ONE EIGHTH BLOCK}"
_SAMPLES, _SAMPLE_TOKENS = 64, 32


def write_tokenizer(tokenizer: Tokenizer, folder: Path, *, markers: bool, context: int) -> list[str]:
    """Write tokenizer.json and tokenizer_config.json.

    The boundary token becomes bos and eos, the pad token pad; ids that have no text yet are called `<|endoftext|>` and
    `<|pad|>`. Text that reads like them stays text (`split_special_tokens`), as it was in training. Padding is on the
    left, as generation needs it.

    Args:
        tokenizer: the model's own.
        folder: where.
        markers: put the boundary token before every text.
        context: stored as `model_max_length`.

    Returns:
        What a user of the files must know.

    Raises:
        UserError: the `tokenizers` library would give other ids.
    """
    description = tokenizer.tokenizer_json()
    boundary = _name(description, tokenizer.special.boundary, BOUNDARY)
    pad = _name(description, tokenizer.special.pad, PAD)
    description["post_processor"] = _begin_with(boundary, tokenizer.special.boundary) if markers else None
    _check_ids(tokenizer, description, {boundary: tokenizer.special.boundary, pad: tokenizer.special.pad})
    write_json(folder / TOKENIZER, description)
    write_json(
        folder / TOKENIZER_CONFIG,
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": boundary,
            "eos_token": boundary,
            "pad_token": pad,
            "model_max_length": context,
            "padding_side": "left",
            "split_special_tokens": True,
            "clean_up_tokenization_spaces": False,
            "model_input_names": ["input_ids", "attention_mask"],
        },
    )
    if description["normalizer"] == {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}:
        return [f"transformers' tokenizers read U+2581 ({_SPACE}) in a text as a space; Longspan's keeps it"]
    return []


def read_tokenizer(folder: Path) -> tuple[Tokenizer, bool]:
    """The tokenizer of a folder with Hugging Face weights, and whether it puts the boundary token before a text.

    Raises:
        UserError: no tokenizer.json, or one that loses text.
        DataError: a file is damaged.
    """
    tokenizer = train_tokenizer(tokenizer_settings(folder), [])
    config = _described(folder)
    begins = config.get("add_bos_token")
    if not isinstance(begins, bool):
        rust = RustTokenizer.from_file(str(folder / TOKENIZER))
        begins = tokenizer.special.boundary in rust.encode("a").ids[:1]
    return tokenizer, begins


def tokenizer_settings(folder: Path) -> TokenizerConfig:
    """The settings that load the tokenizer of a folder with Hugging Face weights, for a corpus too.

    The boundary token is bos, or eos where there is no bos; pad is pad, or else the boundary token.

    Raises:
        DataError: a file is damaged.
    """
    config = _described(folder)
    bos, eos, pad = (_content(config.get(name)) for name in ("bos_token", "eos_token", "pad_token"))
    boundary = bos or eos
    settings = {"pretrained": str(folder), "boundary": boundary, "pad": pad or boundary, "prefix_space": True}
    return TokenizerConfig.parse(settings, str(folder))


def _described(folder: Path) -> dict[str, Any]:
    files = (folder / SPECIAL_TOKENS, folder / TOKENIZER_CONFIG)
    return {key: value for path in files if path.is_file() for key, value in read_object(path).items()}


def _name(description: dict[str, Any], index: int, wanted: str) -> str:
    """What the token `index` is called; an id that has no text gets a name that no other token has."""
    added = description["added_tokens"]
    vocabulary: dict[str, int] = description["model"]["vocab"]
    for content, found in (*((token["content"], token["id"]) for token in added), *vocabulary.items()):
        if found == index:
            return str(content)
    taken = {*vocabulary, *(token["content"] for token in added)}
    name = wanted
    while name in taken:
        name = f"<|{name.strip('<|>')}_|>"
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    added.append({"id": index, "content": name, **flags})
    return name


def _begin_with(content: str, index: int) -> dict[str, Any]:
    def sequence(name: str, kind: int) -> list[dict[str, Any]]:
        return [{"SpecialToken": {"id": content, "type_id": kind}}, {"Sequence": {"id": name, "type_id": kind}}]

    return {
        "type": "TemplateProcessing",
        "single": sequence("A", 0),
        "pair": sequence("A", 0) + sequence("B", 1),
        "special_tokens": {content: {"id": content, "ids": [index], "tokens": [content]}},
    }


def _check_ids(tokenizer: Tokenizer, description: dict[str, Any], special: dict[str, int]) -> None:
    """Special ids, and the ids of texts made of random tokens, must be the same."""
    rust = RustTokenizer.from_str(json.dumps(description))
    rust.encode_special_tokens = True
    draw = numpy_generator(0, "tokenizer", "texts").integers(0, tokenizer.vocab_size, (_SAMPLES, _SAMPLE_TOKENS))
    texts = [tokenizer.decode(ids).replace(_SPACE, "") for ids in np.asarray(draw)]
    ours = [ids.tolist() for ids in tokenizer.encode_batch(texts)]
    theirs = [each.ids for each in rust.encode_batch(texts, add_special_tokens=False)]
    for content, index in special.items():
        found = rust.token_to_id(content)
        ours.append([index])
        theirs.append([] if found is None else [found])
        texts.append(content)
    for text, mine, other in zip(texts, ours, theirs, strict=True):
        if mine != other:
            raise UserError(
                f"the `tokenizers` library encodes {text[:40]!r} as {other[:8]}, the tokenizer {tokenizer.name} as "
                f"{mine[:8]}",
                "a tokenizer that can be written as tokenizer.json with the same ids",
                "train with a `byte_bpe` tokenizer",
            )


def _content(token: Any) -> str | None:
    content = token.get("content") if isinstance(token, dict) else token
    return content if isinstance(content, str) and content else None
