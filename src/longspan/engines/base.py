"""What a probe may ask of a subject: the contract of every engine. Numpy only, so that probes never see a framework."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from longspan.corpus.tokenizer import Tokenizer
from longspan.foundation.config import Config
from longspan.foundation.errors import DataError, SubjectError, UserError

Tokens = NDArray[Any]
"""Integer ids (T,), of any integer dtype."""

Capability = Literal["nll", "score", "generate", "predict"]
FinishReason = Literal["stop", "length", "context", "interrupted", "failed"]
Failure = Literal[
    "", "context overflow", "empty reply", "malformed reply", "refused request", "timeout", "transport error"
]
AnswerPrefixMode = Literal["prefill", "in prompt"]


OWN = -1
"""In what is given to `generate`: the subject reads what it wrote itself."""


class UnusableAnswer(SubjectError, DataError):
    """A subject answered with NaN or an infinity: there is no score to be had from it."""


class Sampling(Config):
    """How to generate.

    Attributes:
        max_new_tokens: at most so many.
        temperature: 0 is greedy.
        top_k: keep so many of the likeliest tokens; None: all.
        top_p: of those, keep the smallest set with this much probability.
        stop: end before the first of these strings.
        stop_at_boundary: end where the subject begins another document; off for timing.
        seed: of the draws; each prompt has a stream of its own.
    """

    max_new_tokens: int = Field(64, ge=1)
    temperature: float = Field(0.0, ge=0.0)
    top_k: int | None = Field(None, ge=1)
    top_p: float = Field(1.0, gt=0.0, le=1.0)
    stop: tuple[str, ...] = ()
    stop_at_boundary: bool = True
    seed: int = 0


@dataclass(frozen=True)
class Scored:
    """What a subject thinks of one continuation.

    Attributes:
        nll: float64 (n,), nats per token.
        greedy: whether greedy decoding would have written exactly this.
    """

    nll: NDArray[np.float64]
    greedy: bool


@dataclass(frozen=True)
class Generation:
    """What a subject wrote after one prompt.

    Attributes:
        tokens: int64 (n,), without the prompt and without a boundary token that ended it.
        text: the same decoded, up to a stop string.
        finish_reason: `stop` (boundary or stop string), `length` (max_new_tokens), `context` (the subject's context
            limit), `interrupted` (asked for before the end) or `failed` (there is no answer, see `failure`).
        prompt_tokens: length of the prompt, as the server counts it where one does.
        first_token_seconds: from sending the prompt to the first token, as this request waited for it.
        decode_seconds: for all tokens after the first.
        state_bytes: measured at the end, None where the engine cannot tell.
        failure: why there is no answer, empty where there is one; `detail` is what the server said.
        tokens_from_text: whether `tokens` are those of the text encoded again, since only text came back.
        cached_tokens: tokens of the prompt that a server took from its cache, None where it does not say.
        timed: whether the seconds say what they should; not where a server sends its whole answer at once.
        together: requests that were served at once; timings of several are no timings of one alone.
        shared_tokens: of the prompt, computed once for this and an earlier prompt of the same call; the timings are
            those of a prompt that is computed from its beginning.
    """

    tokens: NDArray[np.int64]
    text: str
    finish_reason: FinishReason
    prompt_tokens: int
    first_token_seconds: float
    decode_seconds: float
    state_bytes: int | None = None
    failure: Failure = ""
    detail: str = ""
    tokens_from_text: bool = False
    cached_tokens: int | None = None
    timed: bool = True
    together: int = 1
    shared_tokens: int = 0


@dataclass(frozen=True)
class HandedOver:
    """A state that is rounded at one place of every sequence: all that later tokens know of earlier ones.

    Attributes:
        at: tokens before it.
        bits: of it.
    """

    at: int
    bits: int


@dataclass(frozen=True)
class LargestBatch:
    """The most sequences whose states fit at a time.

    Attributes:
        sequences: how many.
        tokens_per_second: of decoding them together, None where only the room was measured.
    """

    sequences: int
    tokens_per_second: float | None = None


class Prompting(ABC):
    """How a text becomes the prompt of a subject: with a chat template, as it is, or in a form of the user's own."""

    @abstractmethod
    def encode(self, text: str, answer_prefix: str) -> NDArray[np.int64]:
        """int64 ids of the whole prompt, with the marker that begins a document exactly once where there is one.

        Args:
            text: what is asked; nothing in it becomes a special token.
            answer_prefix: the beginning of the answer, already written.
        """


