"""`longspan generate`: continue a prompt and show the text while it is written."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import numpy as np

from longspan.engines.base import Generation, Sampling
from longspan.engines.native import NativeEngine
from longspan.foundation.errors import DataError, Stopped, UserError
from longspan.report.numbers import byte_size, duration, scaled
from longspan.terminal import print_json

STDIN = "-"


def read_prompt(prompt: str | None, file: str | None) -> str:
    """The prompt: as given, or from a file or standard input (`-`), whose last line end is not part of it.

    Raises:
        UserError: none or two are given, or the file is not there.
        DataError: not UTF-8.
    """
    if (prompt is None) == (file is None):
        given = "no prompt" if prompt is None else "--prompt and --prompt-file"
        raise UserError(given, "one of --prompt TEXT, --prompt-file FILE, or - for standard input", "give one of them")
    if prompt is not None and prompt != STDIN:
        return prompt
    source = STDIN if file is None else file
    try:
        content = sys.stdin.buffer.read() if source == STDIN else Path(source).read_bytes()
    except OSError as error:
        raise UserError(f"{source} cannot be read: {error.strerror}", "a text file", "check the path") from None
    try:
        return content.decode().removesuffix("\n").removesuffix("\r")
    except UnicodeDecodeError as error:
        name = "standard input" if source == STDIN else source
        raise DataError(f"{name} is not UTF-8: byte {error.start} is wrong", "UTF-8 text", "convert it") from None


def generate(engine: NativeEngine, prompt: str, sampling: Sampling, *, json: bool = False) -> None:
    """Write the continuation of `prompt` to stdout as it comes, what it cost to stderr.

    Args:
        engine: the subject.
        prompt: what it sees, after the marker where it was trained with one.
        sampling: how it draws.
        json: write one object at the end instead.

    Raises:
        UserError: an empty prompt for a subject that begins documents without a marker, or one that is too long.
        Stopped: Ctrl-C; what was written until then was shown.
    """
    ids = np.concatenate([engine.document_prefix, engine.tokenizer.encode(prompt)])
    if not len(ids):
        raise UserError(
            f"an empty prompt for {engine.name}, which was trained without markers",
            "at least one token to start from",
            "give a prompt",
        )
    continuation = engine.continue_text(ids, sampling)
    try:
        for piece in continuation:
            if piece and not json:
                sys.stdout.write(piece)
                sys.stdout.flush()
    except KeyboardInterrupt:
        written = continuation.result()
        _finish(engine, prompt, written, json)
        raise Stopped(f"stopped after {len(written.tokens)} tokens") from None
    except BrokenPipeError:
        # Whoever read has had enough; Python would complain when it closes the pipe.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return
    _finish(engine, prompt, continuation.result(), json)


def _finish(engine: NativeEngine, prompt: str, written: Generation, json: bool) -> None:
    if json:
        print_json(_as_json(engine, prompt, written))
        return
    print(flush=True)
    rate = _rate(written)
    speed = f", {scaled(rate, 'tok/s')} after the first" if rate else ""
    print(
        f"{written.prompt_tokens:,} prompt tokens in {duration(written.first_token_seconds)}, {len(written.tokens):,} "
        f"tokens written{speed}; {byte_size(written.state_bytes)} of state; ended by: {written.finish_reason}",
        file=sys.stderr,
    )


def _as_json(engine: NativeEngine, prompt: str, written: Generation) -> dict[str, Any]:
    return {
        "subject": engine.name,
        "mixers": engine.mixers,
        "tokenizer": engine.tokenizer.name,
        "fingerprint": engine.fingerprint,
        "prompt": prompt,
        "text": written.text,
        "tokens": written.tokens.tolist(),
        "finish_reason": written.finish_reason,
        "prompt_tokens": written.prompt_tokens,
        "first_token_seconds": written.first_token_seconds,
        "decode_seconds": written.decode_seconds,
        "decode_tokens_per_second": _rate(written),
        "state_bytes": written.state_bytes,
    }


def _rate(written: Generation) -> float | None:
    """Tokens per second after the first."""
    following = len(written.tokens) - 1
    return following / written.decode_seconds if following > 0 and written.decode_seconds > 0 else None
