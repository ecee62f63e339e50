"""Runs a Longspan model for probes: batched by length, long sequences in chunks with carried state, no logits kept.

Legend: B rows, T tokens, D width, V vocabulary.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from longspan.corpus.tokenizer import Tokenizer
from longspan.engines.base import (
    Capability,
    Generation,
    HandedOver,
    LargestBatch,
    Sampling,
    Scored,
    Tokens,
    require_finite,
)
from longspan.engines.batched_generation import BatchedGeneration
from longspan.engines.batching import by_length, stack
from longspan.engines.generation import Continuation, synchronise
from longspan.engines.graphs import Graphs
from longspan.engines.in_process import InProcessEngine
from longspan.engines.prefix_tree import SHARED_TOKENS, Fork, count_tokens, parted, prefix_tree, walk
from longspan.engines.room import largest_native_batch
from longspan.foundation.errors import UserError
from longspan.models.language_model import IGNORE, LanguageModel
from longspan.models.matrix_layout import lay_out_for_decoding
from longspan.models.segments import Isolation
from longspan.models.state import ModelState
from longspan.ops.linear_cross_entropy import linear_cross_entropy

Dtype = Literal["fp32", "bf16"]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
COPIED_TOKENS = 65_536
"""Most positions whose state is copied at a time for continuations of shared prefixes."""


class NativeEngine(InProcessEngine):
    """A Longspan model.

    Attributes:
        mixers: the true mixers, e.g. `2 attention, 2 mamba2`.
        num_parameters: of the model, shared ones counted once.
        device: where it runs.
        trained_context: tokens of a training row, None where that is not known.
        dtype: of the computation.
        batch_tokens: most positions in one forward pass.

    Answers to the same batch of requests are the same bytes each time; another grouping may round differently.
    """

    capabilities: frozenset[Capability] = frozenset({"nll", "score", "generate", "predict"})

    def __init__(
        self,
        model: LanguageModel,
        tokenizer: Tokenizer,
        *,
        markers: bool,
        isolation: Isolation,
        fingerprint: str,
        device: torch.device | str = "cpu",
        dtype: Dtype = "fp32",
        batch_tokens: int = 8_192,
        trained_context: int | None = None,
        end_tokens: frozenset[int] = frozenset(),
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
            trained_context: tokens of a training row, where that is known.
            end_tokens: ids beside the boundary token with which it ends a document.
            name: for people; default the model's pattern.

        Raises:
            UserError: an unknown dtype, or a tokenizer with more entries than the model has rows.
        """
        compute = torch_dtype(dtype)
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
        self.mixers = model.config.describe_mixers()
        self.trained_context = trained_context
        self.end_tokens = end_tokens
        self.dtype = dtype
        self.num_parameters = sum(parameter.numel() for parameter in model.parameters())
        self.device = torch.device(device)
        self._dtype = compute
        self._model = model.to(self.device).eval()
        if self._dtype != torch.float32:
            self._model.cast(self._dtype)
        elif self.device.type == "cpu":
            lay_out_for_decoding(self._model)
        self.batch_tokens = batch_tokens
        self._graphs = Graphs(self._model)
        if self._model.handover is not None:
            self.handed_over = HandedOver(self._model.handover.at, self._model.handed_over_bits() or 0)

    @torch.inference_mode()
    def nll(self, sequences: Sequence[Tokens], doc_ids: Sequence[Tokens] | None = None) -> list[NDArray[np.float64]]:
        """See `Engine.nll`."""
        for i, sequence in enumerate(sequences):
            self._check_length(len(sequence) - 1, f"sequence {i}")
            if doc_ids is not None and len(doc_ids[i]) != len(sequence):
                given = f"{len(doc_ids[i])} document ids for the {len(sequence)} tokens of sequence {i}"
                raise UserError(given, "one id per token", "cut both the same way")
        answers: list[NDArray[np.float64]] = [np.empty(0)] * len(sequences)
        for batch in by_length([len(sequence) - 1 for sequence in sequences], self.batch_tokens):
            inputs_BT = stack([sequences[i][:-1] for i in batch], self.tokenizer.special.pad)
            targets_BT = stack([sequences[i][1:] for i in batch], IGNORE)
            doc_BT = None if doc_ids is None else stack([doc_ids[i][:-1] for i in batch], -1).int()
            nll_BT = self._token_nll(inputs_BT, targets_BT, doc_BT)
            for row, i in enumerate(batch):
                values = nll_BT[row, : len(sequences[i]) - 1]
                answers[i] = require_finite(values, self.name, f"sequence {i}")
        return answers

    @torch.inference_mode()
    def score_greedy(self, prefixes: Sequence[Tokens], continuations: Sequence[Sequence[Tokens]]) -> list[list[Scored]]:
        """`score_many` that also says whether greedy decoding would write each continuation.

        A prefix with several continuations is computed once; one with a single continuation goes through with it,
        beside others of similar length.
        """
        self._check_requests(prefixes, continuations)
        answers: list[list[Scored]] = [[] for _ in prefixes]
        alone = [i for i, choices in enumerate(continuations) if len(choices) == 1]
        whole = [np.concatenate([prefixes[i], continuations[i][0]]) for i in alone]
        for batch in by_length([len(sequence) - 1 for sequence in whole], self.batch_tokens):
            inputs_BT = stack([whole[row][:-1] for row in batch], self.tokenizer.special.pad)
            targets_BT = stack([whole[row][1:] for row in batch], IGNORE)
            for row, place in enumerate(batch):
                targets_BT[row, : len(prefixes[alone[place]]) - 1] = IGNORE
            nll_BT, right_BT = self._judge(inputs_BT, targets_BT)
            counted_BT = (targets_BT != IGNORE).numpy()
            for row, place in enumerate(batch):
                i, counted = alone[place], counted_BT[row]
                answers[i] = [self._scored(nll_BT[row, counted], right_BT[row, counted], i)]
        several = [i for i, choices in enumerate(continuations) if len(choices) > 1]
        for i, scored in self._after_prefixes(several, prefixes, continuations):
            answers[i] = scored
        return answers

    @torch.inference_mode()
    def predict(self, sequences: Sequence[Tokens], wanted: Sequence[NDArray[np.bool_]]) -> list[NDArray[np.int64]]:
        """See `Engine.predict`."""
        for i, sequence in enumerate(sequences):
            self._check_length(len(sequence), f"sequence {i}")
        answers: list[NDArray[np.int64]] = [np.empty(0, np.int64)] * len(sequences)
        for batch in by_length([len(sequence) for sequence in sequences], self.batch_tokens):
            inputs_BT = stack([sequences[i] for i in batch], self.tokenizer.special.pad)
            wanted_BT = stack([wanted[i] for i in batch], 0).bool()
            state = self._model.initial_state() if inputs_BT.shape[1] > self.batch_tokens else None
            found = np.zeros(inputs_BT.shape, np.int64)
            for start in range(0, inputs_BT.shape[1], self.batch_tokens):
                span = slice(start, start + self.batch_tokens)
                hidden_BTD, state = self._model(inputs_BT[:, span].to(self.device), None, state)
                chosen_BT = wanted_BT[:, span]
                hidden_ND = hidden_BTD[chosen_BT.to(self.device)]
                require_finite(hidden_ND.double().sum(-1).cpu().numpy(), self.name, "what it computes of a string")
                likeliest_N = self._model.likeliest(hidden_ND, self.tokenizer.vocab_size)
                found[:, span][chosen_BT.numpy()] = likeliest_N.cpu().numpy()
            for row, i in enumerate(batch):
                answers[i] = found[row, : len(sequences[i])][wanted[i]]
        return answers

    def generate(
        self, prompts: Sequence[Tokens], sampling: Sampling, given: Sequence[Tokens] | None = None
    ) -> list[Generation]:
        """See `Engine.generate`. Several prompts go through together, beside others of similar length."""
        if len(prompts) == 1 and given is None:
            self.asked_tokens += len(prompts[0])
            continuation = self.continue_text(prompts[0], sampling)
            for _ in continuation:
                pass
            return [continuation.result()]
        return super().generate(prompts, sampling, given)

    def continue_text(self, prompt: Tokens, sampling: Sampling, *, index: int = 0) -> Continuation:
        """`generate` for one prompt, to be watched: iterate over the text as it comes, then ask for `result()`."""
        self._check_length(len(prompt), f"prompt {index}")
        prompt_BT = stack([prompt], 0).to(self.device)
        return Continuation(
            self, self._model, prompt_BT, sampling, index=index, chunk=self.batch_tokens, graphs=self._graphs
        )

    @property
    def module(self) -> LanguageModel:
        """The model itself, for looking at."""
        return self._model

    def drop_graphs(self) -> None:
        """Before weights move: a captured step reads them where they were."""
        self._graphs.drop()

    def state_bytes(self, context: int) -> int:
        """See `Engine.state_bytes`."""
        size = torch.empty(0, dtype=self._dtype).element_size()
        return sum(block.mixer.state_bytes(context, size) for block in self._model.blocks)

    def largest_batch(self, context: int) -> LargestBatch | None:
        """See `Engine.largest_batch`; found on CUDA by trying."""
        return largest_native_batch(self._model, self._graphs, context) if self.device.type == "cuda" else None

    def _token_nll(self, inputs_BT: Tensor, targets_BT: Tensor, doc_BT: Tensor | None) -> NDArray[np.float64]:
        length = inputs_BT.shape[1]
        state = self._model.initial_state() if length > self.batch_tokens else None
        parts = []
        for start in range(0, length, self.batch_tokens):
            span = slice(start, start + self.batch_tokens)
            part_BT, state = self._model.token_nll(
                inputs_BT[:, span].to(self.device),
                targets_BT[:, span].to(self.device),
                None if doc_BT is None else doc_BT[:, span],
                self.isolation if doc_BT is not None else "full",
                state,
            )
            parts.append(part_BT.double().cpu().numpy())
        return np.concatenate(parts, axis=1)

    def _after_prefixes(
        self, chosen: Sequence[int], prefixes: Sequence[Tokens], continuations: Sequence[Sequence[Tokens]]
    ) -> Iterator[tuple[int, list[Scored]]]:
        """The chosen requests with their answers; what prefixes share goes through once, equal lengths together."""
        asked, choices = [prefixes[i] for i in chosen], [continuations[i] for i in chosen]
        tree, forks = self._forks(asked)
        count_tokens(self, tree, asked)
        for fork, (state, _) in forks:
            for place, scored in self._scored_from(fork.end, fork.leaves, asked, choices, state):
                yield chosen[place], scored
            del state

    @torch.inference_mode()
    def _ask(
        self,
        prompts: Sequence[Tokens],
        sampling: Sampling,
        given: Sequence[Tokens] | None,
        prefixes: Sequence[Tokens],
        continuations: Sequence[Sequence[Tokens]],
    ) -> tuple[list[Generation], list[list[NDArray[np.float64]]]]:
        """What is written after prompts, and the likelihoods after prefixes; what they share goes through once."""
        sequences = [*prompts, *prefixes]
        tree, forks = self._forks(sequences)
        shared = count_tokens(self, tree, sequences)
        batched = BatchedGeneration(
            self, self._model, self.device, sampling, chunk=self.batch_tokens, graphs=self._graphs
        )
        written: dict[int, Generation] = {}
        scores: dict[int, list[Scored]] = {}
        for fork, (state, seconds) in forks:
            first, then = parted(fork.leaves, len(prompts))
            written |= batched.continue_from(fork.end, first, prompts, given, state, seconds)
            scores |= dict(self._scored_from(fork.end, then, prefixes, continuations, state))
            del state
        return (
            [replace(written[i], shared_tokens=shared[i]) for i in range(len(prompts))],
            [[each.nll for each in scores[i]] for i in range(len(prefixes))],
        )

    def _forks(self, sequences: Sequence[Tokens]) -> tuple[Fork, Iterator[tuple[Fork, tuple[ModelState, float]]]]:
        """The common beginnings of sequences, and the state after each with the seconds that a cold one takes."""
        tree = prefix_tree(sequences, SHARED_TOKENS[self.device.type])

        def go_on(before: tuple[ModelState, float], fork: Fork, needed: bool) -> tuple[ModelState, float]:
            del needed
            synchronise(self.device)
            began = time.perf_counter()
            state = self._prefill([sequences[fork.sequence][fork.start : fork.end]], before[0])
            synchronise(self.device)
            return state, before[1] + time.perf_counter() - began

        return tree, walk(tree, (self._model.initial_state(), 0.0), go_on)

    def _scored_from(
        self,
        read: int,
        places: Sequence[int],
        prefixes: Sequence[Tokens],
        continuations: Sequence[Sequence[Tokens]],
        state: ModelState,
    ) -> Iterator[tuple[int, list[Scored]]]:
        """Some of the requests with their answers, on from the state after `read` tokens of their prefixes."""
        lengths: dict[int, list[int]] = defaultdict(list)
        for i in places:
            lengths[len(prefixes[i])].append(i)
        for length, same in lengths.items():
            rows = max(1, self.batch_tokens // (length - read))
            if read:
                # Every row needs a copy of the state.
                rows = max(1, min(rows, COPIED_TOKENS // length))
            for start in range(0, len(same), rows):
                batch = same[start : start + rows]
                here = state.expand(len(batch)) if read and len(batch) > 1 else state
                # The last token of a prefix goes through with every continuation, so that its hidden state, from which
                # the first token is predicted, need not be kept beside the state.
                here = self._prefill([prefixes[i][read:-1] for i in batch], here)
                yield from self._continued(batch, here, prefixes, continuations)
                del here

    def _prefill(self, pieces: Sequence[Tokens], state: ModelState) -> ModelState:
        """The state after pieces of one length."""
        pieces_BT = stack(pieces, 0)
        for start in range(0, pieces_BT.shape[1], self.batch_tokens):
            _, after = self._model(pieces_BT[:, start : start + self.batch_tokens].to(self.device), None, state)
            assert after is not None
            state = after
        return state

    def _continued(
        self,
        batch: Sequence[int],
        state: ModelState,
        prefixes: Sequence[Tokens],
        continuations: Sequence[Sequence[Tokens]],
    ) -> Iterator[tuple[int, list[Scored]]]:
        pairs = [(row, choice) for row, i in enumerate(batch) for choice in continuations[i]]
        # Every continuation needs a copy of its prefix's state.
        most = max(1, COPIED_TOKENS // (len(prefixes[batch[0]]) + max(len(choice) for _, choice in pairs)))
        scored: dict[int, list[Scored]] = {i: [] for i in batch}
        for start in range(0, len(pairs), most):
            part = pairs[start : start + most]
            inputs = [np.append(prefixes[batch[row]][-1:], choice[:-1]) for row, choice in part]
            inputs_BT, targets_BT = (
                stack(inputs, self.tokenizer.special.pad),
                stack([choice for _, choice in part], IGNORE),
            )
            copies = state.select(torch.tensor([row for row, _ in part])) if state.length else state
            nll_BT, right_BT = self._judge(inputs_BT, targets_BT, copies)
            for place, (row, choice) in enumerate(part):
                span = slice(len(choice))
                scored[batch[row]].append(self._scored(nll_BT[place, span], right_BT[place, span], batch[row]))
        yield from scored.items()

    def _scored(self, nll: NDArray[np.float64], right: NDArray[np.bool_], request: int) -> Scored:
        return Scored(require_finite(nll, self.name, f"a continuation of request {request}"), bool(right.all()))

    def _judge(
        self, inputs_BT: Tensor, targets_BT: Tensor, state: ModelState | None = None
    ) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
        """NLL of every target and whether it is the likeliest token, (B, T); 0 and True where there is no target."""
        length, weight = inputs_BT.shape[1], self._model.head_weight
        if state is None and length > self.batch_tokens:
            state = self._model.initial_state()
        nll_BT = np.zeros(inputs_BT.shape)
        right_BT = np.ones(inputs_BT.shape, dtype=np.bool_)
        for start in range(0, length, self.batch_tokens):
            span = slice(start, start + self.batch_tokens)
            hidden_BTD, state = self._model(inputs_BT[:, span].to(self.device), None, state)
            counted_BT = targets_BT[:, span] != IGNORE
            if not bool(counted_BT.any()):
                continue
            hidden_ND = hidden_BTD[counted_BT.to(self.device)]
            targets_N = targets_BT[:, span][counted_BT].to(self.device)
            nll_N = linear_cross_entropy(hidden_ND, weight, targets_N, ignore=IGNORE, reduction="none")
            # Rows beyond the tokenizer's vocabulary stand for nothing, here as in generation.
            likeliest_N = self._model.likeliest(hidden_ND, self.tokenizer.vocab_size)
            counted = counted_BT.numpy()
            nll_BT[:, span][counted] = nll_N.double().cpu().numpy()
            right_BT[:, span][counted] = (likeliest_N == targets_N).cpu().numpy()
        return nll_BT, right_BT


def torch_dtype(name: str) -> torch.dtype:
    """`fp32` or `bf16` as torch knows it.

    Raises:
        UserError: another name.
    """
    if name not in DTYPES:
        raise UserError(f"dtype = {name!r}", ", ".join(DTYPES), "choose one of these")
    return DTYPES[name]
