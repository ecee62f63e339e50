"""Tokenizers give every text back, count its bytes exactly, and never take text for a special token."""

from __future__ import annotations

import json
import sys
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from longspan.corpus import words
from longspan.corpus.sources.compressed import read_lines
from longspan.corpus.tokenizer import Tokenizer, TokenizerConfig, train_tokenizer
from longspan.foundation.errors import DataError, UserError
from longspan.foundation.extras import MissingExtra

WORDS = ["the", "state", "of", "union", "address", "über", "naïve", "漢字", "🙂", "don't", "1984", "\n\n", "spell"]
TEXTS = [" ".join(WORDS[(i * j + j) % len(WORDS)] for j in range(1, 60)) + f" {i}\n" for i in range(60)]

any_text = st.lists(
    st.one_of(
        st.text(st.characters(exclude_categories=("Cs",)), max_size=20),
        st.sampled_from([*"▁ \t\n\r\0<>|sĠ", "<|endoftext|>", "<0x41>", "<unk>", "the ", "  "]),
    ),
    max_size=8,
).map("".join)


def byte_bpe(vocab_size: int = 300) -> Tokenizer:
    return train_tokenizer(TokenizerConfig(vocab_size=vocab_size), TEXTS)


def sentencepiece(vocab_size: int = 420) -> Tokenizer:
    pytest.importorskip("sentencepiece")
    return train_tokenizer(TokenizerConfig(kind="sentencepiece", vocab_size=vocab_size), TEXTS)


def llama_like(tmp: Path) -> Path:
    """A byte-fallback tokenizer.json as Llama-2 has it: it prepends a space and strips it when decoding."""
    pieces = [
        "<unk>",
        "<s>",
        "</s>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        "▁",
        "t",
        "h",
        "e",
        "▁t",
        "he",
        "▁the",
    ]
    description = {
        "version": "1.0",
        "truncation": {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0},
        "padding": None,
        "added_tokens": [
            {"id": i, "content": c, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
             "special": True}
            for i, c in enumerate(["<unk>", "<s>", "</s>"])
        ],
        "normalizer": {
            "type": "Sequence",
            "normalizers": [
                {"type": "Prepend", "prepend": "▁"},
                {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
            ],
        },
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                {"type": "Strip", "content": " ", "start": 1, "stop": 0},
            ],
        },
        "model": {
            "type": "BPE", "dropout": None, "unk_token": "<unk>", "continuing_subword_prefix": None,
            "end_of_word_suffix": None, "fuse_unk": True, "byte_fallback": True, "ignore_merges": False,
            "vocab": {piece: i for i, piece in enumerate(pieces)},
            "merges": [["▁", "t"], ["h", "e"], ["▁t", "he"]],
        },
    }  # fmt: skip
    path = tmp / "tokenizer.json"
    path.write_text(json.dumps(description), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tokenizer]:
    folder = tmp_path_factory.mktemp("llama")
    made = {"byte_bpe": byte_bpe(), "sentencepiece": sentencepiece()}
    made["byte_fallback"] = train_tokenizer(TokenizerConfig(pretrained=str(llama_like(folder))), [])
    return made


@pytest.mark.parametrize("kind", ["byte_bpe", "sentencepiece"])
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=any_text)
def test_any_text_comes_back_and_its_bytes_add_up(tokenizers: dict[str, Tokenizer], kind: str, text: str) -> None:
    tokenizer = tokenizers[kind]
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.token_bytes[ids].sum() == len(text.encode())
    assert not np.isin(ids, [tokenizer.special.boundary, tokenizer.special.pad]).any()


PARTS = ["the", "naïve", "ſ", "ß", "²", "¾", "7", "'s", "'S", "'ll", "'", "!", "—", "…", "€", "🙂", "漢", "Ω"]
SPACES = [" ", "  ", "\n", "\n\n", "\t", "\v", "\f", "\r", "\x1c", "\x1f", "\x85", "\xa0", "\u2028", "\u200b", "\x7f"]
spaces_and_words = st.lists(st.sampled_from([*PARTS, *SPACES]), max_size=25).map("".join)


