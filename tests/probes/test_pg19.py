"""PG-19: every token once whatever the window, words as published, positions paired, and each protocol by its name."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from longspan.foundation.errors import DataError, UserError
from longspan.probes.base import Probe, ProbeData, make_probe

Ask = Callable[..., list[Any]]
BOOKS = [
    {"short_book_title": "Long", "publication_date": 1890, "url": "u/1", "text": "The house asks the people. " * 40},
    {
        "short_book_title": "Short",
        "publication_date": 1900,
        "url": "u/2",
        "text": "The senate answers,\n and thanks. " * 10,
    },
    {"short_book_title": "Middle", "publication_date": 1910, "url": "u/3", "text": "The union thanks the house. " * 20},
]


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pg19") / "test.jsonl"
    path.write_text("".join(json.dumps(book) + "\n" for book in BOOKS), encoding="utf-8")
    return path


@pytest.fixture
def probe(file: Path) -> Callable[..., Probe]:
    return lambda **settings: make_probe("pg19", {"data": str(file), **settings})


def by(summary: Any, metric: str, x: float | None = None) -> float:
    return next(m.value for m in summary.measurements if m.metric == metric and m.x == x)


@pytest.mark.parametrize(("window", "stride"), [(16, None), (16, 1), (33, 7), (4096, 256)])
def test_every_token_but_the_first_is_scored_once(
    window: int, stride: int | None, probe: Callable[..., Probe], data: ProbeData, fake: Callable[..., Any], ask: Ask
) -> None:
    asked = probe(windows=[window], stride=stride)
    engine = fake(lambda tokens: 1.0 + tokens % 7)
    for record, book in zip(ask(asked, engine, data), BOOKS, strict=True):
        tokens = engine.tokenizer.encode(str(book["text"]))
        assert record.answer["tokens"] == len(tokens) - 1
        assert record.answer["nll"] == pytest.approx(float((1.0 + tokens[1:] % 7).sum()))
        assert record.answer["bytes"] == len(str(book["text"]).encode()) - engine.tokenizer.token_bytes[tokens[0]]
    assert max(engine.asked) <= window + 1


def test_numbers_are_those_of_their_definitions(
    probe: Callable[..., Probe], data: ProbeData, fake: Callable[..., Any], ask: Ask, read: Callable[..., Any]
) -> None:
    asked = probe(windows=[64])
    records = ask(asked, fake(), data)
    _, summary = read(asked, records)
    nll = sum(record.answer["nll"] for record in records)
    words = sum(len(str(book["text"]).split()) for book in BOOKS)
    assert by(summary, "word_perplexity", 64.0) == pytest.approx(math.exp(nll / words))
    assert by(summary, "bits_per_byte", 64.0) == pytest.approx(
        nll / math.log(2) / sum(record.answer["bytes"] for record in records)
    )
    assert by(summary, "perplexity", 64.0) == pytest.approx(data.tokenizer.vocab_size)


def test_words_are_the_published_number_where_all_books_are_there(
    probe: Callable[..., Probe], data: ProbeData, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="'official' with 3 books"):
        probe(words="official").items(data)
    path = tmp_path / "all.jsonl"
    path.write_text("".join(json.dumps({"text": f"word {n} " * (n + 1)}) + "\n" for n in range(100)))
    items = make_probe("pg19", {"data": str(path), "words": "official"}).items(data)
    assert sum(item.details["words"] for item in items) == pytest.approx(6_966_499)


def test_positions_hold_the_same_books_in_every_bin_and_add_up(
    probe: Callable[..., Probe], data: ProbeData, fake: Callable[..., Any], ask: Ask, read: Callable[..., Any]
) -> None:
    asked = probe(windows=[64, 256], last=32)
    engine = fake(lambda tokens: 1.0 + tokens % 7)
    records = ask(asked, engine, data)
    observations, _ = read(asked, records)
    of = [seen for seen in observations if seen.metric == "bits_by_position"]
    bins = {seen.x for seen in of}
    filled = {
        record.answer["book"] for record in records if record.answer["mode"] == 256 and "positions" in record.answer
    }
    assert len(bins) == 8
    assert all({seen.item for seen in of if seen.x == x} == filled for x in bins)
    for record in records:
        if record.answer["mode"] == 256 and "positions" in record.answer:
            tokens = engine.tokenizer.encode(next(str(b["text"]) for b in BOOKS if b["url"] == record.answer["book"]))
            expected = float((1.0 + tokens[1:256] % 7).sum())
            assert sum(row[2] for row in record.answer["positions"]) == pytest.approx(expected)
            assert record.answer["end"]["nll"] == pytest.approx(float((1.0 + tokens[224:256] % 7).sum()))


def test_streaming_is_one_pass_over_the_whole_book(
    probe: Callable[..., Probe], data: ProbeData, subject: Callable[..., Any], ask: Ask, read: Callable[..., Any]
) -> None:
    asked = probe(windows=[32], streaming=True, max_books=1, max_tokens=96)
    engine = subject("M")
    records = ask(asked, engine, data)
    tokens = engine.tokenizer.encode(str(BOOKS[0]["text"]))[:96]
    (whole,) = engine.nll([np.concatenate([engine.document_prefix, tokens])])
    streamed = next(record for record in records if record.answer["mode"] == "streaming")
    assert streamed.answer["nll"] == pytest.approx(float(whole[1:].sum()), rel=1e-5)
    windowed = next(record for record in records if record.answer["mode"] == 32)
    # An untrained subject makes little of its context, but something.
    assert abs(windowed.answer["nll"] - streamed.answer["nll"]) > 1e-6
    _, summary = read(asked, records)
    assert by(summary, "streaming_bits_per_byte") > 0


def test_a_window_that_a_subject_cannot_take_is_left_out(
    probe: Callable[..., Probe], data: ProbeData, fake: Callable[..., Any], ask: Ask, read: Callable[..., Any]
) -> None:
    asked = probe(windows=[64, 200], streaming=True)
    records = ask(asked, fake(limit=100), data)
    left = [record.item for record in records if "not_evaluable" in record.answer]
    assert "u/1@200" in left
    assert "u/1@streaming" in left
    assert "u/1@64" not in left
    # The short book fits both windows.
    kept = {(seen.item, seen.x) for seen in read(asked, records)[0] if seen.metric == "bits_per_byte"}
    assert ("u/1", 200.0) not in kept
    assert {item for item, x in kept if x == 64.0} == {"u/1", "u/2", "u/3"}


def test_bad_settings_and_books_are_told(tmp_path: Path, data: ProbeData) -> None:
    with pytest.raises(UserError, match="stride 64"):
        make_probe("pg19", {"windows": [64], "stride": 64})
    path = tmp_path / "books.jsonl"
    path.write_text(json.dumps({"text": " "}) + "\n")
    with pytest.raises(DataError, match="book 1 has no text"):
        make_probe("pg19", {"data": str(path)}).items(data)


def test_real_books_are_read(shared_data: Path, data: ProbeData) -> None:
    items = make_probe("pg19", {"data": str(shared_data / "books" / "pg19-like-books.jsonl.zst")}).items(data)
    assert len(items) == 36
    assert min(item.details["words"] for item in items) > 60_000
