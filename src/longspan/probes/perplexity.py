"""Perplexity: how well a subject predicts unseen documents, in bits per byte first."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, ClassVar, Literal, Self

import numpy as np
from pydantic import Field, model_validator

from longspan.corpus.packing import IGNORE, evaluation_batches
from longspan.corpus.tasks import Task
from longspan.engines.base import Engine, Tokens
from longspan.foundation.errors import UserError
from longspan.probes.base import Item, Probe, ProbeData, register
from longspan.records.observation import Metric, Observation
from longspan.records.store import Record

ROWS = 16
"""Packed rows that go to the engine at a time."""


@register("perplexity")
class Perplexity(Probe):
    """Token-weighted over whole documents; the first token of a document is scored in `rolling` only.

    Attributes:
        mode: `per_document` shows windows of one document; `as_trained` shows rows packed as the subject was trained,
            its markers, neighbours and isolation included, so that what leaks across boundaries shows. `rolling`
            scores as lm-evaluation-harness does (`loglikelihood_rolling`): the boundary token stands before every
            document, whether the subject expects it or not, and all tokens of the document are scored.
        context: tokens of a window, the last one scored included; None: the training context. A subject that expects
            a marker sees it where the document begins, never inside it. In `rolling`, tokens that a window shows (the
            harness's `max_length`); only the last window overlaps, so that it shows as many as the others.
        stride: tokens that each window scores after the first has scored all of its own; None: context - 1, so that
            windows share one token and everything is scored once with as little context as can be.
            `per_document` only.
        max_documents: the first so many of the split; None: all.
        max_tokens: the first so many of each document; None: all. Many documents in part give narrower intervals
            than a few whole ones at the same cost. Not with `as_trained`.
    """

    title: ClassVar[str] = "Perplexity"
    explanation: ClassVar[str] = (
        "How many bits a subject needs per byte of unseen documents; lower is better. Perplexity holds for this "
        "tokenizer only. Intervals come from resampling documents."
    )
    requires: ClassVar[frozenset[str]] = frozenset({"nll"})

    mode: Literal["per_document", "as_trained", "rolling"] = "per_document"
    context: int | None = Field(None, ge=2)
    stride: int | None = Field(None, ge=1)
    max_documents: int | None = Field(None, ge=1)
    max_tokens: int | None = Field(None, ge=2)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.mode == "as_trained" and {self.context, self.stride, self.max_tokens} != {None}:
            raise UserError(
                "context, stride or max_tokens with mode as_trained",
                "rows as in training",
                "remove them, or choose mode: per_document",
            )
        if self.mode == "rolling" and self.stride is not None:
            raise UserError(
                f"stride {self.stride} with mode rolling",
                "windows that do not overlap",
                "remove it, or choose mode: per_document",
            )
        return self

    def check_task(self, task: Task | None) -> None:
        """Refuse the strings of a task: their tokens stand for no text, so there are no bytes to count."""
        if task is not None:
            raise UserError(
                "bits per byte of a task, whose strings are no text",
                "a corpus of documents",
                "ask the probe `task` how many strings are right instead",
            )

    def check_before(self, context: int) -> None:
        """Refuse windows that would leave tokens out."""
        self._window(context)

    @property
    def metrics(self) -> tuple[Metric, ...]:
        """In order of importance."""
        return (
            Metric("bits_per_byte", "Bits per byte", "bits/byte", "ratio", "lower"),
            Metric("perplexity", "Perplexity", "per token", "ratio", "lower", transform="exp", compare=False),
            Metric("nll_per_token", "NLL per token", "nats/token", "ratio", "lower", compare=False),
        )

    def items(self, data: ProbeData) -> list[Item]:
        """One item per document with a token to score."""
        self._window(data.context)
        lengths = data.shards.lengths[: self.max_documents]
        if self.max_tokens is not None:
            lengths = lengths.clip(max=self.max_tokens)
        least = 1 if self.mode == "rolling" else 2
        items = [Item(data.shards.ids[i], i, int(n)) for i, n in enumerate(lengths) if n >= least]
        if not items:
            raise UserError(
                f"the test split has {len(lengths)} documents and none of {least} tokens or more",
                f"at least one document of {least} tokens",
                "use more text, or give the test split a larger share",
            )
        return items

    def batches(self, items: Sequence[Item]) -> Iterator[list[Item]]:
        """Packed rows mix documents, so `as_trained` goes through as a whole."""
        return iter([list(items)]) if self.mode == "as_trained" else super().batches(items)

    def answer(self, engine: Engine, items: Sequence[Item], data: ProbeData) -> list[dict[str, Any]]:
        """Sums of NLL (nats), scored tokens and their UTF-8 bytes."""
        if self.mode == "as_trained":
            return self._as_trained(engine, items, data)
        sequences, spans, owners = [], [], []
        for owner, item in enumerate(items):
            document = data.shards.document(item.document)[: item.tokens]
            for sequence, first, end in self._windows(document, engine, data):
                sequences.append(sequence)
                spans.append((first, end))
                owners.append(owner)
        sums = [_Sums() for _ in items]
        for nll, (first, end), owner in zip(engine.nll(sequences), spans, owners, strict=True):
            tokens = data.shards.document(items[owner].document)[first:end]
            sums[owner].add(nll[-len(tokens) :], tokens, data)
        return [each.content() for each in sums]

    def observe(self, record: Record) -> Iterable[Observation]:
        """Per document: bits over bytes, nats over tokens."""
        nll, tokens, size = (record.answer[name] for name in ("nll", "tokens", "bytes"))
        for metric, numerator, denominator in (
            ("bits_per_byte", nll / math.log(2), size),
            ("perplexity", nll, tokens),
            ("nll_per_token", nll, tokens),
        ):
            # A document whose tokens stand for no text (only special ids) has no bits per byte.
            if denominator > 0:
                yield self.observation(record, metric, numerator, float(denominator), cluster=record.item)

    def _windows(self, document: Tokens, engine: Engine, data: ProbeData) -> Iterator[tuple[Tokens, int, int]]:
        """What is shown, and which tokens of the document are scored: those from `first` to `end`, its last ones."""
        context, stride = self._window(data.context)
        if self.mode == "rolling":
            # As the engine sees them: the windows run over the boundary token and the document.
            whole = np.concatenate([[engine.tokenizer.special.boundary], document])
            for start, first, end in rolling_windows(len(whole), context):
                yield whole[start:end], first - 1, end - 1
            return
        for start, first, end in windows(len(document), context, stride):
            part = document[start:end]
            yield part if start else np.concatenate([engine.document_prefix, part]), first, end

    def _window(self, context: int) -> tuple[int, int]:
        context = context if self.context is None else self.context
        stride = context - 1 if self.stride is None else self.stride
        if stride >= context:
            raise UserError(
                f"stride {stride} with windows of {context} tokens",
                f"1 to {context - 1}: each window needs a token to start from",
                "lower the stride or raise the context",
            )
        return context, stride

    def _as_trained(self, engine: Engine, items: Sequence[Item], data: ProbeData) -> list[dict[str, Any]]:
        sums = {item.document: _Sums() for item in items}
        # The first token is not scored for any subject, whatever its training loss held.
        packing = data.packing.model_copy(update={"loss_crosses_boundary": False})
        special = data.tokenizer.special
        context = data.trained_context or data.context
        for batch in evaluation_batches(data.shards, packing, context=context, rows=ROWS, special=special):
            scored_BT = (batch.targets != IGNORE) & (batch.tokens != special.boundary)
            rows = np.flatnonzero(scored_BT.any(axis=1))
            if not len(rows):
                continue
            last_B1 = np.where(batch.targets[:, -1:] == IGNORE, special.pad, batch.targets[:, -1:])
            sequences_BT = np.concatenate([batch.tokens, last_B1], axis=1)[rows]
            doc_BT = np.concatenate([batch.doc_id, batch.doc_id[:, -1:]], axis=1)[rows]
            for row, nll in zip(rows, engine.nll(list(sequences_BT), list(doc_BT)), strict=True):
                for document in np.unique(batch.doc_id[row, scored_BT[row]]):
                    if document in sums:
                        chosen = scored_BT[row] & (batch.doc_id[row] == document)
                        sums[document].add(nll[chosen], batch.targets[row, chosen], data)
        return [sums[item.document].content() for item in items]


def windows(num_tokens: int, context: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """Windows over one document so that every token but the first is scored exactly once.

    Yields:
        (start, first, end): tokens start..end-1 are shown, first..end-1 are scored.
    """
    start, first = 0, 1
    while first < num_tokens:
        end = min(start + context, num_tokens)
        yield start, first, end
        start, first = start + stride, end


def rolling_windows(num_tokens: int, context: int) -> Iterator[tuple[int, int, int]]:
    """Windows that show `context` tokens and score as many, the next ones; the last reaches back to show as many too.

    Every token but the first is scored exactly once; the same windows as `get_rolling_token_windows` of
    lm-evaluation-harness with `context_len=1`.

    Yields:
        (start, first, end): tokens start..end-2 are shown for first..end-1 to be scored.
    """
    first = 1
    while first < num_tokens:
        end = min(first + context, num_tokens)
        yield max(0, end - 1 - context), first, end
        first = end


class _Sums:
    def __init__(self) -> None:
        self.nll, self.tokens, self.bytes = 0.0, 0, 0

    def add(self, nll: np.ndarray, tokens: np.ndarray, data: ProbeData) -> None:
        self.nll += float(nll.sum())
        self.tokens += len(tokens)
        self.bytes += int(data.tokenizer.token_bytes[tokens].sum())

    def content(self) -> dict[str, Any]:
        return {"nll": self.nll, "tokens": self.tokens, "bytes": self.bytes}
