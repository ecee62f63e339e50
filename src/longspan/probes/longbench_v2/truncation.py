"""The middle of a prompt is cut out until it fits, on token ids and over the whole prompt, and what was lost is kept.

Upstream (THUDM/LongBench, `pred.py:query_llm`) encodes the whole rendered prompt, keeps `ids[:n//2] + ids[-n//2:]`,
decodes that and wraps the text in the chat template. `-n//2` rounds down, so an odd budget's tail is the longer half.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from longspan.corpus.tokenizer import Tokenizer
from longspan.engines.base import Engine, Tokens
from longspan.probes.longbench_v2.prompts import Rendered

TRIES = 8
"""Decoding and encoding again may change the count; so often the budget is lowered until the prompt fits."""


@dataclass(frozen=True)
class Fitted:
    """A prompt that fits.

    Attributes:
        text: the user's message, its middle cut out where it was too long.
        ids: the same as the subject takes it in.
        ledger: `prompt_tokens_total`, and where there is a document `doc_tokens_total`, `doc_tokens_kept`,
            `kept_fraction` and `fully_visible`; `other_tokens_cut` counts lost tokens of instruction, question and
            choices (0 unless these take more than half of the room); `budget` is what the cut aimed at, where there
            was one.
    """

    text: str
    ids: Tokens
    ledger: dict[str, Any]


def middle_cut(ids: Tokens, most: int) -> Tokens:
    """`ids[:most//2] + ids[-most//2:]` where there are more than `most` (at least 2), else all."""
    assert most >= 2, "fewer than two tokens leave no middle"
    return ids if len(ids) <= most else np.concatenate([ids[: most // 2], ids[-most // 2 :]])


def fit(engine: Engine, prompt: Rendered, room: int, answer_prefix: str = "") -> Fitted | None:
    """The prompt as the engine takes it in, with at most `room` tokens; None where not even an empty one would fit.

    The budget of the cut is `room` less what the engine's template adds. A marker that the subject expects before a
    document counts in the budget, as upstream's tokenizers put it there by themselves.
    """
    tokenizer, marker = engine.tokenizer, engine.document_prefix
    ids = encoded(tokenizer, prompt.text)
    around = len(engine.encode_prompt("x", answer_prefix)) - len(tokenizer.encode("x")) - len(marker)
    budget = room - around
    if len(marker) + len(ids) <= budget:
        # Only now: to encode a book that will not fit a second time would cost as much as the first.
        whole = engine.encode_prompt(prompt.text, answer_prefix)
        if len(whole) <= room:
            return Fitted(prompt.text, whole, _ledger(tokenizer, prompt, ids, len(ids), 0))
        budget = len(marker) + len(ids) - (len(whole) - room)
    for _ in range(TRIES):
        if budget - len(marker) < 2:
            return None
        head, tail = budget // 2 - len(marker), budget - budget // 2
        text = tokenizer.decode(middle_cut(np.concatenate([marker, ids]), budget)[len(marker) :])
        cut = engine.encode_prompt(text, answer_prefix)
        if len(cut) <= room:
            return Fitted(text, cut, {**_ledger(tokenizer, prompt, ids, head, tail), "budget": budget})
        budget -= len(cut) - room
    return None


@lru_cache(maxsize=4)
def encoded(tokenizer: Tokenizer, text: str) -> Tokens:
    """Ids of a prompt; the same one is cut at several contexts in a row."""
    return tokenizer.encode(text).astype(np.int64)


def _ledger(tokenizer: Tokenizer, prompt: Rendered, ids: Tokens, head: int, tail: int) -> dict[str, Any]:
    """What is left of the document when the first `head` and the last `tail` tokens of the prompt are kept."""
    ledger: dict[str, Any] = {"prompt_tokens_total": len(ids)}
    if prompt.document is None:
        return ledger
    ends = np.cumsum(tokenizer.token_bytes[ids], dtype=np.float64)
    size = len(prompt.text.encode())
    # Where a tokenizer normalises, its bytes are not quite the text's.
    ends *= size / max(ends[-1], 1.0)
    starts = np.concatenate([[0.0], ends[:-1]])
    first, last = (len(prompt.text[:place].encode()) for place in prompt.document)
    of_document = (starts < last) & (ends > first)
    kept = np.zeros(len(ids), dtype=bool)
    kept[:head] = True
    if tail:
        kept[-tail:] = True
    total, visible = int(of_document.sum()), int((of_document & kept).sum())
    return {
        **ledger,
        "doc_tokens_total": total,
        "doc_tokens_kept": visible,
        "kept_fraction": visible / total if total else 1.0,
        "fully_visible": visible == total,
        "other_tokens_cut": int((~of_document & ~kept).sum()),
    }