class Engine(ABC):
    """Runs one subject.

    Attributes:
        name: for people.
        capabilities: which of `nll`, `score`, `generate`, `predict` it has.
        tokenizer: the subject's own.
        document_prefix: ids that the subject expects before a document; may be empty.
        end_tokens: ids beside the boundary token with which it ends a document.
        isolation: what the subject keeps apart where `doc_ids` are given.
        context_limit: most tokens the subject can take in, None where there is no limit.
        fingerprint: of all that determines answers: weights, tokenizer, markers, isolation, precision.
        prompting: how texts become prompts; None: as they are, after `document_prefix`.
        answer_prefix_mode: whether a given beginning of the answer stands where the answer stands (`prefill`), or at
            the end of the question, because the engine cannot begin an answer (`in prompt`).
        rereads: whether `timed` reads all again for every further token, because no state can be kept.
        weight_bytes: of all that a decoding step reads of the weights, None where that is not known.
        handed_over: where its state is rounded, and to how many bits; None: nowhere.
        notes: what a reader of the numbers must know about how they were made, one sentence each.
        asked_tokens: of all prompts and prefixes so far; `shared_tokens` of them were computed once for several.
    """

    name: str
    capabilities: frozenset[Capability]
    tokenizer: Tokenizer
    document_prefix: NDArray[np.int64]
    end_tokens: frozenset[int] = frozenset()
    isolation: Literal["full", "attention", "state", "none"]
    context_limit: int | None
    fingerprint: str
    prompting: Prompting | None = None
    answer_prefix_mode: AnswerPrefixMode = "prefill"
    rereads: bool = False
    weight_bytes: int | None = None
    handed_over: HandedOver | None = None
    notes: tuple[str, ...] = ()
    asked_tokens: int = 0
    shared_tokens: int = 0

    def encode_prompt(self, text: str, answer_prefix: str = "") -> NDArray[np.int64]:
        """The ids to generate from for a question given as text, in the form that the subject was told to be asked in.

        Args:
            text: what is asked.
            answer_prefix: the beginning of the answer, already written; see `answer_prefix_mode`.

        Raises:
            UserError: the subject must be told a form (`template:`) and was not.
        """
        if self.prompting is not None:
            return self.prompting.encode(text, answer_prefix)
        return np.concatenate([self.document_prefix, self.tokenizer.encode(text + answer_prefix)]).astype(np.int64)

    def close(self) -> None:  # noqa: B027  an engine in this process holds nothing
        """Let go of what the engine holds outside this process (a server, connections); it answers no more."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        """`close`, whatever happened."""
        self.close()

    @abstractmethod
    def nll(self, sequences: Sequence[Tokens], doc_ids: Sequence[Tokens] | None = None) -> list[NDArray[np.float64]]:
        """Negative log-likelihood (nats) of every token but the first, given the ones before it.

        Args:
            sequences: of at least 2 ids each; nothing is added.
            doc_ids: per sequence one id per token, equal values in a run = same document; None: one document each.

        Returns:
            Per sequence float64 (n - 1,).

        Raises:
            UserError: a sequence shorter than 2 tokens or longer than the subject can take.
            UnusableAnswer: NaN or infinite likelihoods.
        """

    def score(self, prefix: Tokens, continuations: Sequence[Tokens]) -> list[NDArray[np.float64]]:
        """NLL of each continuation's tokens after the same prefix, which is computed once.

        Args:
            prefix: at least 1 id.
            continuations: at least 1 id each, of any lengths.

        Returns:
            Per continuation float64 (len(continuation),).
        """
        return self.score_many([prefix], [continuations])[0]

    @abstractmethod
    def score_many(
        self, prefixes: Sequence[Tokens], continuations: Sequence[Sequence[Tokens]]
    ) -> list[list[NDArray[np.float64]]]:
        """`score` for several prefixes at once, each with continuations of its own."""

    def predict(self, sequences: Sequence[Tokens], wanted: Sequence[NDArray[np.bool_]]) -> list[NDArray[np.int64]]:
        """The likeliest next token after each wanted position, in one pass over what really stands in a sequence.

        Args:
            sequences: of at least 1 id each; nothing is added.
            wanted: per sequence bool (n,), the positions after which the likeliest token is asked for.

        Returns:
            Per sequence int64 (wanted positions,).

        Raises:
            UserError: the engine cannot; see `capabilities`.
        """
        raise self.refuse("predict")

    @abstractmethod
    def generate(
        self, prompts: Sequence[Tokens], sampling: Sampling, given: Sequence[Tokens] | None = None
    ) -> list[Generation]:
        """Continue each prompt (at least 1 id; nothing is added). What is written does not depend on the others.

        Args:
            prompts: one alone is timed as one request; several may be served together (`Generation.together`).
            sampling: how.
            given: per prompt ids that the subject reads in place of what it wrote, the first after its first new token;
                -1 where it reads its own. It writes one token more than are given, `max_new_tokens` at most.
        """

    def timed(self, prompt: Tokens, sampling: Sampling) -> Generation:
        """`generate` of one prompt as whoever runs this model would have it, right or not: for what it costs alone."""
        return self.generate([prompt], sampling)[0]

    def generate_and_score(
        self,
        prompts: Sequence[Tokens],
        sampling: Sampling,
        prefixes: Sequence[Tokens],
        continuations: Sequence[Sequence[Tokens]],
    ) -> tuple[list[Generation], list[list[NDArray[np.float64]]]]:
        """`generate` and `score_many` in one call; what prompts and prefixes share need be computed only once."""
        written = self.generate(prompts, sampling) if prompts else []
        return written, self.score_many(prefixes, continuations) if prefixes else []

    @abstractmethod
    def state_bytes(self, context: int) -> int | None:
        """Bytes that one sequence's state takes after `context` tokens, computed from the configuration.

        None where the configuration is not known, or is of a kind whose state is not known.
        """

    def refuse_given(self) -> UserError:
        """The error for an engine that reads nothing but what it writes."""
        return UserError(
            f"{self.name} is to read other tokens than it wrote, with {type(self).__name__}",
            "the native engine, which can put them in between",
            "leave this probe out for it, or run it with `engine: native`",
        )

    def largest_batch(self, context: int) -> LargestBatch | None:
        """The most sequences of `context` tokens that can be decoded at a time; None where that is not measured."""
        del context
        return None

    def forget_peak(self) -> None:  # noqa: B027  a server's memory is its own
        """Measure `peak_bytes` from here."""

    def peak_bytes(self) -> int | None:
        """Most bytes of the device in use since `forget_peak`; None: not known (a server, a CPU)."""
        return None

    def copy_rate(self) -> float | None:
        """Bytes/s of a copy on the device, read and written, as measured here; None: not known (a server)."""
        return None

    def refuse(self, capability: str) -> UserError:
        """The error for something this engine cannot do."""
        have = ", ".join(sorted(self.capabilities)) or "nothing"
        return UserError(f"{self.name} cannot `{capability}`", have, "leave out the probes that need it")


def require_finite(values: NDArray[np.float64], subject: str, what: str) -> NDArray[np.float64]:
    """Pass likelihoods on; a NaN must never become a score (an argmin would even count it as right).

    Raises:
        UnusableAnswer: naming the subject and the first bad place.
    """
    if not np.isfinite(values).all():
        index = int(np.flatnonzero(~np.isfinite(values))[0])
        raise UnusableAnswer(
            f"{subject} gave {values[index]} as the likelihood of token {index + 1} of {what}",
            "finite numbers",
            "look at the subject's training for divergence, or take it out of the study",
        )
    return values
