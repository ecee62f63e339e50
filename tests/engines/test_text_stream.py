"""Claims about text that grows: no half characters, no stop strings, and in the end exactly the decoded ids."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from longspan.corpus.tokenizer import Tokenizer, TokenizerConfig, train_tokenizer
from longspan.engines.text_stream import TextStream

CUT = "\N{REPLACEMENT CHARACTER}"
TEXT = "Grüße, 世界! 🙂👩‍🚀 naïve\n\n  end"


@pytest.fixture(scope="module")
def byte_level() -> Tokenizer:
    return train_tokenizer(TokenizerConfig(vocab_size=274, min_frequency=1), ["the senate and the house " * 9])


def test_only_whole_characters_are_handed_out(byte_level: Tokenizer) -> None:
    stream = TextStream(byte_level)
    pieces = [stream.push(int(token)) for token in byte_level.encode(TEXT)]
    assert "".join(pieces) == TEXT
    assert not any(CUT in piece for piece in pieces)
    assert "🙂" in pieces
    assert stream.flush() == ""


@given(st.lists(st.integers(0, 273), max_size=60))
def test_the_pieces_of_any_ids_join_to_the_decoded_ids(byte_level: Tokenizer, tokens: list[int]) -> None:
    stream = TextStream(byte_level)
    pieces = [stream.push(token) for token in tokens]
    assert "".join([*pieces, stream.flush()]) == byte_level.decode(tokens) == stream.text


@given(st.text(max_size=30))
def test_sentencepiece_text_streams_whole(text: str) -> None:
    tokenizer = sentencepiece()
    stream = TextStream(tokenizer)
    pieces = [stream.push(int(token)) for token in tokenizer.encode(text)]
    assert "".join([*pieces, stream.flush()]) == text


_SENTENCEPIECE: list[Tokenizer] = []


def sentencepiece() -> Tokenizer:
    pytest.importorskip("sentencepiece")
    if not _SENTENCEPIECE:
        config = TokenizerConfig(kind="sentencepiece", vocab_size=280, character_coverage=1.0)
        _SENTENCEPIECE.append(train_tokenizer(config, ["the senate and the house " * 9]))
    return _SENTENCEPIECE[0]


def test_an_unfinished_character_at_the_end_is_shown_as_such(byte_level: Tokenizer) -> None:
    stream = TextStream(byte_level)
    half = byte_level.encode("a🙂")[:-1]
    assert "".join(stream.push(int(token)) for token in half) == "a"
    assert stream.flush() == CUT


@pytest.mark.parametrize("text", ["one two. three", "one t", "one two", "on two. two. x"])
def test_nothing_of_a_stop_string_is_handed_out(byte_level: Tokenizer, text: str) -> None:
    stream = TextStream(byte_level, [" two.", "", "zz"])
    for token in byte_level.encode(text):
        stream.push(int(token))
        assert text.split(" two.")[0].startswith(stream.text)
    stream.flush()
    assert stream.text == text.split(" two.")[0]
    assert stream.stopped == (" two." in text)
    assert bool(stream.push(65)) != stream.stopped


def test_the_first_of_several_stop_strings_counts(byte_level: Tokenizer) -> None:
    stream = TextStream(byte_level, ["three", "two"])
    for token in byte_level.encode("one two three"):
        stream.push(int(token))
    assert stream.text == "one "
