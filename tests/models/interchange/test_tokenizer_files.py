"""`AutoTokenizer` gives the same ids for the written files, special ones too; read back they are the tokenizer."""

from __future__ import annotations

import json

import numpy as np
import pytest
from tokenizers import Tokenizer as RustTokenizer

from longspan.corpus.sources import SyntheticSource
from longspan.corpus.tokenizer import Tokenizer, TokenizerConfig, train_tokenizer
from longspan.foundation.errors import DataError, UserError
from longspan.models.interchange import read_tokenizer, write_folder
from longspan.models.interchange.tokenizer_files import write_tokenizer

from .conftest import CASES, build, case

HARD = ["", " ", "  two\t\n\nlines ", "ünï 四五 🙂 ⁄", "<|endoftext|> and <|pad|>", "don't 1234 x=y;", "\x00\x1c\x85 "]


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    source = SyntheticSource(num_documents=30, min_words=60, max_words=120)
    return [document.text for document in source.documents(tmp_path_factory.mktemp("unused"))]


@pytest.fixture(scope="module", params=["byte_bpe", "sentencepiece"])
def tokenizer(request, texts):
    if request.param == "sentencepiece":
        pytest.importorskip("sentencepiece")
    return train_tokenizer(TokenizerConfig(kind=request.param, vocab_size=500), texts)


@pytest.mark.parametrize("markers", [True, False])
@pytest.mark.parametrize("name", ["AA", "MAM", "MM bare", "mm", "MAMA bare"])
def test_auto_tokenizer_gives_the_same_ids_whatever_the_architecture(name, markers, tokenizer, texts, tmp_path):
    transformers = pytest.importorskip("transformers")
    model = build(name.split()[0], tokenizer.vocab_size, **CASES[name][1])
    write_folder(model, tmp_path, context=64, tokenizer=tokenizer, markers=markers)
    other = transformers.AutoTokenizer.from_pretrained(tmp_path)
    prefix = [tokenizer.special.boundary] if markers else []
    samples = HARD + texts
    assert [*other(samples)["input_ids"]] == [[*prefix, *tokenizer.encode(text).tolist()] for text in samples]
    assert (other.bos_token_id, other.eos_token_id) == (tokenizer.special.boundary, tokenizer.special.boundary)
    assert other.pad_token_id == tokenizer.special.pad
    assert len(other) == tokenizer.vocab_size
    assert other.model_max_length == 64
    for text in texts[:3]:
        assert other.decode(other(text)["input_ids"], skip_special_tokens=True) == text
    padded = other(["a", "a b c d"], padding=True)
    assert padded["input_ids"][0][0] == tokenizer.special.pad
    assert padded["attention_mask"][0][0] == 0
    assert "token_type_ids" not in padded


@pytest.mark.parametrize("markers", [True, False])
def test_reading_gives_the_tokenizer_back(markers, tokenizer, texts, tmp_path):
    notes = write_tokenizer(tokenizer, tmp_path, markers=markers, context=64)
    assert ("U+2581" in " ".join(notes)) == tokenizer.name.startswith("sentencepiece")
    back, begins = read_tokenizer(tmp_path)
    assert begins == markers
    assert back.special == tokenizer.special
    assert back.vocab_size == tokenizer.vocab_size
    np.testing.assert_array_equal(back.token_bytes, tokenizer.token_bytes)
    for text in HARD + texts:
        assert back.encode(text).tolist() == tokenizer.encode(text).tolist()
        assert back.decode(back.encode(text)) == text


def pretrained(tmp_path, texts, tokens=("<s>", "</s>")):
    """A tokenizer.json with special tokens of its own, as published ones have."""
    folder = tmp_path / "published"
    folder.mkdir()
    tokenizer = train_tokenizer(TokenizerConfig(vocab_size=400), texts)
    rust = RustTokenizer.from_str(json.dumps(tokenizer.tokenizer_json()))
    rust.add_special_tokens(list(tokens))
    rust.save(str(folder / "tokenizer.json"))
    return folder


def test_an_adopted_tokenizer_keeps_its_special_tokens(tmp_path, texts):
    folder = pretrained(tmp_path, texts, tokens=("<s>", "<|pad|>"))
    adopted = train_tokenizer(TokenizerConfig(pretrained=str(folder), boundary="<s>"), [])
    write_tokenizer(adopted, tmp_path, markers=True, context=64)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    # The pad token has an id of its own beyond the vocabulary, and the name that it would get is taken.
    assert (config["bos_token"], config["eos_token"], config["pad_token"]) == ("<s>", "<s>", "<|pad_|>")
    back, begins = read_tokenizer(tmp_path)
    assert begins
    assert back.special == adopted.special
    assert back.encode("<s>a").tolist() == adopted.encode("<s>a").tolist() != [adopted.special.boundary]


def test_published_settings_are_understood(tmp_path, texts):
    folder = pretrained(tmp_path, texts)
    ids = {
        token["content"]: token["id"] for token in json.loads((folder / "tokenizer.json").read_text())["added_tokens"]
    }

    def read(**settings: object) -> tuple[Tokenizer, bool]:
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
        return read_tokenizer(folder)

    tokenizer, begins = read(bos_token={"content": "<s>", "special": True}, eos_token="</s>", add_bos_token=True)
    assert (tokenizer.special.boundary, tokenizer.special.pad, begins) == (ids["<s>"], ids["<s>"], True)
    tokenizer, begins = read(eos_token="</s>", pad_token="<s>")
    assert (tokenizer.special.boundary, tokenizer.special.pad, begins) == (ids["</s>"], ids["<s>"], False)
    (folder / "special_tokens_map.json").write_text(json.dumps({"bos_token": "<s>"}))
    assert read()[0].special.boundary == ids["<s>"]
    with pytest.raises(UserError, match="no special token '<x>'"):
        read(bos_token="<x>")


def test_a_folder_without_a_tokenizer_says_so(tmp_path):
    with pytest.raises(UserError, match=r"holds no tokenizer\.json"):
        read_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(DataError, match=r"tokenizer_config\.json is not readable"):
        read_tokenizer(tmp_path)


def test_other_ids_are_noticed(tmp_path, texts, monkeypatch):
    tokenizer = train_tokenizer(TokenizerConfig(vocab_size=300), texts)
    description = tokenizer.tokenizer_json()
    description["model"]["merges"] = description["model"]["merges"][::-1]
    monkeypatch.setattr(tokenizer, "tokenizer_json", lambda: description)
    with pytest.raises(UserError, match="encodes"):
        write_tokenizer(tokenizer, tmp_path, markers=True, context=64)


def test_a_model_with_too_few_rows_is_refused(tokenizer, tmp_path):
    with pytest.raises(UserError, match=f"101 rows for the tokenizer {tokenizer.name}"):
        write_folder(case("AA"), tmp_path / "out", context=64, tokenizer=tokenizer)