def frames() -> list[str]:
    """Every character up to U+2100 in the company of letters, numbers, marks and white space."""
    characters = [chr(code) for code in range(0x2100)]
    return [f"a{c}a 1{c}1 {c}{c} !{c}! \n{c}\n{c}" for c in characters]


@pytest.fixture(scope="module")
def dense() -> Tokenizer:
    """Merges wherever words hold together, so that a word split in the wrong place gives other ids."""
    generator = np.random.default_rng(0)
    mixed = ["".join(generator.choice([*PARTS, *SPACES], 12)) for _ in range(800)]
    fast = [frame for frame in frames() if not words._OTHER_CLASS.search(frame)]
    return train_tokenizer(TokenizerConfig(vocab_size=2000, min_frequency=1), [*mixed, *fast])


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(texts=st.lists(any_text | spaces_and_words, max_size=4))
def test_known_words_give_the_ids_that_the_library_gives(dense: Tokenizer, texts: list[str]) -> None:
    encoder = dense._encoder
    assert [ids.tolist() for ids in encoder.encode_batch(texts)] == encoder._encode_by_library(texts)


def test_every_character_of_the_fast_path_is_in_the_class_that_the_library_has_it_in(dense: Tokenizer) -> None:
    fast = [frame for frame in frames() if not words._OTHER_CLASS.search(frame)]
    assert len(fast) > 400
    encoder = dense._encoder
    assert [ids.tolist() for ids in encoder.encode_batch(fast)] == encoder._encode_by_library(fast)


def test_known_words_give_the_ids_that_the_library_gives_on_real_text(shared_data: Path) -> None:
    gpt2 = train_tokenizer(TokenizerConfig(pretrained=str(shared_data / "tokenizers" / "gpt2-tokenizer.json")), [])
    text = "".join(islice(read_lines(shared_data / "wikitext-2" / "wiki.test.raw.zst"), 600))
    assert len(text) > 100_000
    assert gpt2.encode(text).tolist() == gpt2._encoder._encode_by_library([text])[0]


def test_the_table_of_known_words_stays_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(words, "_MOST_WORDS", 10)
    encoder = byte_bpe()._encoder
    for text in TEXTS:
        assert encoder.encode_batch([text])[0].tolist() == encoder._encode_by_library([text])[0]
    assert len(encoder._words._words) < 200


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=any_text)
def test_byte_fallback_vocabularies_count_bytes_too(tokenizers: dict[str, Tokenizer], text: str) -> None:
    # U+2581 is what such vocabularies write for a space; in a foreign tokenizer it cannot be told apart.
    text = text.replace("▁", "")
    tokenizer = tokenizers["byte_fallback"]
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.token_bytes[ids].sum() == len(text.encode())


@pytest.mark.parametrize("kind", ["byte_bpe", "sentencepiece"])
def test_the_vocabulary_is_reached_exactly(tokenizers: dict[str, Tokenizer], kind: str) -> None:
    tokenizer = tokenizers[kind]
    assert tokenizer.vocab_size == {"byte_bpe": 300, "sentencepiece": 420}[kind]
    assert {tokenizer.special.boundary, tokenizer.special.pad} == {tokenizer.vocab_size - 2, tokenizer.vocab_size - 1}
    assert len(tokenizer.token_bytes) == tokenizer.vocab_size
    assert tokenizer.name == f"{kind}-{tokenizer.vocab_size}-{tokenizer.fingerprint[:8]}"


