"""What a server's replies amount to: a text, the likelihoods of a prompt, or no answer and why."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from longspan.engines.base import Generation
from longspan.engines.server import RequestFailed


@dataclass
class Reply:
    """What a stream of events amounts to."""

    text: str = ""
    tokens: list[int] = field(default_factory=list)
    finish: str | None = None
    usage: dict[str, Any] = field(default_factory=dict)
    first: float | None = None
    last: float = 0.0
    events: int = 0


def echoed(reply: dict[str, Any], length: int) -> NDArray[np.float64]:
    """NLL of all tokens of a prompt but the first, from a reply that repeats it.

    Raises:
        RequestFailed: not one likelihood per token.
    """
    try:
        found = reply["choices"][0]["logprobs"]["token_logprobs"]
        values = np.array([-float(value) for value in found[1:length]])
    except (KeyError, IndexError, TypeError, ValueError):
        raise RequestFailed("malformed reply", "no likelihoods of the prompt") from None
    # With the first token, which has none, and perhaps one that was written.
    if len(found) not in (length, length + 1) or found[0] is not None or len(values) != length - 1:
        raise RequestFailed("malformed reply", f"{len(found)} likelihoods for a prompt of {length} tokens")
    return values


def gathered(events: Iterable[tuple[float, dict[str, Any]]]) -> Reply:
    """All events of a request, each with the seconds since it was sent.

    Raises:
        RequestFailed: a choice or an answer of the wrong kind.
    """
    reply = Reply()
    for seconds, event in events:
        reply.events += 1
        reply.usage = event.get("usage") or reply.usage
        choices = event.get("choices") or []
        if not choices:
            continue
        choice = choices[0]
        if not isinstance(choice, dict):
            raise RequestFailed("malformed reply", f"a choice that is no object: {choice!r:.100}")
        message = choice.get("delta") or choice.get("message") or choice
        piece, tokens = message.get("text") or message.get("content") or "", choice.get("token_ids") or []
        if not isinstance(piece, str) or not isinstance(tokens, list):
            raise RequestFailed("malformed reply", f"an answer that is no text: {piece!r:.100}")
        if piece or tokens:
            reply.first = seconds if reply.first is None else reply.first
            reply.last = seconds
        reply.text += piece
        reply.tokens += tokens
        reply.finish = choice.get("finish_reason") or reply.finish
    return reply


def failed(prompt_tokens: int, error: RequestFailed) -> Generation:
    """No answer, with the cause."""
    return Generation(
        tokens=np.empty(0, dtype=np.int64),
        text="",
        finish_reason="failed",
        prompt_tokens=prompt_tokens,
        first_token_seconds=0.0,
        decode_seconds=0.0,
        failure=error.cause,
        detail=error.detail,
        timed=False,
    )
