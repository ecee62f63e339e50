"""Generation from a Longspan model with a state cache: one prompt, timed as one request, text handed out as it comes.

Legend: B rows, T tokens, V vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from longspan.engines.base import Engine, FinishReason, Generation, Sampling, require_finite
from longspan.engines.graphs import Graphs
from longspan.engines.text_stream import TextStream
from longspan.foundation.randomness import torch_generator
from longspan.models.graphed_decoding import GraphedDecoding
from longspan.models.language_model import LanguageModel


class Continuation(Iterator[str]):
    """A prompt being continued: iterate for the text, in whole characters, as soon as each is certain.

    The prompt goes through once, in chunks; then each token goes through alone with the state of all before it.
    """

    def __init__(
        self,
        engine: Engine,
        model: LanguageModel,
        prompt_BT: Tensor,
        sampling: Sampling,
        *,
        index: int,
        chunk: int,
        graphs: Graphs | None = None,
    ) -> None:
        """Nothing runs before the first `next`.

        Args:
            engine: whose tokenizer, name and context limit apply.
            model: in evaluation mode, on the device of the prompt.
            prompt_BT: int64 (1, T), T >= 1.
            sampling: how.
            index: of the prompt among its fellows: each draws from a stream of its own.
            chunk: prompt tokens per forward pass.
            graphs: of the model; None: every step runs by itself.
        """
        self._engine, self._model, self._sampling = engine, model, sampling
        self._prompt_BT, self._chunk = prompt_BT, chunk
        self._generator = torch_generator(sampling.seed, "generate", index)
        self._stream = TextStream(engine.tokenizer, sampling.stop)
        self._state = model.initial_state()
        self._graphs, self._graphed = graphs, _NO_GRAPH
        self._written: list[int] = []
        self._read = 0
        self._state_bytes: int | None = None
        self._reason: FinishReason | None = None
        self._first_token_seconds = self._decode_seconds = 0.0

    def __next__(self) -> str:
        """The text that the next token makes certain; may be empty.

        Raises:
            UnusableAnswer: NaN or infinite logits.
        """
        if self._reason is not None:
            raise StopIteration
        token = self._step()
        text = self._took(token)
        self._give_back()
        return text

    def _give_back(self) -> None:
        """Lets others have the steps when the end is reached."""
        if self._reason is not None and self._graphs is not None:
            self._state_bytes = self._held()
            self._graphed = None
            self._graphs.give_back(self)

    def _took(self, token: int) -> str:
        """The text that a token makes certain."""
        ends = token == self._engine.tokenizer.special.boundary or token in self._engine.end_tokens
        if ends and self._sampling.stop_at_boundary:
            self._reason = "stop"
            return self._stream.flush()
        self._written.append(token)
        text = self._stream.push(token)
        limit = self._engine.context_limit
        if self._stream.stopped:
            self._reason = "stop"
        elif len(self._written) == self._sampling.max_new_tokens:
            self._reason = "length"
        elif limit is not None and self._read >= limit:
            self._reason = "context"
        return text if self._reason is None else text + self._stream.flush()

    def result(self) -> Generation:
        """All that was written: at the end, or so far (then without the text of an unfinished character)."""
        return Generation(
            tokens=np.array(self._written, dtype=np.int64),
            text=self._stream.text,
            finish_reason=self._reason or "interrupted",
            prompt_tokens=self._prompt_BT.shape[1],
            first_token_seconds=self._first_token_seconds,
            decode_seconds=self._decode_seconds,
            state_bytes=self._held() if self._state_bytes is None else self._state_bytes,
        )

    def _held(self) -> int:
        """Bytes of the state."""
        return self._state.bytes() if self._graphed is None or not self._graphed.length else self._graphed.bytes()

    @torch.inference_mode()
    def _step(self) -> int:
        first = self._read == 0
        device = self._prompt_BT.device
        if first:
            synchronise(device)
        began = time.perf_counter()
        if first:
            self._read = self._prompt_BT.shape[1]
            if self._graphs is not None:
                self._graphed = self._graphs.borrow(self, 1, self._read, self._sampling.max_new_tokens)
            if self._graphed is not None:
                self._state = self._graphed.initial_state()
            for part_BT in torch.split(self._prompt_BT, self._chunk, dim=1):
                logits_BV, self._state = self._model.next_logits(part_BT, self._state)
        else:
            last_BT = torch.tensor([self._written[-1:]], device=device)
            if self._graphed is None:
                logits_BV, self._state = self._model.next_logits(last_BT, self._state)
            else:
                if self._read == self._prompt_BT.shape[1]:
                    self._graphed.load(self._state)
                logits_BV = self._graphed.step(last_BT)
            self._read += 1
        # Picking waits for the device, so the token is really there when the clock is read.
        token = pick(self._engine, logits_BV[0], self._sampling, self._generator)
        seconds = time.perf_counter() - began
        if first:
            self._first_token_seconds = seconds
        else:
            self._decode_seconds += seconds
        return token


_NO_GRAPH: GraphedDecoding | None = None


def pick(engine: Engine, logits_V: Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    """The next token.

    Args:
        engine: whose vocabulary counts.
        logits_V: of every row of the embedding.
        sampling: how.
        generator: of the draw.

    Raises:
        UnusableAnswer: NaN or infinite logits.
    """
    # Rows beyond the tokenizer's vocabulary stand for nothing.
    logits = logits_V[: engine.tokenizer.vocab_size]
    if logits.is_cuda and sampling.temperature == 0:
        # One number to wait for: likelihoods of a large vocabulary take longer to fetch than to compute.
        finite, likeliest = torch.stack([logits.isfinite().all().long(), logits.argmax()]).tolist()
        if finite:
            return int(likeliest)
    logits = logits.float().cpu()
    require_finite(logits.double().numpy(), engine.name, "the vocabulary, while generating")
    if sampling.temperature == 0:
        return int(logits.argmax())
    shares, order = torch.softmax(logits / sampling.temperature, dim=-1).sort(descending=True, stable=True)
    if sampling.top_k is not None:
        shares = shares[: sampling.top_k] / shares[: sampling.top_k].sum()
    # Kept as long as the tokens before do not yet hold top_p, so that at least one is kept.
    shares = torch.where(shares.cumsum(0) - shares < sampling.top_p, shares, 0.0)
    return int(order[torch.multinomial(shares, 1, generator=generator)])


def forget_peak(device: torch.device) -> None:
    """See `Engine.forget_peak`."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_bytes(device: torch.device) -> int | None:
    """See `Engine.peak_bytes`."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None


def synchronise(device: torch.device) -> None:
    """Wait until the device has done all it was asked to."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