@pytest.mark.parametrize("kind", ["byte_bpe", "sentencepiece"])
def test_a_vocabulary_that_the_text_does_not_support_is_refused_with_the_size_that_it_does(kind: str) -> None:
    with pytest.raises(UserError, match="supports only") as refused:
        train_tokenizer(TokenizerConfig.parse({"kind": kind, "vocab_size": 30_000}, "tokenizer"), TEXTS)
    supported = int(refused.value.allowed.split()[2])
    tokenizer = train_tokenizer(TokenizerConfig.parse({"kind": kind, "vocab_size": supported}, "tokenizer"), TEXTS)
    assert tokenizer.vocab_size == supported


@pytest.mark.parametrize("kind", ["byte_bpe", "sentencepiece"])
def test_a_vocabulary_too_small_for_bytes_or_characters_is_refused(kind: str) -> None:
    with pytest.raises(UserError, match="at least"):
        train_tokenizer(TokenizerConfig.parse({"kind": kind, "vocab_size": 100}, "tokenizer"), TEXTS)


@pytest.mark.parametrize("make", [byte_bpe, sentencepiece])
def test_the_same_texts_give_the_same_tokenizer(make, tmp_path: Path) -> None:
    first, second = make(), make()
    assert first.fingerprint == second.fingerprint
    first.save(tmp_path / "a")
    second.save(tmp_path / "b")
    assert [p.read_bytes() for p in sorted((tmp_path / "a").iterdir())] == [
        p.read_bytes() for p in sorted((tmp_path / "b").iterdir())
    ]


def test_save_and_load_keep_everything(tokenizers: dict[str, Tokenizer], tmp_path: Path) -> None:
    for name, tokenizer in tokenizers.items():
        tokenizer.save(tmp_path / name)
        loaded = Tokenizer.load(tmp_path / name)
        assert (loaded.name, loaded.fingerprint, loaded.special) == (
            tokenizer.name,
            tokenizer.fingerprint,
            tokenizer.special,
        )
        assert (loaded.token_bytes == tokenizer.token_bytes).all()
        assert (loaded.encode(TEXTS[3]) == tokenizer.encode(TEXTS[3])).all()
        assert loaded.provenance == tokenizer.provenance


def test_an_altered_tokenizer_file_is_refused_by_name(tmp_path: Path) -> None:
    byte_bpe().save(tmp_path)
    path = tmp_path / "tokenizer.json"
    path.write_bytes(path.read_bytes().replace(b'"use_regex":true', b'"use_regex":false'))
    with pytest.raises(DataError, match=r"tokenizer\.json was altered"):
        Tokenizer.load(tmp_path)
    path.write_bytes(b"{")
    with pytest.raises(DataError, match=r"tokenizer\.json is not a readable"):
        Tokenizer.load(tmp_path)
    path.unlink()
    with pytest.raises(DataError, match=r"tokenizer\.json is missing"):
        Tokenizer.load(tmp_path)
    with pytest.raises(DataError, match="holds no tokenizer"):
        Tokenizer.load(tmp_path / "nowhere")


def test_a_batch_equals_its_texts_one_by_one(tokenizers: dict[str, Tokenizer]) -> None:
    for tokenizer in tokenizers.values():
        batch = tokenizer.encode_batch([*TEXTS[:5], "", "x"])
        assert [ids.tolist() for ids in batch] == [tokenizer.encode(text).tolist() for text in [*TEXTS[:5], "", "x"]]


def test_special_ids_decode_to_nothing_and_foreign_ids_are_refused(tokenizers: dict[str, Tokenizer]) -> None:
    for tokenizer in tokenizers.values():
        ids = tokenizer.encode("the end")
        around = [tokenizer.special.boundary, *ids, tokenizer.special.pad]
        assert tokenizer.decode(around) == "the end"
        with pytest.raises(UserError, match="token id"):
            tokenizer.decode([tokenizer.vocab_size])


def test_a_lone_surrogate_is_refused() -> None:
    with pytest.raises(DataError, match="surrogate"):
        byte_bpe().encode("a\ud800b")


