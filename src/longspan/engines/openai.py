"""Asks a server that speaks the OpenAI API: with token ids where it takes them, many requests at a time.

What the server can do is tried once with small requests when it is opened, never assumed, and is told in `notes`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from typing import Any, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer as RustTokenizer

from longspan.corpus.tokenizer import Tokenizer
from longspan.engines.base import (
    Capability,
    Engine,
    FinishReason,
    Generation,
    Prompting,
    Sampling,
    Tokens,
    UnusableAnswer,
    require_finite,
)
from longspan.engines.batching import alone, check_length, check_requests
from longspan.engines.openai_replies import echoed, failed, gathered
from longspan.engines.server import RequestFailed, Server
from longspan.engines.source import EndpointArguments
from longspan.engines.state_shapes import StateShape
from longspan.foundation.errors import UserError

TRIED_TEXT = "The quick brown fox jumps over the lazy dog."
OPTIONS: tuple[dict[str, Any], ...] = (
    {"stream_options": {"include_usage": True}, "return_token_ids": True, "ignore_eos": False},
    {"stream_options": {"include_usage": True}},
    {},
)
"""Fields beyond the API's oldest, the most wanted first: the first set that a server takes is used."""
Given = TypeVar("Given")
Got = TypeVar("Got")


class OpenAIEngine(Engine):
    """A model behind a server.

    Attributes:
        server: the connection.
        api: `completions` (whole prompts) or `chat` (questions, which the server puts in its own template).
        takes_ids: whether prompts go as token ids; else as text, which the server encodes itself.
    """

    isolation: Literal["full", "attention", "state", "none"] = "full"

    def __init__(
        self,
        base_url: str,
        model: str,
        tokenizer: Tokenizer,
        *,
        markers: bool,
        fingerprint: str,
        arguments: EndpointArguments,
        api: Literal["completions", "chat"] = "completions",
        prompting: Prompting | None = None,
        context_limit: int | None = None,
        shape: StateShape | None = None,
        itemsize: int = 2,
        name: str = "",
        server: Server | None = None,
    ) -> None:
        """Connect, and find out what the server can do.

        Args:
            base_url: up to and without `/v1`.
            model: as the server calls it.
            tokenizer: the model's own.
            markers: whether a boundary token precedes each document.
            fingerprint: of all that is known to determine answers.
            arguments: how it is asked.
            api: `completions` or `chat`.
            prompting: how texts become prompts; None: as they are.
            context_limit: most tokens it can take in; None: what the server says.
            shape, itemsize: of its state, where its configuration is known.
            name: for people.
            server: the connection; None: a new one.

        Raises:
            UserError: the server knows neither the model nor the API.
            ServerGone: it does not answer.
        """
        self.name = name or model
        self.server = server or Server(base_url, arguments, what=self.name)
        self.tokenizer = tokenizer
        self.document_prefix = np.array([tokenizer.special.boundary] if markers else [], dtype=np.int64)
        self.fingerprint = fingerprint
        self.api = api
        self.prompting = prompting
        self.answer_prefix_mode = "in prompt" if api == "chat" else "prefill"
        self._model, self._arguments = model, arguments
        self._shape, self._itemsize = shape, itemsize
        self._rust: RustTokenizer | None = None
        self._pool = ThreadPoolExecutor(arguments.concurrency, thread_name_prefix="longspan-request")
        notes: list[str] = []
        self.context_limit = context_limit or self._listed_limit(notes)
        self.takes_ids = api == "completions" and self._takes_ids(notes)
        self._options = self._find_options(notes)
        self.capabilities: frozenset[Capability] = self._find_capabilities(notes)
        self.notes = tuple(notes)

    def close(self) -> None:
        """See `Engine.close`."""
        self._pool.shutdown(wait=True, cancel_futures=True)
        self.server.close()

    def nll(self, sequences: Sequence[Tokens], doc_ids: Sequence[Tokens] | None = None) -> list[NDArray[np.float64]]:
        """See `Engine.nll`. One request each, whose prompt the server gives back with its likelihoods."""
        if "nll" not in self.capabilities:
            raise self.refuse("nll")
        for i, sequence in enumerate(sequences):
            # The server writes one token of its own after the prompt.
            check_length(len(sequence) - 1, self.context_limit and self.context_limit - 2, f"sequence {i}", self.name)
        pieces = [(i, 0, each) for i, each in enumerate(sequences)] if doc_ids is None else alone(sequences, doc_ids)
        answers = [np.zeros(len(sequence) - 1) for sequence in sequences]
        found = self._all(self._prompt_nll, [tokens for _, _, tokens in pieces])
        for (row, start, tokens), values in zip(pieces, found, strict=True):
            answers[row][start : start + len(tokens) - 1] = require_finite(values, self.name, f"sequence {row}")
        return answers

    def score_many(
        self, prefixes: Sequence[Tokens], continuations: Sequence[Sequence[Tokens]]
    ) -> list[list[NDArray[np.float64]]]:
        """See `Engine.score_many`. Whether the server computes a prefix once is its own matter."""
        check_requests(prefixes, continuations)
        if "score" not in self.capabilities:
            raise self.refuse("score")
        pairs = [
            np.concatenate([prefix, choice])
            for prefix, choices in zip(prefixes, continuations, strict=True)
            for choice in choices
        ]
        scored = iter(self.nll(pairs))
        return [
            [next(scored)[len(prefix) - 1 :] for _ in choices]
            for prefix, choices in zip(prefixes, continuations, strict=True)
        ]

    def generate(
        self, prompts: Sequence[Tokens], sampling: Sampling, given: Sequence[Tokens] | None = None
    ) -> list[Generation]:
        """See `Engine.generate`. A prompt without an answer gives a `Generation` that has `failed`, with the cause."""
        if given is not None:
            raise self.refuse_given()
        for i, prompt in enumerate(prompts):
            check_length(len(prompt), None, f"prompt {i}", self.name)
        return self._all(lambda asked: self._write(asked[1], sampling, asked[0]), list(enumerate(prompts)))

    def state_bytes(self, context: int) -> int | None:
        """See `Engine.state_bytes`."""
        return None if self._shape is None else self._shape.bytes(context, self._itemsize)

    # --- requests -----------------------------------------------------------------------------------------------------

    def _all(self, ask: Callable[[Given], Got], given: Sequence[Given]) -> list[Got]:
        """Every answer in order, so many at a time; the first error ends all that has not begun."""
        futures = [self._pool.submit(ask, each) for each in given]
        try:
            wait(futures, return_when=FIRST_EXCEPTION)
            return [future.result() for future in futures]
        finally:
            for future in futures:
                future.cancel()

    def _prompt_nll(self, tokens: Tokens) -> NDArray[np.float64]:
        try:
            reply = self.server.post("/v1/completions", self._echo(tokens))
            return echoed(reply, len(tokens))
        except RequestFailed as error:
            raise UnusableAnswer(
                f"{self.name} gave no likelihoods of {len(tokens)} tokens ({error.cause}: {error.detail})",
                "a number for every token",
                "ask it with a shorter context, or leave out the probes that need likelihoods",
            ) from None

    def _echo(self, tokens: Tokens) -> dict[str, Any]:
        ids = np.asarray(tokens).tolist()
        asked = {"prompt": ids, "max_tokens": 1, "echo": True, "logprobs": 1, "temperature": 0.0}
        return {"model": self._model, **asked, **self._arguments.extra}

    def _write(self, prompt: Tokens, sampling: Sampling, index: int) -> Generation:
        body, path = self._body(prompt, sampling, index)
        try:
            if self._arguments.stream:
                events = self.server.stream(path, {**body, "stream": True})
            else:
                events = [(0.0, self.server.post(path, body))]
            reply = gathered(events)
        except RequestFailed as error:
            return failed(len(prompt), error)
        if reply.finish is None and not reply.text and not reply.tokens:
            return failed(len(prompt), RequestFailed("empty reply", "an answer without a choice in it"))
        if reply.finish == "content_filter":
            return failed(len(prompt), RequestFailed("refused request", "the server's filter"))
        tokens = reply.tokens or self.tokenizer.encode(reply.text).tolist()
        prompt_tokens = int(reply.usage.get("prompt_tokens") or len(prompt))
        written = int(reply.usage.get("completion_tokens") or len(tokens))
        first = reply.last if reply.first is None else reply.first
        details = reply.usage.get("prompt_tokens_details") or {}
        return Generation(
            tokens=np.array(tokens, dtype=np.int64),
            text=reply.text,
            finish_reason=self._reason(reply.finish, prompt_tokens + written),
            prompt_tokens=prompt_tokens,
            first_token_seconds=first,
            decode_seconds=reply.last - first,
            tokens_from_text=not reply.tokens,
            cached_tokens=details.get("cached_tokens"),
            timed=reply.events > 1,
        )

    def _body(self, prompt: Tokens, sampling: Sampling, index: int) -> tuple[dict[str, Any], str]:
        body: dict[str, Any] = {
            "model": self._model,
            "max_tokens": sampling.max_new_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            **self._options,
        }
        if not self._arguments.stream:
            body.pop("stream_options", None)
        if "ignore_eos" in self._options:
            body["ignore_eos"] = not sampling.stop_at_boundary
        if sampling.temperature > 0:
            body["seed"] = sampling.seed + index
        if sampling.top_k is not None:
            body["top_k"] = sampling.top_k
        if sampling.stop:
            body["stop"] = list(sampling.stop)
        body |= self._arguments.extra
        if self.api == "chat":
            asked = self.tokenizer.decode(np.asarray(prompt)[len(self.document_prefix) :])
            return {**body, "messages": [{"role": "user", "content": asked}]}, "/v1/chat/completions"
        return {**body, "prompt": self._prompt(prompt)}, "/v1/completions"

    def _prompt(self, prompt: Tokens) -> list[int] | str:
        if self.takes_ids:
            ids: list[int] = np.asarray(prompt).tolist()
            return ids
        # The server puts the marker before a text itself.
        prefix = self.document_prefix.tolist()
        ids = np.asarray(prompt).tolist()
        ids = ids[len(prefix) :] if prefix and ids[: len(prefix)] == prefix else ids
        if self._rust is None:
            self._rust = RustTokenizer.from_str(json.dumps(self.tokenizer.tokenizer_json()))
        return str(self._rust.decode(ids, skip_special_tokens=False))

    def _reason(self, finish: str | None, total: int) -> FinishReason:
        if finish == "length":
            return "context" if self.context_limit is not None and total >= self.context_limit else "length"
        return "stop"

    # --- what the server can do ---------------------------------------------------------------------------------------

    def _listed_limit(self, notes: list[str]) -> int | None:
        try:
            listed = self.server.get("/v1/models")
        except RequestFailed as error:
            # `transformers serve` answers so where nothing was ever fetched from the hub.
            notes.append(f"the server does not list its models ({error.detail})")
            return None
        entries = listed.get("data", []) if isinstance(listed, dict) else []
        entry: dict[str, Any] = next((each for each in entries if each.get("id") == self._model), {})
        limit = entry.get("max_model_len") or entry.get("context_length") or entry.get("context_window")
        if limit is None:
            notes.append("the server does not say how many tokens the model can take in")
        return int(limit) if limit else None

    def _takes_ids(self, notes: list[str]) -> bool:
        ids = self.tokenizer.encode(TRIED_TEXT).tolist()
        try:
            reply = self.server.post(
                "/v1/completions", {"model": self._model, "prompt": ids, "max_tokens": 1, **self._arguments.extra}
            )
            if not reply.get("choices"):
                raise RequestFailed("empty reply", "no choices")
            counted = (reply.get("usage") or {}).get("prompt_tokens", len(ids))
            if counted == len(ids):
                return True
            detail = f"it counts {counted} tokens in a prompt of {len(ids)}"
        except RequestFailed as error:
            detail = error.detail
        notes.append(f"prompts go as text, which the server encodes itself: it takes no token ids ({detail})")
        return False

    def _find_options(self, notes: list[str]) -> dict[str, Any]:
        prompt, sampling = self.tokenizer.encode(TRIED_TEXT), Sampling(max_new_tokens=2)
        detail = ""
        for options in OPTIONS:
            self._options = options
            body, path = self._body(prompt, sampling, 0)
            try:
                if not self._arguments.stream:
                    self.server.post(path, body)
                    return options
                reply = gathered(self.server.stream(path, {**body, "stream": True}))
            except RequestFailed as error:
                detail = error.detail
                continue
            if not reply.tokens:
                notes.append("the server returns text only; its tokens are those of the text encoded again")
            if "ignore_eos" not in options:
                notes.append("the server cannot be told to go on after the end of a text")
            if not reply.usage:
                notes.append("the server does not count tokens; ours are those of the text encoded again")
            return options
        raise UserError(
            f"{self.name} at {self.server.url} answers no request of /v1/{self.api} ({detail})",
            "a server with the OpenAI API",
            "check `base_url`, `model` and `api`, or set `arguments: {stream: false}`",
        )

    def _find_capabilities(self, notes: list[str]) -> frozenset[Capability]:
        if not self.takes_ids:
            reason = "the API chat has none" if self.api == "chat" else "it takes no token ids"
            notes.append(f"no likelihoods: {reason}")
            return frozenset({"generate"})
        tokens = self.tokenizer.encode(TRIED_TEXT)
        try:
            echoed(self.server.post("/v1/completions", self._echo(tokens)), len(tokens))
        except RequestFailed as error:
            notes.append(f"no likelihoods: the server does not give those of a prompt back ({error.detail})")
            return frozenset({"generate"})
        return frozenset({"generate", "nll", "score"})

    def refuse(self, capability: str) -> UserError:
        """See `Engine.refuse`; with the reason."""
        reason = next((note for note in self.notes if note.startswith("no likelihoods")), "")
        error = super().refuse(capability)
        return UserError(f"{error.given}{f' ({reason})' if reason else ''}", error.allowed, error.fix)
