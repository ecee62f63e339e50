"""Runs a Longspan model for probes: batched by length, long sequences in chunks with carried state, no logits kept.

Legend: B rows, T tokens, D width, V vocabulary.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from longspan.corpus.tokenizer import Tokenizer
from longspan.engines.base import Capability, Engine, Generation, Sampling, Tokens, require_finite
from longspan.engines.generation import generate
from longspan.foundation.errors import UserError
from longspan.models.language_model import IGNORE, LanguageModel
from longspan.models.segments import Isolation

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class NativeEngine(Engine):
    """A Longspan model.

    Answers to the same batch of requests are the same bytes each time; another grouping may round differently.
    """

    capabilities: frozenset[Capability] = frozenset({"nll", "score", "generate"})

    def __init__(
        self,
        model: LanguageModel,
        tokenizer: Tokenizer,
        *,
        markers: bool,
        isolation: Isolation,
        fingerprint: str,
        device: torch.device | str = "cpu",
        dtype: Literal["fp32", "bf16"] = "fp32",
        batch_tokens: int = 8_192,
        name: str = "",
    ) -> None:
        """Take the model over: it is moved to the device, cast and set to evaluation.

        Args:
            model: trained or not.
            tokenizer: the one it was trained with.
            markers: whether a boundary token precedes each document.
            isolation: as in training; used where `doc_ids` are given.
            fingerprint: of the weights and all else that determines answers.
            device: where it runs.
            dtype: of the computation; parameters that a mixer keeps in fp32 stay so.
            batch_tokens: most positions in one forward pass; longer sequences go through in chunks of it.
            name: for people; default the model's pattern.
        """
        if dtype not in DTYPES:
            raise UserError(f"dtype = {dtype!r}", ", ".join(DTYPES), "choose one of these")
        if model.vocab_size < tokenizer.vocab_size:
            raise UserError(
                f"a model with {model.vocab_size} rows for the tokenizer {tokenizer.name}",
                f"at least {tokenizer.vocab_size} rows",
                "use the tokenizer that the model was trained with",
            )
        self.name = name or model.config.pattern
        self.tokenizer = tokenizer
        self.document_prefix = np.array([tokenizer.special.boundary] if markers else [], dtype=np.int64)
        self.isolation = isolation
        self.fingerprint = fingerprint
        self.context_limit = model.config.max_positions if model.position_embedding is not None else None
        self._device = torch.device(device)
        self._dtype = DTYPES[dtype]
        self._model = model.to(self._device).eval()
        if self._dtype != torch.float32:
            self._model.cast(self._dtype)
        self._batch_tokens = batch_tokens

    @torch.inference_mode()
    def nll(self, sequences: Sequence[Tokens], doc_ids: Sequence[Tokens] | None = None) -> list[NDArray[np.float64]]:
        """See `Engine.nll`."""
        for i, sequence in enumerate(sequences):
            self._check_length(len(sequence) - 1, f"sequence {i}")
            if doc_ids is not None and len(doc_ids[i]) != len(sequence):
                given = f"{len(doc_ids[i])} document ids for the {len(sequence)} tokens of sequence {i}"
                raise UserError(given, "one id per token", "cut both the same way")
        answers: list[NDArray[np.float64]] = [np.empty(0)] * len(sequences)
        for batch in self._by_length([len(sequence) - 1 for sequence in sequences]):
            inputs_BT = _stack([sequences[i][:-1] for i in batch], self.tokenizer.special.pad)
            targets_BT = _stack([sequences[i][1:] for i in batch], IGNORE)
            doc_BT = None if doc_ids is None else _stack([doc_ids[i][:-1] for i in batch], -1).int()
            nll_BT = self._token_nll(inputs_BT, targets_BT, doc_BT)
            for row, i in enumerate(batch):
                values = nll_BT[row, : len(sequences[i]) - 1]
                answers[i] = require_finite(values, self.name, f"sequence {i}")
        return answers

    @torch.inference_mode()
    def score_many(
        self, prefixes: Sequence[Tokens], continuations: Sequence[Sequence[Tokens]]
    ) -> list[list[NDArray[np.float64]]]:
        """See `Engine.score_many`. Prefixes of one length go through together."""
        lengths: dict[int, list[int]] = defaultdict(list)
        for i, (prefix, choices) in enumerate(zip(prefixes, continuations, strict=True)):
            if len(prefix) < 1:
                raise UserError(f"request {i} has no prefix", "at least one token", "begin with `document_prefix`")
            if not choices or any(len(choice) < 1 for choice in choices):
                raise UserError(f"request {i} has an empty continuation", "at least one token each", "drop it")
            self._check_length(len(prefix) + max(map(len, choices)) - 1, f"request {i}")
            lengths[len(prefix)].append(i)
        answers: list[list[NDArray[np.float64]]] = [[] for _ in prefixes]
        for length, same in lengths.items():
            rows = max(1, self._batch_tokens // length)
            for start in range(0, len(same), rows):
                batch = same[start : start + rows]
                scored = self._score_batch([prefixes[i] for i in batch], [continuations[i] for i in batch])
                for i, values in zip(batch, scored, strict=True):
                    answers[i] = [require_finite(v, self.name, f"a continuation of request {i}") for v in values]
        return answers

    @torch.inference_mode()
    def generate(self, prompts: Sequence[Tokens], sampling: Sampling) -> list[Generation]:
        """See `Engine.generate`. One prompt at a time, so that the timings are those of one request."""
        answers = []
        for i, prompt in enumerate(prompts):
            self._check_length(len(prompt), f"prompt {i}")
            prompt_BT = _stack([prompt], 0).to(self._device)
            answers.append(generate(self, self._model, prompt_BT, sampling, index=i, chunk=self._batch_tokens))
        return answers

    def state_bytes(self, context: int) -> int:
        """See `Engine.state_bytes`."""
        size = torch.empty(0, dtype=self._dtype).element_size()
        return sum(block.mixer.state_bytes(context, size) for block in self._model.blocks)

    def _token_nll(self, inputs_BT: Tensor, targets_BT: Tensor, doc_BT: Tensor | None) -> NDArray[np.float64]:
        length = inputs_BT.shape[1]
        state = self._model.initial_state() if length > self._batch_tokens else None
        parts = []
        for start in range(0, length, self._batch_tokens):
            span = slice(start, start + self._batch_tokens)
            part_BT, state = self._model.token_nll(
                inputs_BT[:, span].to(self._device),
                targets_BT[:, span].to(self._device),
                None if doc_BT is None else doc_BT[:, span],
                self.isolation if doc_BT is not None else "full",
                state,
            )
            parts.append(part_BT.double().cpu().numpy())
        return np.concatenate(parts, axis=1)

    def _score_batch(
        self, prefixes: Sequence[Tokens], continuations: Sequence[Sequence[Tokens]]
    ) -> list[list[NDArray[np.float64]]]:
        # The last token of the prefix goes through with every continuation, so that its hidden state, from which the
        # first token is predicted, need not be kept beside the state.
        state = self._model.initial_state()
        prefix_BT = _stack([prefix[:-1] for prefix in prefixes], 0)
        for start in range(0, prefix_BT.shape[1], self._batch_tokens):
            _, after = self._model(prefix_BT[:, start : start + self._batch_tokens].to(self._device), None, state)
            assert after is not None
            state = after
        owners = [row for row, choices in enumerate(continuations) for _ in choices]
        choices = [choice for several in continuations for choice in several]
        inputs = [np.append(prefixes[row][-1:], choice[:-1]) for row, choice in zip(owners, choices, strict=True)]
        inputs_BT, targets_BT = _stack(inputs, self.tokenizer.special.pad), _stack(choices, IGNORE)
        if prefix_BT.shape[1]:
            state = state.select(torch.tensor(owners))
        nll_BT, _ = self._model.token_nll(inputs_BT.to(self._device), targets_BT.to(self._device), None, state=state)
        values_BT = nll_BT.double().cpu().numpy()
        scored: list[list[NDArray[np.float64]]] = [[] for _ in prefixes]
        for row, owner in enumerate(owners):
            scored[owner].append(values_BT[row, : len(choices[row])])
        return scored

    def _by_length(self, lengths: Sequence[int]) -> Iterator[list[int]]:
        """Indices in batches of similar length with at most `batch_tokens` positions, padding included."""
        batch: list[int] = []
        for i in sorted(range(len(lengths)), key=lambda i: lengths[i]):
            if batch and (len(batch) + 1) * lengths[i] > self._batch_tokens:
                yield batch
                batch = []
            batch.append(i)
        if batch:
            yield batch

    def _check_length(self, num_inputs: int, what: str) -> None:
        if num_inputs < 1:
            raise UserError(
                f"{what} is too short", "at least 2 tokens for a likelihood, 1 for a prompt", "leave it out"
            )
        if self.context_limit is not None and num_inputs > self.context_limit:
            raise UserError(
                f"{what} shows {num_inputs} tokens to {self.name}",
                f"at most {self.context_limit} (learned positions)",
                "ask it with a shorter context",
            )


def _stack(rows: Sequence[Tokens], padding: int) -> Tensor:
    """int64 (B, T) on the CPU, short rows filled at the end: what comes later cannot change what came before."""
    out = np.full((len(rows), max(map(len, rows))), padding, dtype=np.int64)
    for row, tokens in enumerate(rows):
        out[row, : len(tokens)] = tokens
    return torch.from_numpy(out)
