"""Runs any causal language model of transformers for probes, in the ways that give what the whole text gives.

Legend: B rows, T tokens, D width of hidden states, V vocabulary, N positions.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from longspan.corpus.tokenizer import Tokenizer
from longspan.engines.base import (
    Capability,
    Generation,
    LargestBatch,
    Prompting,
    Sampling,
    Tokens,
    require_finite,
)
from longspan.engines.batching import alone, by_length, stack
from longspan.engines.causal_generation import CausalGeneration
from longspan.engines.causal_model import CausalModel, mark, restore, select
from longspan.engines.generation import synchronise
from longspan.engines.in_process import InProcessEngine
from longspan.engines.prefix_tree import SHARED_TOKENS, Fork, count_tokens, parted, prefix_tree, walk
from longspan.engines.room import BATCH_STEPS, guessed_rows, search
from longspan.engines.state_shapes import StateShape
from longspan.foundation.errors import UserError
from longspan.foundation.randomness import torch_generator

IGNORE = -100
PART_TOKENS = 4_096
"""Positions of a forward pass: the mask of a part over 131,072 tokens takes half a gigabyte at this."""
COPIED_TOKENS = 65_536
"""Most positions whose state is copied at a time for continuations of a shared prefix."""
ONE_ROW = torch.zeros(1, dtype=torch.int64)


class TransformersEngine(InProcessEngine):
    """A causal language model of transformers.

    Attributes:
        model: with its ways, see `CausalModel`.
        batch_tokens: most positions in one forward pass where it takes a text in parts.
        shape: of its state by its configuration, None where that is not known.
        num_parameters: of the model, shared ones counted once.
        trained_context: tokens that it was made for, None where that is not known.

    Packed documents are computed one by one, so that nothing crosses a boundary (isolation `full`).
    """

    capabilities: frozenset[Capability] = frozenset({"nll", "score", "generate"})
    isolation: Literal["full", "attention", "state", "none"] = "full"

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Tokenizer,
        *,
        markers: bool,
        fingerprint: str,
        prompting: Prompting | None = None,
        context_limit: int | None = None,
        trained_context: int | None = None,
        end_tokens: frozenset[int] = frozenset(),
        batch_tokens: int = PART_TOKENS,
        name: str = "",
    ) -> None:
        """Take a model over and find out how it may be called.

        Args:
            model: a causal language model of transformers, on its device.
            tokenizer: the model's own.
            markers: whether a boundary token precedes each document.
            fingerprint: of the weights and all else that determines answers.
            prompting: how texts become prompts; None: as they are.
            context_limit: most tokens it can take in.
            trained_context: tokens that it was made for.
            end_tokens: ids beside the boundary token with which it ends a document.
            batch_tokens: most positions in one forward pass.
            name: for people.

        Raises:
            UserError: a tokenizer with more entries than the model has rows.
        """
        self.model = CausalModel(model)
        self.device = self.model.device
        if self.model.vocab_size < tokenizer.vocab_size:
            raise UserError(
                f"a model with {self.model.vocab_size} rows for the tokenizer {tokenizer.name}",
                f"at least {tokenizer.vocab_size} rows",
                "use the model's own tokenizer",
            )
        self.name = name or type(model).__name__
        self.tokenizer = tokenizer
        self.document_prefix = np.array([tokenizer.special.boundary] if markers else [], dtype=np.int64)
        self.fingerprint = fingerprint
        self.prompting = prompting
        self.context_limit = context_limit
        self.trained_context = trained_context
        self.end_tokens = end_tokens
        self.batch_tokens = batch_tokens
        self.num_parameters = sum(parameter.numel() for parameter in model.parameters())
        self.shape = StateShape.of(self.model.model.config)
        self.weight_bytes = sum(p.numel() * p.element_size() for p in model.parameters())
        self.rereads = not self.model.returns_state
        self.notes = tuple(self.model.notes)

    @torch.inference_mode()
    def nll(self, sequences: Sequence[Tokens], doc_ids: Sequence[Tokens] | None = None) -> list[NDArray[np.float64]]:
        """See `Engine.nll`."""
        for i, sequence in enumerate(sequences):
            self._check_length(len(sequence) - 1, f"sequence {i}")
        if doc_ids is None:
            return self._nll_of(sequences)
        pieces = alone(sequences, doc_ids)
        answers = [np.zeros(len(sequence) - 1) for sequence in sequences]
        for (row, start, tokens), values in zip(pieces, self._nll_of([piece[2] for piece in pieces]), strict=True):
            answers[row][start : start + len(tokens) - 1] = values
        return answers

    @torch.inference_mode()
    def nll_by(self, tokens: Tokens, part: int) -> NDArray[np.float64]:
        """`nll` of one sequence that goes through in parts of so many tokens, whether that is right or not."""
        targets_BT = stack([tokens[1:]], IGNORE)
        (nll,) = self._token_nll(stack([tokens[:-1]], 0), targets_BT, part)
        values: NDArray[np.float64] = nll
        return values

    @torch.inference_mode()
    def nll_padded(self, tokens: Tokens, padding: int) -> NDArray[np.float64]:
        """`nll` of one sequence with masked tokens before it, as a batch of unlike prompts would have them."""
        front = torch.zeros((1, padding), dtype=torch.int64)
        tokens_BT = torch.cat([front, stack([tokens[:-1]], 0)], 1)
        mask_BT = torch.cat([front, torch.ones((1, len(tokens) - 1), dtype=torch.int64)], 1)
        hidden_BTD, _ = self.model.padded(tokens_BT, mask_BT, keep=False)
        nll_N = self.model.nll(hidden_BTD[0, padding:], torch.from_numpy(np.asarray(tokens[1:], np.int64)))
        values: NDArray[np.float64] = nll_N.double().cpu().numpy()
        return values

    @torch.inference_mode()
    def timed(self, prompt: Tokens, sampling: Sampling) -> Generation:
        """See `Engine.timed`; with the model's cache whether or not what follows is the same as without."""
        self._check_length(len(prompt), "the prompt")
        with self.model.as_called():
            return self._ask([prompt], sampling, None, [], [])[0][0]

    def steps_after(self, context: int, new_tokens: int) -> Callable[[int], float]:
        """Mean seconds of a decoding step by the number of sequences, each after the same `context` random tokens.

        Raises:
            UserError: it returns no state.
            torch.cuda.OutOfMemoryError: the device has not enough memory for them.
        """
        if not self.model.returns_state:
            raise UserError(f"{self.name} keeps no state", "models that do", "measure one sequence at a time")
        generator = torch_generator(0, "steps_after", context)
        prompt_BT = torch.randint(0, self.tokenizer.vocab_size, (1, context), generator=generator)
        with torch.inference_mode(), self.model.as_called():
            one = self._prefill(prompt_BT)[1]

        @torch.inference_mode()
        def seconds_per_step(rows: int) -> float:
            state = select(one, torch.zeros(rows, dtype=torch.int64), share=False)
            token_BT = prompt_BT[:, -1:].expand(rows, 1)
            hidden_B1D, state = self.model.hidden(token_BT, state, keep=True)
            synchronise(self.device)
            began = time.perf_counter()
            for _ in range(new_tokens):
                token_BT = self.model.logits(hidden_B1D[:, -1:]).argmax(-1)
                hidden_B1D, state = self.model.hidden(token_BT, state, keep=True)
            synchronise(self.device)
            return (time.perf_counter() - began) / new_tokens

        return seconds_per_step

    def largest_batch(self, context: int) -> LargestBatch | None:
        """See `Engine.largest_batch`; found on CUDA by trying, since running out of memory there does no harm."""
        if self.device.type != "cuda" or not self.model.returns_state:
            return None
        seconds_per_step, row = self.steps_after(context, BATCH_STEPS), self.state_bytes(context)
        return search(seconds_per_step, 1 if row is None else guessed_rows(self.device, row))

    def state_bytes(self, context: int) -> int | None:
        """See `Engine.state_bytes`."""
        if self.shape is None or not self.model.returns_state:
            return None
        return self.shape.bytes(context, self.model.dtype.itemsize)

    # --- shared beginnings --------------------------------------------------------------------------------------------

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
        tree = prefix_tree(sequences, SHARED_TOKENS[self.device.type] if self.model.takes_parts else None)
        shared = count_tokens(self, tree, sequences)

        def go_on(before: tuple[Any, float], fork: Fork, needed: bool) -> tuple[Any, float]:
            synchronise(self.device)
            began = time.perf_counter()
            state = select(before[0], ONE_ROW) if needed and before[0] is not None else before[0]
            _, state = self._prefill(stack([sequences[fork.sequence][fork.start : fork.end]], 0), state)
            synchronise(self.device)
            return state, before[1] + time.perf_counter() - began

        causal = CausalGeneration(self, self.model, sampling, chunk=self.batch_tokens)
        written: dict[int, Generation] = {}
        scores: list[list[NDArray[np.float64]]] = [[] for _ in prefixes]
        nothing: tuple[Any, float] = (None, 0.0)
        for fork, (state, seconds) in walk(tree, nothing, go_on):
            first, then = parted(fork.leaves, len(prompts))
            written |= causal.continue_from(fork.end, first, prompts, given, state, seconds)
            for i in then:
                scored = self._scored(prefixes[i], continuations[i], state, fork.end)
                scores[i] = [require_finite(nll, self.name, f"a continuation of request {i}") for nll in scored]
            del state
        return [replace(written[i], shared_tokens=shared[i]) for i in range(len(prompts))], scores

    def _scored(self, prefix: Tokens, choices: Sequence[Tokens], state: Any, read: int) -> list[NDArray[np.float64]]:
        if self.model.keeps_state and len(prefix) > 1:
            return self._after(prefix, choices, state, read)
        whole = self._nll_of([np.concatenate([prefix, choice]) for choice in choices])
        return [nll[len(prefix) - 1 :] for nll in whole]

    # --- likelihoods --------------------------------------------------------------------------------------------------

    def _nll_of(self, sequences: Sequence[Tokens]) -> list[NDArray[np.float64]]:
        answers: list[NDArray[np.float64]] = [np.empty(0)] * len(sequences)
        for batch in by_length([len(sequence) - 1 for sequence in sequences], self.batch_tokens):
            inputs_BT = stack([sequences[i][:-1] for i in batch], 0)
            targets_BT = stack([sequences[i][1:] for i in batch], IGNORE)
            part = self.batch_tokens if self.model.takes_parts else inputs_BT.shape[1]
            nll_BT = self._token_nll(inputs_BT, targets_BT, part)
            for row, i in enumerate(batch):
                answers[i] = require_finite(nll_BT[row, : len(sequences[i]) - 1], self.name, f"sequence {i}")
        return answers

    def _token_nll(self, inputs_BT: Tensor, targets_BT: Tensor, part: int) -> NDArray[np.float64]:
        """(B, T) nats, 0 where there is no target."""
        self._check_logits(min(part, inputs_BT.shape[1]) * len(inputs_BT))
        nll_BT = np.zeros(inputs_BT.shape)
        for start, hidden_BTD, _ in self._parts(inputs_BT, part):
            span = slice(start, start + hidden_BTD.shape[1])
            counted_BT = targets_BT[:, span] != IGNORE
            if bool(counted_BT.any()):
                nll_N = self.model.nll(hidden_BTD[counted_BT.to(self.device)], targets_BT[:, span][counted_BT])
                nll_BT[:, span][counted_BT.numpy()] = nll_N.double().cpu().numpy()
        return nll_BT

    def _parts(
        self, tokens_BT: Tensor, part: int, state: Any = None, *, keep: bool = False
    ) -> Iterator[tuple[int, Tensor, Any]]:
        """(start, hidden states, state) of each part; the state given may be changed."""
        length = tokens_BT.shape[1]
        for start in range(0, length, part):
            more = keep or start + part < length
            hidden_BTD, state = self.model.hidden(tokens_BT[:, start : start + part], state, keep=more)
            yield start, hidden_BTD, state

    def _prefill(self, tokens_BT: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        """The last hidden state (B, 1, D) and the state after the tokens; the state given may be changed."""
        hidden_B1D = None
        part = self.batch_tokens if self.model.takes_parts else tokens_BT.shape[1]
        for _, hidden_BTD, after in self._parts(tokens_BT, part, state, keep=self.model.keeps_state):
            hidden_B1D, state = hidden_BTD[:, -1:], after
        assert hidden_B1D is not None
        return hidden_B1D, state

    def _after(self, prefix: Tokens, choices: Sequence[Tokens], state: Any, read: int) -> list[NDArray[np.float64]]:
        """Nats of every token of the choices, on from a copy of the state after the first `read` tokens."""
        state = None if state is None else select(state, ONE_ROW)
        # The last token of the prefix goes through with every continuation, so that its hidden state, from which the
        # first token is predicted, need not be kept beside the state.
        if read < len(prefix) - 1:
            _, state = self._prefill(stack([prefix[read:-1]], 0), state)
        order = sorted(range(len(choices)), key=lambda i: len(choices[i]))
        longest = len(choices[order[-1]])
        most = max(1, COPIED_TOKENS // (len(prefix) + longest))
        scored: list[NDArray[np.float64]] = [np.empty(0)] * len(choices)
        marked = mark(state)
        for start in range(0, len(order), most):
            batch = order[start : start + most]
            restore(marked)
            here = state if len(batch) == 1 else select(state, torch.zeros(len(batch), dtype=torch.int64))
            inputs_BT = stack([np.append(prefix[-1:], choices[i][:-1]) for i in batch], 0)
            targets_BT = stack([choices[i] for i in batch], IGNORE)
            nll_BT = self._continued(inputs_BT, targets_BT, here)
            for row, i in enumerate(batch):
                scored[i] = nll_BT[row, : len(choices[i])]
        return scored

    def _continued(self, inputs_BT: Tensor, targets_BT: Tensor, state: Any) -> NDArray[np.float64]:
        length = inputs_BT.shape[1]
        part = max(1, self.batch_tokens // len(inputs_BT)) if self.model.takes_parts else 1
        nll_BT = np.zeros(inputs_BT.shape)
        for start in range(0, length, part):
            span = slice(start, start + part)
            hidden_BTD, state = self.model.hidden(inputs_BT[:, span], state, keep=True)
            counted_BT = targets_BT[:, span] != IGNORE
            nll_N = self.model.nll(hidden_BTD[counted_BT.to(self.device)], targets_BT[:, span][counted_BT])
            nll_BT[:, span][counted_BT.numpy()] = nll_N.double().cpu().numpy()
        return nll_BT

    def _check_logits(self, positions: int) -> None:
        """Without a head, logits of all positions of a pass exist at once: never of more than a batch."""
        if not self.model.head_found and positions > self.batch_tokens:
            raise UserError(
                f"{positions} positions at once for {self.name}, whose head is not found and which takes no parts",
                f"at most {self.batch_tokens}: the logits of all of them exist at once",
                "ask it with a shorter context",
            )
