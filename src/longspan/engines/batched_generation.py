"""Many prompts continued at once with one state cache: equal or different lengths, shared beginnings computed once.

Prompts of different lengths are padded in front. The padding is a document of its own, so that what keeps documents
apart in training keeps it from the prompts: each row is what it would be alone. Where steps replay a graph, rows that
ended stay in it until all have, and what they get counts for nothing.

Legend: B rows, T tokens, V vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from longspan.engines.base import OWN, Engine, FinishReason, Generation, Sampling, Tokens, require_finite
from longspan.engines.generation import pick, synchronise
from longspan.engines.graphs import Graphs
from longspan.engines.text_stream import TextStream
from longspan.foundation.randomness import torch_generator
from longspan.models.graphed_decoding import GraphedDecoding
from longspan.models.language_model import LanguageModel
from longspan.models.state import ModelState

BATCH_TOKENS = 65_536
"""Most positions, padding and new tokens included, whose state is held at a time."""
PADDED_SHARE, PADDED_TOKENS = 2, 32
"""Prompts more than so many times as long as the shortest of a batch, and so much more, go into the next one."""


class BatchedGeneration:
    """One call of `generate` for several prompts.

    Args:
        engine: whose tokenizer, name and context limit apply.
        model: in evaluation mode.
        device: where it runs.
        sampling: how; every prompt draws from a stream of its own, that of its place among the prompts.
        chunk: most positions in one forward pass.
        graphs: of the model.
    """

    def __init__(
        self,
        engine: Engine,
        model: LanguageModel,
        device: torch.device,
        sampling: Sampling,
        *,
        chunk: int,
        graphs: Graphs,
    ) -> None:
        self._engine, self._model, self._device = engine, model, device
        self._sampling, self._chunk, self._graphs = sampling, chunk, graphs

    def continue_from(
        self,
        read: int,
        places: Sequence[int],
        prompts: Sequence[Tokens],
        given: Sequence[Tokens] | None,
        state: ModelState,
        seconds: float,
    ) -> dict[int, Generation]:
        """Continue some of a call's prompts.

        Args:
            read: tokens that all of them share, and after which the state is.
            places: which of the prompts.
            prompts, given: see `Engine.generate`.
            state: of one row, before anything for any number of rows.
            seconds: that it took to get there, which every prompt would have waited for.
        """
        answers: dict[int, Generation] = {}
        # With padding in front a state would be handed over too early.
        padded = 0 if read or self._model.handover is not None else BATCH_TOKENS
        for batch in batches(prompts, places, self._sampling.max_new_tokens, padded):
            rows = Rows(self._engine, self._sampling, batch, [len(prompts[i]) for i in batch], given)
            here = state.expand(len(batch)) if read and len(batch) > 1 else state
            graphed = self._borrow(len(batch), max(len(prompts[i]) for i in batch))
            if graphed is not None and not read:
                here = graphed.initial_state()
            try:
                self._continue(rows, [prompts[i][read:] for i in batch], here, graphed, seconds)
            finally:
                self._graphs.give_back(self)
            del here
            answers |= rows.generations()
        return answers

    def _borrow(self, rows: int, longest: int) -> GraphedDecoding | None:
        new, limit = self._sampling.max_new_tokens, self._engine.context_limit
        if limit is not None and longest + new > limit:
            # The longest row ends there and the others, padded to its length, go on: there is no room for that.
            return None
        return self._graphs.borrow(self, rows, longest, new)

    def _continue(
        self,
        rows: Rows,
        prompts: Sequence[Tokens],
        state: ModelState,
        graphed: GraphedDecoding | None,
        seconds: float,
    ) -> None:
        began = self._now() - seconds
        tokens_BT, doc_BT = _padded(prompts)
        rows.padded = doc_BT is not None
        logits_BV, state = self._read(tokens_BT, doc_BT, state)
        steps = _Steps(self._model, len(prompts), state, graphed)
        del state
        while True:
            written = rows.pick(logits_BV)
            elapsed = self._now() - began
            kept = rows.take(written, elapsed, steps.bytes())
            if not len(kept):
                return
            logits_BV = steps.next(torch.from_numpy(kept), rows.to_read())

    def _read(self, tokens_BT: Tensor, doc_BT: Tensor | None, state: ModelState) -> tuple[Tensor, ModelState]:
        """The logits after the last token, (B, V)."""
        step = max(1, self._chunk // len(tokens_BT))
        hidden_BTD = None
        for start in range(0, tokens_BT.shape[1], step):
            span = slice(start, start + step)
            doc = None if doc_BT is None else doc_BT[:, span]
            hidden_BTD, after = self._model(tokens_BT[:, span].to(self._device), doc, state)
            assert after is not None
            state = after
        assert hidden_BTD is not None
        return self._model.logits(hidden_BTD[:, -1]), state

    def _now(self) -> float:
        synchronise(self._device)
        return time.perf_counter()


class _Steps:
    """One token after the other for rows that end one by one."""

    def __init__(self, model: LanguageModel, rows: int, state: ModelState, graphed: GraphedDecoding | None) -> None:
        self._model, self._graphed = model, graphed
        self._rows = torch.arange(rows)
        self._state: ModelState | None = state
        if graphed is not None:
            graphed.load(state)
            self._state = None

    def bytes(self) -> int:
        """Of the states of the rows that go on."""
        if self._graphed is not None:
            return self._graphed.bytes() // self._graphed.rows * len(self._rows)
        assert self._state is not None
        return self._state.bytes()

    def next(self, kept: Tensor, tokens_B1: Tensor) -> Tensor:
        """The logits (B, V) of the rows that go on, after one more token of each.

        Args:
            kept: int64 (B,), which of the rows of the last step these are.
            tokens_B1: int64.
        """
        ended = len(kept) < len(self._rows)
        self._rows = self._rows[kept]
        device = self._model.head_weight.device
        if self._graphed is None:
            assert self._state is not None
            state = self._state.select(kept) if ended else self._state
            logits_BV, self._state = self._model.next_logits(tokens_B1.to(device), state)
            return logits_BV
        all_B1 = torch.zeros(self._graphed.rows, 1, dtype=torch.long)
        all_B1[self._rows] = tokens_B1
        logits_BV = self._graphed.step(all_B1)
        return logits_BV if len(self._rows) == self._graphed.rows else logits_BV[self._rows.to(device)]


class Rows:
    """The rows that are still being written, in the order of the state's rows."""

    def __init__(
        self,
        engine: Engine,
        sampling: Sampling,
        places: Sequence[int],
        lengths: Sequence[int],
        given: Sequence[Tokens] | None,
    ) -> None:
        self._engine, self._sampling = engine, sampling
        self._rows = [_Row(engine, sampling, i, length, None if given is None else given[i])
                      for i, length in zip(places, lengths, strict=True)]  # fmt: skip
        self._active = list(self._rows)
        self._limit = engine.context_limit
        self.padded = False

    def pick(self, logits_BV: Tensor) -> list[int]:
        """The next token of every row.

        Raises:
            UnusableAnswer: NaN or infinite logits.
        """
        # Rows beyond the tokenizer's vocabulary stand for nothing.
        logits = logits_BV[:, : self._engine.tokenizer.vocab_size]
        finite_B = logits.isfinite().all(-1)
        if not bool(finite_B.all()):
            worst = logits[~finite_B][0].double().cpu().numpy()
            require_finite(worst, self._engine.name, "the vocabulary, while generating")
        if self._sampling.temperature == 0:
            found: list[int] = logits.argmax(-1).tolist()
            return found
        logits = logits.float().cpu()
        return [
            pick(self._engine, values, self._sampling, row.generator)
            for row, values in zip(self._active, logits, strict=True)
        ]

    def take(self, written: Sequence[int], seconds: float, state_bytes: int | None) -> np.ndarray:
        """Note what was written; the places of the rows that go on, int64."""
        size = None if self.padded or state_bytes is None else state_bytes // len(written)
        for row, token in zip(self._active, written, strict=True):
            row.take(token, seconds, self._limit, size)
        kept = np.array([place for place, row in enumerate(self._active) if row.reason is None], np.int64)
        self._active = [self._active[place] for place in kept]
        return kept

    def to_read(self) -> Tensor:
        """What every row reads next, int64 (B, 1)."""
        return torch.tensor([[row.to_read()] for row in self._active])

    def generations(self) -> dict[int, Generation]:
        """Place of the prompt → what came of it."""
        return {row.place: row.generation(len(self._rows)) for row in self._rows}


