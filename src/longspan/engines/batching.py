"""Requests in rows of a batch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from longspan.engines.base import Tokens
from longspan.foundation.errors import UserError


def by_length(lengths: Sequence[int], batch_tokens: int) -> Iterator[list[int]]:
    """Indices in batches of similar length with at most `batch_tokens` positions, padding included."""
    batch: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        if batch and (len(batch) + 1) * lengths[i] > batch_tokens:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


def stack(rows: Sequence[Tokens], padding: int) -> Tensor:
    """int64 (B, T) on the CPU, short rows filled at the end: what comes later cannot change what came before."""
    out = np.full((len(rows), max(map(len, rows))), padding, dtype=np.int64)
    for row, tokens in enumerate(rows):
        out[row, : len(tokens)] = tokens
    return torch.from_numpy(out)


def alone(sequences: Sequence[Tokens], doc_ids: Sequence[Tokens]) -> list[tuple[int, int, Tokens]]:
    """Packed rows as their documents, for a subject that sees each document as if it were alone.

    The last token of a document predicts the first of the next, as it does in a packed row.

    Returns:
        (row, start, tokens): `tokens` stand in `row` from `start` on, and all but the first of them are predicted.

    Raises:
        UserError: not one document id per token.
    """
    pieces = []
    for row, (tokens, ids) in enumerate(zip(sequences, doc_ids, strict=True)):
        if len(ids) != len(tokens):
            given = f"{len(ids)} document ids for the {len(tokens)} tokens of sequence {row}"
            raise UserError(given, "one id per token", "cut both the same way")
        starts = [0, *(np.flatnonzero(np.diff(ids)) + 1).tolist()]
        for start, end in zip(starts, [*starts[1:], len(tokens) - 1], strict=True):
            if end > start:
                pieces.append((row, start, tokens[start : end + 1]))
    return pieces


def check_requests(prefixes: Sequence[Tokens], continuations: Sequence[Sequence[Tokens]]) -> None:
    """Refuse empty prefixes and continuations."""
    for i, (prefix, choices) in enumerate(zip(prefixes, continuations, strict=True)):
        if len(prefix) < 1:
            raise UserError(f"request {i} has no prefix", "at least one token", "begin with `document_prefix`")
        if not choices or any(len(choice) < 1 for choice in choices):
            raise UserError(f"request {i} has an empty continuation", "at least one token each", "drop it")


def check_length(num_inputs: int, limit: int | None, what: str, subject: str) -> None:
    """Refuse what is too short to be scored or longer than a subject can take."""
    if num_inputs < 1:
        raise UserError(f"{what} is too short", "at least 2 tokens for a likelihood, 1 for a prompt", "leave it out")
    if limit is not None and num_inputs > limit:
        raise UserError(
            f"{what} shows {num_inputs} tokens to {subject}",
            f"at most {limit}, its context limit",
            "ask it with a shorter context",
        )
