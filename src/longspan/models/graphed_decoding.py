"""Decoding without the launches: one CUDA graph per step, over states in memory of fixed size.

Token by token a model is hundreds of tiny kernels, and starting each costs more than running it. A graph starts all of
them at once. It reads and writes fixed memory: recurrent states as they are, keys and values with room for so many
tokens, and how many there are as a number on the device. Layers overwrite their states, see `Mixer.fixed_state`.

Legend: B rows, V vocabulary.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from longspan.foundation.errors import UserError
from longspan.models.language_model import LanguageModel
from longspan.models.mixers.base import state_tensors
from longspan.models.segments import Segments, Step
from longspan.models.state import ModelState

WARM_UP_STEPS = 2


class GraphedDecoding:
    """Steps of one model for a number of rows, each a replay of the same graph: for one prompt after the other.

    Prefill from `initial_state()`, then `load` the state that came of it (or of any other calls), then `step`. On a
    CPU, which has no graphs, the same steps run as they are.

    Attributes:
        rows: B.
        slots: tokens, those of the prompt included, that there is room for.
        logits_BV: of the token after the last step; the next step overwrites them.
    """

    def __init__(self, model: LanguageModel, rows: int, slots: int) -> None:
        """Takes the memory and captures the step.

        Args:
            model: in evaluation mode, in the dtype it decodes in.
            rows: that are decoded together.
            slots: most tokens of a row, prompt and new ones.

        Raises:
            UserError: no rows or slots, or more slots than the model has positions.
        """
        if rows < 1 or slots < 1:
            raise UserError(f"decoding of {rows} rows with room for {slots} tokens", "1 or more of both", "raise it")
        limit = model.config.max_positions if model.position_embedding is not None else None
        if limit is not None and slots > limit:
            given = f"room for {slots} tokens with learned positions"
            raise UserError(given, f"at most {limit}", "decode shorter rows")
        self.model, self.rows, self.slots = model, rows, slots
        device = model.head_weight.device
        self._tokens_B1 = torch.zeros(rows, 1, dtype=torch.long, device=device)
        self._positions_B1 = torch.zeros(rows, 1, dtype=torch.long, device=device)
        self._newest_1 = torch.zeros(1, dtype=torch.long, device=device)
        self._first_B = torch.zeros(rows, dtype=torch.int32, device=device)
        self._loaded: ModelState | None = None
        self._steps = 0
        self._graph: torch.cuda.CUDAGraph | None = None
        with torch.no_grad():
            self.logits_BV, state = model.next_logits(self._tokens_B1, model.initial_state())
            self._mixers = [block.mixer for block in model.blocks]
            layers = list(reversed(state.layers))
            # What a layer's fixed state is made after goes before the next is made: all of both would halve the rows.
            del state
            self._fixed = tuple(mixer.fixed_state(layers.pop(), slots) for mixer in self._mixers)
            if device.type == "cuda":
                self._capture()

    def _capture(self) -> None:
        """Warms up and captures on a stream of its own, as graphs need."""
        with torch.cuda.device(self._tokens_B1.device):
            stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(WARM_UP_STEPS):
                    self._newest_1.zero_()
                    self._positions_B1.zero_()
                    self._advance()
            torch.cuda.current_stream().wait_stream(stream)
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph):
                self._advance()

    def _advance(self) -> None:
        segments = Segments.one_step(self._positions_B1, Step(self._newest_1, self._first_B))
        self.logits_BV, after = self.model.next_logits(self._tokens_B1, ModelState(self._fixed), segments)
        for held, new in zip(self._fixed, after.layers, strict=True):
            for to, value in zip(state_tensors(held), state_tensors(new), strict=True):
                if to is not value:
                    to.copy_(value)
        self._newest_1.add_(1)
        self._positions_B1.add_(1)

    def initial_state(self) -> ModelState:
        """The state before the first token: calls that go on from it leave their keys where the steps need them."""
        pairs = zip(self._mixers, self._fixed, strict=True)
        return ModelState(tuple(mixer.start_in(fixed) for mixer, fixed in pairs))

    @torch.no_grad()
    def load(self, state: ModelState) -> None:
        """The steps to come go on from `state`; it is copied where it does not lie here already.

        Args:
            state: of as many rows, or of one that all rows go on from, after at least one token; the next tokens go on
                with the documents that are open.

        Raises:
            UserError: other rows, nothing seen, or more tokens than there is room for.
        """
        past = state.past
        rows = _num_rows(state)
        if state.length == 0 or rows not in (1, self.rows):
            given = f"a state of {rows} rows after {state.length} tokens for decoding {self.rows} rows"
            raise UserError(given, f"{self.rows} rows, at least one token", "prefill the prompts first")
        if rows != self.rows:
            past = past.select(torch.zeros(self.rows, dtype=torch.long))
        if past.num_keys > self.slots:
            given = f"a state with {past.num_keys} tokens in room for {self.slots}"
            raise UserError(given, "as much room as tokens", "raise `slots`")
        isolation = past.isolation if past.last_doc is not None else None
        if past.last_doc is not None and isolation in ("full", "state"):
            last_doc = past.last_doc[:rows]
            layers = tuple(layer.undocumented(last_doc) for layer in state.layers)
            state = dataclasses.replace(state, layers=layers)
        for mixer, layer, fixed in zip(self._mixers, state.layers, self._fixed, strict=True):
            mixer.fix(layer, fixed, past.num_keys)
        opened = torch.full((self.rows,), past.length)
        if past.open_length is not None and isolation in ("full", "attention"):
            opened = past.open_length
        self._positions_B1.copy_(opened[:, None])
        first = past.num_keys - opened if isolation in ("full", "attention") else torch.zeros_like(opened)
        self._first_B.copy_(first.clamp(min=0))
        self._newest_1.fill_(past.num_keys)
        self._loaded, self._steps = ModelState((), past), 0

    @torch.no_grad()
    def step(self, tokens_B1: Tensor) -> Tensor:
        """Takes in one token per row; returns the logits (B, V) of the next, which the next step overwrites.

        Raises:
            UserError: no state is loaded, or there is no room for one more token.
        """
        if self._loaded is None:
            raise UserError("a step of decoding without a state", "a state", "`load` it first")
        if self.length >= self.slots:
            given = f"token {self.length + 1} in room for {self.slots}"
            raise UserError(given, f"{self.slots} tokens", "take more slots")
        self._tokens_B1.copy_(tokens_B1)
        if self._graph is None:
            self._advance()
        else:
            self._graph.replay()
        self._steps += 1
        return self.logits_BV

    @property
    def length(self) -> int:
        """Tokens seen, 0 before a state is loaded."""
        return 0 if self._loaded is None else self._loaded.length + self._steps

    def bytes(self) -> int:
        """Of what the states hold after the steps so far, all rows together; room that is not used yet is not counted.

        Raises:
            UserError: no state is loaded.
        """
        if self._loaded is None:
            raise UserError("the size of a decoding without a state", "a state", "`load` it first")
        num_keys = self._loaded.past.num_keys + self._steps
        return sum(mixer.fixed_bytes(fixed, num_keys) for mixer, fixed in zip(self._mixers, self._fixed, strict=True))

    @torch.no_grad()
    def state(self) -> ModelState:
        """A copy of the state after the steps so far, for any other call of the model.

        Raises:
            UserError: no state is loaded.
        """
        if self._loaded is None:
            raise UserError("the state of a decoding without one", "a state", "`load` it first")
        past, steps = self._loaded.past, self._steps
        key_doc, num_keys = past.key_doc, past.num_keys + steps
        if key_doc is not None and past.last_doc is not None:
            key_doc = torch.cat([key_doc, past.last_doc[:, None].expand(-1, steps)], dim=1)
        opened = None if past.open_length is None else past.open_length + steps
        past = dataclasses.replace(
            past, length=past.length + steps, num_keys=num_keys, open_length=opened, key_doc=key_doc
        )
        pairs = zip(self._mixers, self._fixed, strict=True)
        return ModelState(tuple(mixer.unfix(fixed, num_keys) for mixer, fixed in pairs), past)


def _num_rows(state: ModelState) -> int:
    """Of its first tensor; 0 where nothing was seen."""
    return next((tensor.shape[0] for layer in state.layers for tensor in state_tensors(layer)), 0)
