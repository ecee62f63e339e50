"""Gated recurrent unit and LSTM: the plain recurrent baselines, isolated like every other mixer.

Legend: B rows, T tokens, D model width.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from longspan.foundation.config import Config
from longspan.models.mixers.base import Mixer, MixerState, init_linear, register, without_autocast
from longspan.models.segments import Segments
from longspan.ops.gru import gru
from longspan.ops.lstm import lstm


class RecurrentSettings(Config):
    """Settings of one GRU or LSTM mixer.

    Attributes:
        in_projection: a linear layer before the recurrence.
        out_projection: a linear layer after it; without one its bounded output is added to the residual directly.
    """

    in_projection: bool = False
    out_projection: bool = True


class Recurrent(Mixer):
    """What both have: one layer of the model's width, parameters as in torch, optional projections around it.

    Class attributes:
        gates: stacked in the weights.
        vectors: of D entries in the state of one row.
    """

    Settings = RecurrentSettings
    matrices = frozenset({"weight_input", "weight_hidden"})
    gates: ClassVar[int]
    vectors: ClassVar[int]

    def __init__(self, width: int, settings: RecurrentSettings) -> None:
        super().__init__()
        self.settings = settings
        self.width = width
        self.residual_outputs = ("out_proj.weight",) if settings.out_projection else ()
        self.in_proj = nn.Linear(width, width, bias=False) if settings.in_projection else None
        self.weight_input = nn.Parameter(torch.empty(self.gates * width, width))
        self.weight_hidden = nn.Parameter(torch.empty(self.gates * width, width))
        self.bias_input = nn.Parameter(torch.empty(self.gates * width))
        self.bias_hidden = nn.Parameter(torch.empty(self.gates * width))
        self.out_proj = nn.Linear(width, width, bias=False) if settings.out_projection else None

    def traceable(self, device: torch.device) -> bool:
        """A loop over tokens."""
        return False

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator) -> None:
        """U(+-1/sqrt(D)) as torch's recurrent layers."""
        bound = 1.0 / math.sqrt(self.width)
        for parameter in (self.weight_input, self.weight_hidden, self.bias_input, self.bias_hidden):
            parameter.uniform_(-bound, bound, generator=generator)
        for linear in (self.in_proj, self.out_proj):
            if linear is not None:
                init_linear(linear, generator)

    def forward(self, x_BTD: Tensor, segments: Segments, state: MixerState | None) -> tuple[Tensor, MixerState | None]:
        """See `Mixer.forward`."""
        if self.in_proj is not None:
            x_BTD = self.in_proj(x_BTD)
        # The scan runs in the dtype of its weights: autocast would round the state at every step.
        with without_autocast(x_BTD.device):
            y_BTD, after = self._scan(x_BTD.to(self.weight_input.dtype), segments, state)
        if self.out_proj is not None:
            y_BTD = self.out_proj(y_BTD)
        return y_BTD, None if state is None else after

    @abstractmethod
    def _scan(self, x_BTD: Tensor, segments: Segments, before: MixerState | None) -> tuple[Tensor, MixerState]:
        """The recurrence alone; `before` is None in training."""

    def flops(self, context: int) -> float:
        """Input, recurrent and optional projections."""
        matrices = self.weight_input.numel() + self.weight_hidden.numel()
        matrices += sum(linear.weight.numel() for linear in (self.in_proj, self.out_proj) if linear is not None)
        return 2.0 * matrices

    def state_bytes(self, context: int, element_bytes: int) -> int:
        """The same at every context."""
        return self.vectors * self.width * element_bytes


@dataclass(frozen=True)
class GRUState(MixerState):
    """The hidden state (B, D)."""

    hidden: Tensor | None = None


@register("G")
class GRU(Recurrent):
    """`torch.nn.GRU` (gates in the order reset, update, new) with document resets."""

    name = "gru"
    gates = 3
    vectors = 1

    def initial_state(self) -> GRUState:
        """Nothing seen."""
        return GRUState()

    def _scan(self, x_BTD: Tensor, segments: Segments, before: MixerState | None) -> tuple[Tensor, MixerState]:
        assert before is None or isinstance(before, GRUState)
        hidden_BD = None if before is None else before.hidden
        y_BTD, hidden_BD = gru(
            x_BTD,
            self.weight_input,
            self.weight_hidden,
            self.bias_input,
            self.bias_hidden,
            doc_BT=segments.state_doc,
            initial_state_BH=hidden_BD,
            initial_doc_B=segments.previous_doc if hidden_BD is not None else None,
        )
        return y_BTD, GRUState(hidden_BD)


@dataclass(frozen=True)
class LSTMState(MixerState):
    """The hidden state and the cell, (B, D) each."""

    hidden: Tensor | None = None
    cell: Tensor | None = None


@register("L")
class LSTM(Recurrent):
    """`torch.nn.LSTM` (gates in the order input, forget, cell, output) with document resets."""

    name = "lstm"
    carried = 2
    gates = 4
    vectors = 2

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator) -> None:
        """As torch, but the forget gate has a bias of 1, so that the cell keeps what it holds until it learns not to.

        Source: Jozefowicz, Zaremba & Sutskever 2015 (a bias of 1 closes the gap to the GRU), after Gers et al. 2000.
        torch adds two biases: that of the input is 1 at the forget gate, that of the hidden state 0.
        """
        super().init_weights(generator)
        forget = slice(self.width, 2 * self.width)
        self.bias_input[forget] = 1.0
        self.bias_hidden[forget] = 0.0

    def initial_state(self) -> LSTMState:
        """Nothing seen."""
        return LSTMState()

    def _scan(self, x_BTD: Tensor, segments: Segments, before: MixerState | None) -> tuple[Tensor, MixerState]:
        before = before or LSTMState()
        assert isinstance(before, LSTMState)
        y_BTD, hidden_BD, cell_BD = lstm(
            x_BTD,
            self.weight_input,
            self.weight_hidden,
            self.bias_input,
            self.bias_hidden,
            doc_BT=segments.state_doc,
            initial_hidden_BH=before.hidden,
            initial_cell_BH=before.cell,
            initial_doc_B=segments.previous_doc if before.hidden is not None else None,
        )
        return y_BTD, LSTMState(hidden_BD, cell_BD)
