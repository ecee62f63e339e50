"""Gated recurrent unit: the plain recurrent baseline, isolated like every other mixer.

Legend: B rows, T tokens, D model width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from longspan.foundation.config import Config
from longspan.models.mixers.base import Mixer, MixerState, init_linear, register, without_autocast
from longspan.models.segments import Segments
from longspan.ops.gru import gru


class GRUSettings(Config):
    """Settings of one GRU mixer.

    Attributes:
        in_projection: a linear layer before the GRU.
        out_projection: a linear layer after it; without one the bounded GRU output is added to the residual directly.
    """

    in_projection: bool = False
    out_projection: bool = True


@dataclass(frozen=True)
class GRUState(MixerState):
    """The hidden state (B, D)."""

    hidden: Tensor | None = None


@register("G")
class GRU(Mixer):
    """`torch.nn.GRU` (gates in the order reset, update, new) of the model's width, one layer, with document resets."""

    name = "gru"
    Settings = GRUSettings

    def __init__(self, width: int, settings: GRUSettings) -> None:
        super().__init__()
        self.settings = settings
        self.width = width
        self.residual_outputs = ("out_proj.weight",) if settings.out_projection else ()
        self.in_proj = nn.Linear(width, width, bias=False) if settings.in_projection else None
        self.weight_input = nn.Parameter(torch.empty(3 * width, width))
        self.weight_hidden = nn.Parameter(torch.empty(3 * width, width))
        self.bias_input = nn.Parameter(torch.empty(3 * width))
        self.bias_hidden = nn.Parameter(torch.empty(3 * width))
        self.out_proj = nn.Linear(width, width, bias=False) if settings.out_projection else None

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator) -> None:
        """U(+-1/sqrt(D)) as `torch.nn.GRU`."""
        bound = 1.0 / math.sqrt(self.width)
        for parameter in (self.weight_input, self.weight_hidden, self.bias_input, self.bias_hidden):
            parameter.uniform_(-bound, bound, generator=generator)
        for linear in (self.in_proj, self.out_proj):
            if linear is not None:
                init_linear(linear, generator)

    def initial_state(self) -> GRUState:
        """Nothing seen."""
        return GRUState()

    def forward(self, x_BTD: Tensor, segments: Segments, state: MixerState | None) -> tuple[Tensor, MixerState | None]:
        """See `Mixer.forward`."""
        assert state is None or isinstance(state, GRUState)
        before = None if state is None else state.hidden
        if self.in_proj is not None:
            x_BTD = self.in_proj(x_BTD)
        # The scan runs in the dtype of its weights: autocast would round the state at every step.
        with without_autocast(x_BTD.device):
            y_BTD, hidden_BD = gru(
                x_BTD.to(self.weight_input.dtype),
                self.weight_input,
                self.weight_hidden,
                self.bias_input,
                self.bias_hidden,
                doc_BT=segments.state_doc,
                initial_state_BH=before,
                initial_doc_B=segments.previous_doc if before is not None else None,
            )
        if self.out_proj is not None:
            y_BTD = self.out_proj(y_BTD)
        return y_BTD, None if state is None else GRUState(hidden_BD)

    def flops(self, context: int) -> float:
        """Input, recurrent and optional projections."""
        matrices = self.weight_input.numel() + self.weight_hidden.numel()
        matrices += sum(linear.weight.numel() for linear in (self.in_proj, self.out_proj) if linear is not None)
        return 2.0 * matrices

    def state_bytes(self, context: int, element_bytes: int) -> int:
        """One hidden vector."""
        return self.width * element_bytes