class _Row:
    def __init__(self, engine: Engine, sampling: Sampling, place: int, length: int, given: Tokens | None) -> None:
        self.place, self.length, self.reason = place, length, _UNFINISHED
        self.generator = torch_generator(sampling.seed, "generate", place) if sampling.temperature else _NO_DRAWS
        self._engine, self._sampling, self._given = engine, sampling, given
        self._stream = TextStream(engine.tokenizer, sampling.stop) if sampling.stop else None
        self._most = sampling.max_new_tokens
        if given is not None:
            self._most = min(self._most, len(given) + 1)
        self._tokens: list[int] = []
        self._first_token_seconds = self._seconds = 0.0
        self._state_bytes: int | None = None

    def take(self, token: int, seconds: float, limit: int | None, state_bytes: int | None) -> None:
        """One more token, written `seconds` after the request was sent."""
        if not self._tokens:
            self._first_token_seconds = seconds
        self._seconds, self._state_bytes = seconds, state_bytes
        ends = token == self._engine.tokenizer.special.boundary or token in self._engine.end_tokens
        if ends and self._sampling.stop_at_boundary:
            self.reason = "stop"
            return
        self._tokens.append(token)
        if self._stream is not None:
            self._stream.push(token)
        if self._stream is not None and self._stream.stopped:
            self.reason = "stop"
        elif len(self._tokens) == self._most:
            self.reason = "length"
        elif limit is not None and self.length + len(self._tokens) > limit:
            self.reason = "context"

    def to_read(self) -> int:
        if self._given is not None:
            forced = int(self._given[len(self._tokens) - 1])
            if forced != OWN:
                return forced
        return self._tokens[-1]

    def generation(self, together: int) -> Generation:
        if self._stream is not None:
            self._stream.flush()
        assert self.reason is not None
        return Generation(
            tokens=np.array(self._tokens, dtype=np.int64),
            text=self._engine.tokenizer.decode(self._tokens) if self._stream is None else self._stream.text,
            finish_reason=self.reason,
            prompt_tokens=self.length,
            first_token_seconds=self._first_token_seconds,
            decode_seconds=self._seconds - self._first_token_seconds,
            state_bytes=self._state_bytes,
            together=together,
        )


