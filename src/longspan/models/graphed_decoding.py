"""Decoding without the launches: one CUDA graph per step, for models whose state keeps its size.

Token by token a recurrent model is hundreds of tiny kernels, and starting each costs more than running it. A graph
starts all of them at once. It reads and writes fixed memory, so the state lives here and is copied in and out;
attention grows its cache by a token a step and is refused.

Legend: B rows, V vocabulary.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from longspan.foundation.errors import UserError
from longspan.models.language_model import LanguageModel
from longspan.models.state import ModelState

WARM_UP_STEPS = 2


class GraphedDecoding:
    """The steps after one state of one model, each a replay of the same graph.

    On a CPU, which has no graphs, the same steps run as they are.

    Attributes:
        logits_BV: of the token after the last step; the next step overwrites them.
    """

    def __init__(self, model: LanguageModel, state: ModelState) -> None:
        """Captures the step.

        Args:
            model: in evaluation mode, in the dtype it decodes in.
            state: after at least one token, without document ids; it is copied and stays valid.

        Raises:
            UserError: a model or a state whose step is not always the same.
        """
        _check(model, state)
        self.model = model
        self._start = state
        self._steps = 0
        self._state = state.clone()
        weight = model.head_weight
        self._tokens_B1 = torch.zeros(_tensors(state)[0].shape[0], 1, dtype=torch.long, device=weight.device)
        self._graph: torch.cuda.CUDAGraph | None = None
        with torch.no_grad():
            logits_BV, _ = model.next_logits(self._tokens_B1, self._state)
            self.logits_BV = torch.zeros_like(logits_BV)
            if weight.is_cuda:
                self._capture()

    def _capture(self) -> None:
        """Warms up and captures on a stream of its own, as graphs need, then takes the state back to the start."""
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP_STEPS):
                self._advance()
        torch.cuda.current_stream().wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._advance()
        self.rewind()

    def _advance(self) -> None:
        logits_BV, after = self.model.next_logits(self._tokens_B1, self._state)
        self.logits_BV.copy_(logits_BV)
        for held, new in zip(_tensors(self._state), _tensors(after), strict=True):
            held.copy_(new)

    @torch.no_grad()
    def step(self, tokens_B1: Tensor) -> Tensor:
        """Takes in one token per row; returns the logits (B, V) of the next, which the next step overwrites."""
        self._tokens_B1.copy_(tokens_B1)
        if self._graph is None:
            self._advance()
        else:
            self._graph.replay()
        self._steps += 1
        return self.logits_BV

    @torch.no_grad()
    def rewind(self) -> None:
        """Back to the state it was made with: another continuation of the same prefix needs no new graph."""
        for held, start in zip(_tensors(self._state), _tensors(self._start), strict=True):
            held.copy_(start)
        self._steps = 0

    def state(self) -> ModelState:
        """A copy of the state after the steps so far, for any other call of the model."""
        past = self._start.past
        past = dataclasses.replace(past, length=past.length + self._steps, num_keys=past.num_keys + self._steps)
        return dataclasses.replace(self._state.clone(), past=past)


def _check(model: LanguageModel, state: ModelState) -> None:
    growing = sorted({block.letter for block in model.blocks if block.mixer.isolated_as != "state"})
    if growing:
        given = f"a graph for decoding with the layers {', '.join(growing)}, whose state grows"
        raise UserError(given, "layers whose state keeps its size", "decode with `next_logits`")
    if model.position_embedding is not None:
        raise UserError("a graph for decoding with learned positions", "others", "decode with `next_logits`")
    if state.length == 0 or state.past.last_doc is not None:
        given = f"a graph for decoding after {state.length} tokens" + (" of documents" if state.length else "")
        raise UserError(
            given, "at least one token before it, none of them with document ids", "prefill the prompt first"
        )


def _tensors(state: ModelState) -> list[Tensor]:
    """Every tensor of the state, layer after layer."""
    found: list[Tensor] = []

    def add(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    for layer in state.layers:
        layer.map(add)
    return found
