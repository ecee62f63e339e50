"""Longspan's subjects in lm-evaluation-harness (extra `lm-eval`). Importing this module registers the model `longspan`.

Tokens are cut as the harness's own Hugging Face model cuts them (`lm_eval/models/huggingface.py`,
`TemplateLM._encode_pair` in `lm_eval/api/model.py`, version 0.4.13), with one difference: a marker stands before a text
where the subject was trained with one, and never twice.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from inspect import signature
from typing import Any, TypeVar

import numpy as np
import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from numpy.typing import NDArray
from tqdm import tqdm  # type: ignore[import-untyped]

from longspan.engines.base import Sampling
from longspan.engines.loading import default_device, load
from longspan.engines.native import Dtype, NativeEngine
from longspan.engines.trained_run import Weights
from longspan.foundation.config import misspelt
from longspan.foundation.errors import UserError

# Below the harness's own logger, so that its handler shows it.
logger = logging.getLogger("lm_eval.models.longspan")

Ids = NDArray[np.int64]
Item = TypeVar("Item")
UNKNOWN_CONTEXT = 2_048
"""The harness's default `max_length`, where a subject names no length of its own."""
CALL_BATCHES = 2
"""About so many batches go to the engine at a time; after each such call the answers reach the harness's cache."""
WITHOUT_EFFECT = {"num_beams": 1, "num_return_sequences": 1, "repetition_penalty": 1.0, "use_cache": True}
"""Generation settings that tasks name, at the values that ask for nothing."""


@dataclass
class Cuts:
    """How many requests of a kind lost their beginning, and how many tokens of it."""

    requests: int = 0
    tokens: int = 0
    most: int = 0

    def add(self, tokens: int) -> None:
        """Count one request that lost so many."""
        if tokens > 0:
            self.requests, self.tokens, self.most = self.requests + 1, self.tokens + tokens, max(self.most, tokens)


@dataclass
class _Request:
    prefix: Ids
    continuations: list[Ids] = field(default_factory=list)
    places: list[int] = field(default_factory=list)

    @property
    def tokens(self) -> int:
        return len(self.prefix) + max(map(len, self.continuations))