_UNFINISHED: FinishReason | None = None
_NO_DRAWS = torch.Generator()


def batches(
    prompts: Sequence[Tokens], places: Sequence[int], new_tokens: int, padded_tokens: int
) -> Iterator[list[int]]:
    """Some of a call's prompts in batches of one length, or of similar ones where they may be padded.

    Args:
        prompts: all of the call.
        places: which of them.
        new_tokens: that each may write.
        padded_tokens: most positions of a batch with padding.
    """
    batch: list[int] = []
    for i in sorted(places, key=lambda i: len(prompts[i])):
        rows, length = len(batch) + 1, len(prompts[i])
        shortest = len(prompts[batch[0]]) if batch else 0
        pads = rows * length <= padded_tokens
        apart = length > (PADDED_SHARE * shortest + PADDED_TOKENS if pads else shortest)
        if batch and (apart or rows * (length + new_tokens) > BATCH_TOKENS):
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


def _padded(prompts: Sequence[Tokens]) -> tuple[Tensor, Tensor | None]:
    """int64 (B, T) ids, padded in front, and int32 documents (-1 on padding); None where nothing is padded."""
    longest = max(map(len, prompts))
    tokens, doc = np.zeros((len(prompts), longest), np.int64), np.full((len(prompts), longest), -1, np.int32)
    for row, prompt in enumerate(prompts):
        tokens[row, longest - len(prompt) :] = prompt
        doc[row, longest - len(prompt) :] = 0
    return torch.from_numpy(tokens), torch.from_numpy(doc) if (doc < 0).any() else None
