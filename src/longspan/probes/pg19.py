"""PG-19: whole books, in bits per byte and in the published word-level perplexity, each protocol by its name."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import numpy as np
from pydantic import Field, model_validator

from longspan.engines.base import Engine, Tokens, require_finite
from longspan.foundation.errors import DataError, UserError, first_line
from longspan.foundation.extras import require
from longspan.probes.base import Asked, Item, Probe, ProbeData, register
from longspan.probes.benchmark_files import Rows, file_digest, read_rows
from longspan.probes.perplexity import windows
from longspan.records.observation import Metric, Observation
from longspan.records.store import Record

HUB = "emozilla/pg19-test"
OFFICIAL_BOOKS, OFFICIAL_WORDS = 100, 6_966_499
"""Of the test split; the published perplexity divides by this number whatever the tokenizer (Rae et al. 2020)."""
STREAMING = "streaming"


@register("pg19")
class PG19(Probe):
    """Every token of a book but the first is predicted once, with at most a window of tokens before it.

    Sliding: windows of `windows` tokens move by `stride`; the first scores all its tokens, each later one the last
    `stride`. Streaming: one pass over the whole book, for subjects that carry a state of fixed size. Sums are divided
    by the bytes of the scored text (comparable between tokenizers) and by the book's words, as published.

    No window goes on from the state of the one before it: that state has seen tokens that the next window leaves out,
    and a subject with it would see more than the window says. Only the first windows of one book begin alike, and of
    three windows of 8k, 32k and 131k over 262,144 tokens they are 3 % of the work.

    Attributes:
        data: JSON lines or a JSON list with a `text` each; None takes the test split from the hub (extra `hub`).
        revision: branch, tag or commit on the hub; a study stays at the commit of its first use.
        windows: tokens a subject sees at once; None: the context of the study.
        stride: by how many tokens windows move; None: half a window. Much of the literature takes 256.
        streaming: add one pass over each whole book.
        last: the tokens at the end of the first window that are scored apart (the first L tokens, last `last`), where
            the window is longer.
        max_books: the first so many; None: all.
        max_tokens: the first so many of each book; None: all.
        words: `counted` divides by the words between white space; `official` scales these so that the 100 books of
            the test split hold the 6,966,499 words that are published.
    """

    title: ClassVar[str] = "PG-19"
    explanation: ClassVar[str] = (
        "Books published before 1919. Bits per byte and word-level perplexity with a sliding window; loss by position "
        "in the first window, on the books that fill it; the end of the first window apart. Perplexity per word "
        "divides by words, not tokens, so that subjects with other tokenizers compare."
    )
    requires: ClassVar[frozenset[str]] = frozenset({"nll"})

    data: str | None = None
    revision: str | None = None
    windows: tuple[int, ...] | None = Field(None, min_length=1)
    stride: int | None = Field(None, ge=1)
    streaming: bool = False
    last: int = Field(256, ge=1)
    max_books: int | None = Field(None, ge=1)
    max_tokens: int | None = Field(None, ge=2)
    words: Literal["counted", "official"] = "counted"

    @model_validator(mode="after")
    def _windows_move(self) -> Self:
        self._check_windows(self.windows or ())
        return self

    def _check_windows(self, windows: Sequence[int]) -> None:
        for window in windows:
            if window < 2 or (self.stride is not None and self.stride >= window):
                raise UserError(
                    f"windows = [{window}] with stride {self.stride}",
                    "windows of at least 2 tokens that move by less than their length",
                    "lower the stride or raise the window",
                )

    @property
    def metrics(self) -> tuple[Metric, ...]:
        """In order of importance; the streaming pass has no window, so it stands apart."""
        at = "window"
        return (
            Metric("bits_per_byte", "Bits per byte", "bits/byte", "ratio", "lower", x_name=at),
            Metric(
                "word_perplexity",
                "Perplexity per word",
                "",
                "ratio",
                "lower",
                x_name=at,
                transform="exp",
                compare=False,
            ),
            Metric(
                "end_bits_per_byte", f"Bits per byte, last {self.last} tokens", "bits/byte", "ratio", "lower", x_name=at
            ),
            Metric(
                "bits_by_position",
                "Bits per byte by position",
                "bits/byte",
                "ratio",
                "lower",
                x_name="position",
                compare=False,
            ),
            Metric("streaming_bits_per_byte", "Bits per byte, streaming", "bits/byte", "ratio", "lower"),
            Metric(
                "streaming_word_perplexity",
                "Perplexity per word, streaming",
                "",
                "ratio",
                "lower",
                transform="exp",
                compare=False,
            ),
            Metric(
                "perplexity",
                "Perplexity per token (own tokenizer)",
                "",
                "ratio",
                "lower",
                x_name=at,
                transform="exp",
                compare=False,
                detail=True,
            ),
        )

    def hub_dataset(self) -> str | None:
        """See `Probe.hub_dataset`."""
        return None if self.data else HUB

    def protocol(self) -> dict[str, Any]:
        """The settings, with the books' content in place of where they lie."""
        content = file_digest(Path(self.data)) if self.data else f"{HUB}@{self.revision or 'main'}"
        return {**super().protocol(), "data": content}

    def check_before(self, context: int) -> None:
        """Refuse a file that holds other things, and windows that do not move."""
        if self.data:
            self._books()
        self._check_windows(self.windows or (context,))

    def items(self, data: ProbeData) -> list[Item]:
        """Each book with each window, then streaming."""
        modes: list[int | str] = [*self._windows(data), *([STREAMING] if self.streaming else [])]
        scale = self._scale()
        items = []
        for number, book in enumerate(self._books()):
            words = len(book["text"].split()) * scale
            for mode in modes:
                details = {"book": number, "mode": mode, "words": words}
                # About four bytes a token; what the windows overlap is on top.
                items.append(Item(f"{_name(book, number)}@{mode}", number, len(book["text"]) // 4, details))
        return items

    def answer(self, engine: Engine, items: Sequence[Item], data: ProbeData) -> list[dict[str, Any]]:
        """Sums of NLL (nats), scored tokens, their bytes and words; by position and at the end of the first window."""
        return [self._ask(engine, item, data) for item in items]

    def observe(self, record: Record) -> Iterable[Observation]:
        """Per book."""
        answer = record.answer
        if "nll" not in answer:
            return
        bits, book = answer["nll"] / math.log(2), str(answer["book"])

        def seen(metric: str, numerator: float, denominator: float, x: float | None) -> Observation:
            return Observation(record.subject, record.seed, book, book, metric, x, numerator, float(denominator))

        if answer["mode"] == STREAMING:
            yield seen("streaming_bits_per_byte", bits, answer["bytes"], None)
            yield seen("streaming_word_perplexity", answer["nll"], answer["words"], None)
            return
        x = float(answer["mode"])
        yield seen("bits_per_byte", bits, answer["bytes"], x)
        yield seen("word_perplexity", answer["nll"], answer["words"], x)
        yield seen("perplexity", answer["nll"], answer["tokens"], x)
        if "end" in answer:
            yield seen("end_bits_per_byte", answer["end"]["nll"] / math.log(2), answer["end"]["bytes"], x)
        for low, high, nll, size in answer.get("positions", ()):
            middle = round(math.sqrt(low * (high - 1)), 1)
            yield seen("bits_by_position", nll / math.log(2), size, middle)

    def describe(self, item: Item, data: ProbeData) -> Asked:
        """The beginning of the book."""
        return Asked(" ".join(self._books()[item.details["book"]]["text"][:400].split()))

    def _ask(self, engine: Engine, item: Item, data: ProbeData) -> dict[str, Any]:
        book = self._books()[item.details["book"]]
        mode = item.details["mode"]
        tokens = engine.tokenizer.encode(book["text"]).astype(np.int64)
        whole = len(tokens)
        tokens = tokens[: self.max_tokens]
        sizes = engine.tokenizer.token_bytes[tokens].astype(np.int64)
        content: dict[str, Any] = {"book": _name(book, item.details["book"]), "mode": mode}
        window = len(tokens) if mode == STREAMING else int(mode)
        limit = engine.context_limit
        if len(tokens) < 2:
            return {**content, "not_evaluable": "fewer than two tokens"}
        if limit is not None and min(window, len(tokens)) + len(engine.document_prefix) - 1 > limit:
            return {**content, "not_evaluable": f"the subject takes {limit} tokens"}
        stride = window - 1 if mode == STREAMING else self.stride or max(1, window // 2)
        spans = [(0, 1, len(tokens))] if mode == STREAMING else list(windows(len(tokens), window, stride))
        sequences: list[Tokens] = [
            # A marker says that a document begins; inside one it would be a lie.
            tokens[start:end] if start else np.concatenate([engine.document_prefix, tokens[:end]])
            for start, _, end in spans
        ]
        nll_T = np.zeros(len(tokens))
        for nll, (_, first, end) in zip(engine.nll(sequences), spans, strict=True):
            nll_T[first:end] = nll[len(nll) - (end - first) :]
        require_finite(nll_T, engine.name, content["book"])
        content |= {
            "nll": float(nll_T.sum()),
            "tokens": len(tokens) - 1,
            "bytes": int(sizes[1:].sum()),
            # A book that was cut counts as many of its words as of its tokens.
            "words": item.details["words"] * len(tokens) / whole,
            "stride": stride,
        }
        if mode != STREAMING and len(tokens) >= window:
            if window > self.last:
                content["end"] = self._end(nll_T, sizes, window)
            content["positions"] = _positions(nll_T, sizes, window, largest=window == max(self._windows(data)))
        return content

    def _end(self, nll_T: np.ndarray, sizes: np.ndarray, window: int) -> dict[str, Any]:
        first = window - self.last
        return {"nll": float(nll_T[first:window].sum()), "bytes": int(sizes[first:window].sum())}

    def _windows(self, data: ProbeData) -> tuple[int, ...]:
        return self.windows or (data.context,)

    def _scale(self) -> float:
        if self.words == "counted":
            return 1.0
        books = self._books()
        if len(books) != OFFICIAL_BOOKS:
            raise UserError(
                f"words = 'official' with {len(books)} books",
                f"the {OFFICIAL_BOOKS} books of the test split",
                "give all of them, or take `words: counted`",
            )
        return OFFICIAL_WORDS / sum(len(book["text"].split()) for book in books)

    def _books(self) -> Rows:
        rows = read_rows(Path(self.data), ("text",), "books") if self.data else self._from_hub()
        for number, row in enumerate(rows[: self.max_books], start=1):
            if not isinstance(row["text"], str) or not row["text"].strip():
                raise DataError(f"{self.data}: book {number} has no text", "a text for each book", "remove the row")
        return rows[: self.max_books]

    def _from_hub(self) -> Rows:
        datasets = require("hub")
        try:
            return list(datasets.load_dataset(HUB, split="test", revision=self.revision))
        except Exception as error:  # the library raises many kinds: offline, not found, refused
            raise DataError(
                f"{HUB} cannot be loaded ({first_line(error)})",
                "a reachable hub, or a file of books",
                "check the network, or name a file with `data: PATH`",
            ) from error


def _positions(nll_T: np.ndarray, sizes: np.ndarray, window: int, *, largest: bool) -> list[list[float]]:
    """[low, high, nats, bytes] of positions in the first window, in doublings; only at the largest window."""
    if not largest:
        return []
    edges = sorted({min(window, 2**power) for power in range(int(math.log2(window)) + 2)})
    return [
        [low, high, float(nll_T[low:high].sum()), int(sizes[low:high].sum())]
        for low, high in pairwise(edges)
        if sizes[low:high].sum() > 0
    ]


def _name(book: dict[str, Any], number: int) -> str:
    """What records call a book."""
    for field in ("id", "url", "short_book_title", "title"):
        if book.get(field):
            return str(book[field])
    return f"book-{number}"