def test_gpt2_keeps_its_ids_and_text_never_becomes_its_special_token(shared_data: Path) -> None:
    path = shared_data / "tokenizers" / "gpt2-tokenizer.json"
    appended = train_tokenizer(TokenizerConfig(pretrained=str(path)), [])
    assert appended.encode("Hello world").tolist() == [15496, 995]
    assert (appended.special.boundary, appended.special.pad, appended.vocab_size) == (50257, 50258, 50259)
    existing = train_tokenizer(TokenizerConfig(pretrained=str(path), boundary="<|endoftext|>", pad="<|endoftext|>"), [])
    assert (existing.special.boundary, existing.special.pad, existing.vocab_size) == (50256, 50256, 50257)
    text = "a<|endoftext|>b 🙂\n"
    for tokenizer in (appended, existing):
        ids = tokenizer.encode(text)
        assert 50256 not in ids
        assert tokenizer.decode(ids) == text
        assert tokenizer.token_bytes[ids].sum() == len(text.encode())
    with pytest.raises(UserError, match="no special token '<eos>'") as refused:
        train_tokenizer(TokenizerConfig(pretrained=str(path), boundary="<eos>"), [])
    assert "<|endoftext|>" in refused.value.allowed


def test_prefix_space_is_kept_only_where_asked(tmp_path: Path) -> None:
    path = str(llama_like(tmp_path))
    kept = train_tokenizer(TokenizerConfig(pretrained=path, prefix_space=True), [])
    dropped = train_tokenizer(TokenizerConfig(pretrained=str(tmp_path)), [])
    assert kept.encode("the").size == 1  # "▁the"
    assert dropped.encode("the the").size == 3  # "t", "he", "▁the"
    assert kept.decode(kept.encode("the the")) == "the the"
    assert kept.fingerprint != dropped.fingerprint


def test_a_tokenizer_that_loses_text_is_refused(tmp_path: Path) -> None:
    from tokenizers import Tokenizer as RustTokenizer
    from tokenizers import decoders, models, normalizers, pre_tokenizers

    word_level = RustTokenizer(models.WordLevel({"[UNK]": 0, "a": 1}, unk_token="[UNK]"))
    word_level.pre_tokenizer = pre_tokenizers.Whitespace()
    word_level.save(str(tmp_path / "words.json"))
    lower = RustTokenizer.from_str(byte_bpe()._encoder.content.decode())
    lower.normalizer = normalizers.Lowercase()
    lower.decoder = decoders.ByteLevel()
    lower.save(str(tmp_path / "lower.json"))
    for name in ("words.json", "lower.json"):
        with pytest.raises(UserError, match="does not give every text back"):
            train_tokenizer(TokenizerConfig(pretrained=str(tmp_path / name)), [])


def test_a_pretrained_tokenizer_that_is_not_there_says_where_it_looked(tmp_path: Path) -> None:
    for name in (str(tmp_path / "gone.json"), str(tmp_path)):
        with pytest.raises(UserError, match=r"does not exist|holds no"):
            train_tokenizer(TokenizerConfig(pretrained=name), [])
    (tmp_path / "text.json").write_text("no json")
    with pytest.raises(DataError, match=r"text\.json is not readable JSON"):
        train_tokenizer(TokenizerConfig(pretrained=str(tmp_path / "text.json")), [])


def test_settings_that_the_kind_cannot_honour_are_refused() -> None:
    for data in (
        {"pretrained": "x/y", "vocab_size": 1000},
        {"kind": "byte_bpe", "boundary": "<s>"},
        {"kind": "sentencepiece", "min_frequency": 3},
        {"kind": "pretrained"},
    ):
        with pytest.raises(UserError):
            TokenizerConfig.parse(data, "tokenizer")
    assert TokenizerConfig.parse({"pretrained": "x/y"}, "tokenizer").kind == "pretrained"


def test_sentencepiece_without_its_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    with pytest.raises(MissingExtra, match=r"longspan\[sentencepiece\]"):
        train_tokenizer(TokenizerConfig(kind="sentencepiece", vocab_size=420), TEXTS)