@register_model("longspan")
class LongspanLM(LM):  # type: ignore[misc]
    """A trained run, a subject of a study, or Hugging Face weights.

    Attributes:
        engine: what answers.
        max_length: tokens that the subject sees at a time; longer requests lose their beginning, which is said and
            counted, in the log and in the results (`truncated`).
        max_gen_toks: tokens written where a task does not say.
        truncated: request type → what was cut.
    """

    def __init__(
        self,
        pretrained: str | NativeEngine,
        *,
        weights: Weights = "best",
        revision: str | None = None,
        dtype: Dtype | None = None,
        device: str | None = None,
        max_length: int | None = None,
        max_gen_toks: int = 256,
        batch_tokens: int = 8_192,
        sampling_seed: int = 0,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
        **select: Any,
    ) -> None:
        """Load the subject.

        Args:
            pretrained: what `longspan.engines.loading.load` takes, or an engine.
            weights, revision, dtype, batch_tokens: see `load`.
            device: default CUDA where there is one.
            max_length: default the subject's limit, else its training context, else 2,048.
            max_gen_toks: see above.
            sampling_seed: of draws at a temperature; every request has a stream of its own.
            batch_size, max_batch_size: the harness passes them; batches are cut by `batch_tokens` instead.
            select: which subject of a study, e.g. `pattern="AMAM", seed=0`.

        Raises:
            UserError: nothing of the kind is there, or a length that the subject cannot take.
        """
        super().__init__()
        if isinstance(pretrained, NativeEngine):
            loading = {"revision": revision, "dtype": dtype, **select}
            if given := [name for name, value in loading.items() if value is not None]:
                raise UserError(f"{', '.join(given)} with an engine", "what names and loads a path", "leave it out")
            self.engine = pretrained
        else:
            _check_names(select)
            self.engine = load(
                pretrained,
                weights=weights,
                dtype=dtype,
                device=_device(device),
                revision=revision,
                select=select,
                batch_tokens=batch_tokens,
            )
        self._device = self.engine.device
        self.max_length, why = _max_length(self.engine, max_length)
        self.max_gen_toks = max_gen_toks
        self.sampling_seed = sampling_seed
        self.truncated: dict[str, Cuts] = {}
        self._call_tokens = CALL_BATCHES * self.engine.batch_tokens
        self._warned = False
        logger.info(
            "%s: %s, tokenizer %s, on %s in %s; max_length %d (%s)",
            self.engine.name,
            self.engine.mixers,
            self.engine.tokenizer.name,
            self._device,
            self.engine.dtype,
            self.max_length,
            why,
        )
        if batch_size not in (None, 1, "1", "auto") or max_batch_size is not None:
            logger.warning(
                "batch_size has no effect here: batches hold up to batch_tokens=%d tokens", self.engine.batch_tokens
            )

    @property
    def prefix_token_id(self) -> int:
        """The boundary token: what stands before a text that has nothing else before it."""
        return self.engine.tokenizer.special.boundary

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """See `LM.loglikelihood`. Equal contexts are computed once for all their continuations."""
        arguments = [request.args for request in requests]
        grouped: dict[bytes, _Request] = {}
        cuts = Cuts()
        for place, (prefix, continuation) in enumerate(self._encode_pairs(arguments)):
            cut = max(0, len(prefix) + len(continuation) - self.max_length - 1)
            cuts.add(cut)
            key = prefix[cut:].tobytes()
            same = grouped.setdefault(key, _Request(prefix[cut:]))
            same.continuations.append(continuation)
            same.places.append(place)
        self._announce("loglikelihood", cuts, len(requests))
        answers: list[tuple[float, bool]] = [(0.0, True)] * len(requests)
        with tqdm(total=len(requests), desc="Running loglikelihood requests", disable=disable_tqdm) as bar:
            # The longest first: what does not fit into memory shows at once, and the time left is never understated.
            ordered = sorted(grouped.values(), key=lambda request: -request.tokens)
            for batch in _calls(ordered, lambda request: request.tokens, self._call_tokens):
                scored = self.engine.score_greedy([r.prefix for r in batch], [r.continuations for r in batch])
                for request, some in zip(batch, scored, strict=True):
                    for place, one in zip(request.places, some, strict=True):
                        answers[place] = (-float(one.nll.sum()), one.greedy)
                        self.cache_hook.add_partial("loglikelihood", arguments[place], answers[place])
                    bar.update(len(request.places))
        return answers

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """See `LM.loglikelihood_rolling`. The probe `perplexity` with `mode: rolling` uses the same windows."""
        self._warn_without_markers()
        texts = [request.args[0] for request in requests]
        tokens = self.engine.tokenizer.encode_batch(texts)
        answers = [0.0] * len(texts)
        with tqdm(total=len(texts), desc="Running loglikelihood_rolling requests", disable=disable_tqdm) as bar:
            for batch in _calls(range(len(texts)), lambda i: len(tokens[i]), self._call_tokens):
                windows = [(i, *window) for i in batch for window in self._windows(tokens[i])]
                nll = self.engine.nll([np.array(shown + scored) for _, shown, scored in windows])
                for (i, _, scored), values in zip(windows, nll, strict=True):
                    answers[i] -= float(values[-len(scored) :].sum())
                for i in batch:
                    self.cache_hook.add_partial("loglikelihood_rolling", (texts[i],), answers[i])
                bar.update(len(batch))
        return answers

    def _windows(self, tokens: NDArray[Any]) -> Iterator[tuple[list[int], list[int]]]:
        """What is shown and what is scored after it."""
        for window in get_rolling_token_windows(tokens.tolist(), self.prefix_token_id, self.max_length, 1):
            yield make_disjoint_window(window)

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """See `LM.generate_until`. Ends at a stop string, at the boundary token, or after `max_gen_toks`."""
        cuts = Cuts()
        asked: list[tuple[Ids, Sampling]] = []
        contexts = self.engine.tokenizer.encode_batch([request.args[0] for request in requests])
        for context, request in zip(contexts, requests, strict=True):
            sampling = self._sampling(request.args[1])
            prompt = self._begin(context)
            room = self.max_length - sampling.max_new_tokens
            if room < 1:
                raise UserError(
                    f"max_gen_toks {sampling.max_new_tokens} with max_length {self.max_length}",
                    "room for at least one token of the prompt",
                    "lower max_gen_toks (--gen_kwargs max_gen_toks=N), or raise max_length in --model_args",
                )
            cuts.add(len(prompt) - room)
            asked.append((prompt[-room:], sampling))
        self._announce("generate_until", cuts, len(requests))
        answers = []
        rows = zip(requests, asked, strict=True)
        bar = tqdm(rows, total=len(requests), desc="Running generate_until requests", disable=disable_tqdm)
        for index, (request, (prompt, sampling)) in enumerate(bar):
            continuation = self.engine.continue_text(prompt, sampling, index=index)
            answers.append("".join(continuation))
            self.cache_hook.add_partial("generate_until", request.args, answers[-1])
        return answers

    def get_model_info(self) -> dict[str, Any]:
        """What goes into the results beside the scores."""
        return {
            "model_num_parameters": self.engine.num_parameters,
            "model_dtype": self.engine.dtype,
            "model_sha": self.engine.fingerprint,
            "model_mixers": self.engine.mixers,
            "model_tokenizer": self.engine.tokenizer.name,
            "max_length": self.max_length,
            "truncated": {kind: {"requests": c.requests, "tokens": c.tokens} for kind, c in self.truncated.items()},
        }

    @property
    def tokenizer_name(self) -> str:
        """Name of the tokenizer, for the harness's cache of requests."""
        return self.engine.tokenizer.name

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """Refused: see `apply_chat_template`."""
        if chat_template is False or chat_template is None:
            return ""
        raise self._no_chat()

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Refused: no subject here has a chat template, and text never turns into special tokens."""
        raise self._no_chat()

    def _no_chat(self) -> UserError:
        return UserError(
            f"a chat template for {self.engine.name}",
            "plain text: this is a base model without a chat template",
            "leave out --apply_chat_template (and --fewshot_as_multiturn)",
        )

    def _encode_pairs(self, pairs: Sequence[tuple[str, str]]) -> Iterator[tuple[Ids, Ids]]:
        """What is shown and what is scored, for every (context, continuation)."""
        # Spaces at the end of a context belong to the first token of the continuation.
        stripped = [context.rstrip() for context, _ in pairs]
        wholes = self.engine.tokenizer.encode_batch([context + continuation for context, continuation in pairs])
        distinct = list(dict.fromkeys(stripped))
        contexts = dict(zip(distinct, self.engine.tokenizer.encode_batch(distinct), strict=True))
        for (context, continuation), start, whole in zip(pairs, stripped, wholes, strict=True):
            shown = contexts[start] if context else np.empty(0, dtype=np.int64)
            scored = whole[len(shown) :].astype(np.int64)
            if not 0 < len(scored) <= self.max_length:
                raise UserError(
                    f"the continuation {_short(continuation)} of {_short(context)} has {len(scored)} tokens",
                    f"1 to max_length = {self.max_length}",
                    "raise max_length in --model_args" if len(scored) else "a continuation with text of its own",
                )
            yield self._begin(shown), scored

    def _begin(self, tokens: Sequence[int] | NDArray[Any]) -> Ids:
        """Tokens as the beginning of a document; where nothing stands there, the boundary token does."""
        prefix = np.concatenate([self.engine.document_prefix, np.asarray(tokens, dtype=np.int64)])
        if len(prefix):
            return prefix
        self._warn_without_markers()
        return np.array([self.prefix_token_id])

    def _sampling(self, settings: dict[str, Any]) -> Sampling:
        found: dict[str, Any] = dict(normalize_gen_kwargs(settings, self.max_gen_toks))
        draws = found.pop("do_sample")
        # As in transformers, draws are at a temperature of 1 where none is named.
        temperature = found.pop("temperature", 1.0 if draws else 0.0)
        wanted = {
            "max_new_tokens": found.pop("max_gen_toks"),
            "temperature": temperature,
            "top_k": found.pop("top_k", None) or None,
            "top_p": found.pop("top_p", 1.0),
            "stop": tuple(found.pop("until")),
            "seed": self.sampling_seed,
        }
        for key, value in found.items():
            if key not in WITHOUT_EFFECT or value != WITHOUT_EFFECT[key]:
                raise UserError(
                    f"generation setting {key} = {value!r}",
                    "until, max_gen_toks, do_sample, temperature, top_k, top_p",
                    "take it out of the task or of --gen_kwargs",
                )
        return Sampling.parse(wanted, "generation")

    def _announce(self, kind: str, cuts: Cuts, requests: int) -> None:
        total = self.truncated.setdefault(kind, Cuts())
        total.requests, total.tokens = total.requests + cuts.requests, total.tokens + cuts.tokens
        if cuts.requests:
            logger.warning(
                "%d of %d %s requests do not fit into max_length=%d: their beginning was cut off, %d tokens in all, "
                "%d at most",
                *(cuts.requests, requests, kind, self.max_length, cuts.tokens, cuts.most),
            )

    def _warn_without_markers(self) -> None:
        if not len(self.engine.document_prefix) and not self._warned:
            self._warned = True
            logger.warning(
                "documents begin without a marker for %s: the boundary token from which a text begins here may be one "
                "that it never saw, and then the first token of a text costs more than it should",
                self.engine.name,
            )


def _device(asked: str | None) -> str:
    """As asked for; the harness asks for CUDA by itself, so without it that means the CPU."""
    if asked is not None and asked.startswith("cuda") and not torch.cuda.is_available():
        logger.info("device %s is not here", asked)
        return "cpu"
    return asked or default_device()


def _check_names(select: Mapping[str, Any]) -> None:
    """A misspelt argument of this class would look like a selector."""
    arguments = [name for name in signature(LongspanLM).parameters if name != "select"]
    for key in select:
        if near := misspelt(key, arguments):
            allowed = f"{', '.join(arguments)}, and what the study varies"
            raise UserError(f"model argument `{key}`", allowed, f"did you mean `{near[0]}`?")


def _max_length(engine: NativeEngine, given: int | None) -> tuple[int, str]:
    limit = engine.context_limit
    if given is not None:
        if given < 1 or (limit is not None and given > limit):
            raise UserError(f"max_length = {given}", f"1 to {limit or 'any'}", "lower it" if given > 0 else "raise it")
        return given, "as asked for"
    if limit is not None:
        return limit, "the subject's limit"
    if engine.trained_context is not None:
        return engine.trained_context, "the context of its training; max_length=N changes it"
    return UNKNOWN_CONTEXT, "the harness's default; max_length=N changes it"


def _calls(items: Iterable[Item], size: Callable[[Item], int], most: int) -> Iterator[list[Item]]:
    """The items in order, in lists of about so many tokens."""
    batch: list[Item] = []
    held = 0
    for item in items:
        batch.append(item)
        held += size(item)
        if held >= most:
            yield batch
            batch, held = [], 0
    if batch:
        yield batch


def _short(text: str) -> str:
    return repr(text if len(text) <= 40 else f"…{text[-40:]}")
