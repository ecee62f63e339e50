"""Mamba-1: a selective scan with a step size per channel and a decay per channel and state.

Legend: B rows, T tokens, D model width, E = expand * D channels, N state, R rank of the step size, K conv width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from longspan.foundation.config import Config
from longspan.models.mixers.base import Mixer, MixerState, init_linear, register, without_autocast
from longspan.models.mixers.short_conv import ConvolvedState, short_conv
from longspan.models.segments import LONGEST_CONVOLUTION, Segments
from longspan.ops import kernels
from longspan.ops.causal_conv import causal_conv_step
from longspan.ops.conv_step import conv_step
from longspan.ops.mamba1_step import mamba1_step
from longspan.ops.selective_scan import selective_scan, selective_scan_step

DT_MIN, DT_MAX, DT_FLOOR = 1e-3, 1e-1, 1e-4


class Mamba1Settings(Config):
    """Settings of one Mamba-1 mixer.

    Attributes:
        mamba1_state: N, the state per channel.
        expand: channels / model width.
        conv: taps of the convolution before the scan.
        dt_rank: R, the width through which the step sizes are projected; None: D/16, rounded up.
    """

    mamba1_state: int = Field(16, ge=1)
    expand: int = Field(2, ge=1)
    conv: int = Field(4, ge=2, le=LONGEST_CONVOLUTION)
    dt_rank: int | None = Field(None, ge=1)


@dataclass(frozen=True)
class Mamba1State(ConvolvedState):
    """The last K-1 inputs of the convolution (B, K-1, E), their documents, and the scan state (B, N, E)."""

    scan: Tensor | None = None


@register("m")
class Mamba1(Mixer):
    """Mamba-1 (Gu & Dao 2023) as in `mamba_ssm/modules/mamba_simple.py` and transformers' `MambaMixer`.

    The rows of `in_proj` are x, z, those of `x_proj` the step size, B, C. `conv_weight`, `conv_bias` and `dt_bias` are
    called `conv1d.weight`, `conv1d.bias` and `dt_proj.bias` there; the other names are the same.
    """

    name = "mamba1"
    Settings = Mamba1Settings
    no_decay = frozenset({"A_log", "D", "dt_bias", "conv_bias"})
    fp32 = frozenset({"A_log", "D", "dt_bias"})

    def __init__(self, width: int, settings: Mamba1Settings) -> None:
        super().__init__()
        self.settings = settings
        self.inner = settings.expand * width
        self.rank = settings.dt_rank or math.ceil(width / 16)
        self.in_proj = nn.Linear(width, 2 * self.inner, bias=False)
        self.conv_weight = nn.Parameter(torch.empty(self.inner, settings.conv))
        self.conv_bias = nn.Parameter(torch.empty(self.inner))
        self.x_proj = nn.Linear(self.inner, self.rank + 2 * settings.mamba1_state, bias=False)
        # The bias is a parameter of its own: it holds the step sizes, which no other initialisation may touch.
        self.dt_proj = nn.Linear(self.rank, self.inner, bias=False)
        self.dt_bias = nn.Parameter(torch.empty(self.inner))
        self.A_log = nn.Parameter(torch.empty(self.inner, settings.mamba1_state))
        self.D = nn.Parameter(torch.empty(self.inner))
        self.out_proj = nn.Linear(self.inner, width, bias=False)

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator) -> None:
        """As the authors' code: A = -1..-N, dt log-uniform in [1e-3, 1e-1], D = 1, convolution as `nn.Conv1d`."""
        for linear in (self.in_proj, self.x_proj, self.dt_proj, self.out_proj):
            init_linear(linear, generator)
        bound = 1.0 / math.sqrt(self.settings.conv)
        self.conv_weight.uniform_(-bound, bound, generator=generator)
        self.conv_bias.uniform_(-bound, bound, generator=generator)
        self.A_log.copy_(torch.arange(1.0, self.settings.mamba1_state + 1).log().expand_as(self.A_log))
        dt = self.dt_bias.uniform_(math.log(DT_MIN), math.log(DT_MAX), generator=generator).exp().clamp(min=DT_FLOOR)
        # softplus(dt_bias) = dt
        self.dt_bias.copy_(dt + torch.log(-torch.expm1(-dt)))
        self.D.fill_(1.0)

    def traceable(self, device: torch.device) -> bool:
        """As kernels; plain torch would be unrolled chunk by chunk."""
        return kernels.wanted(device)

    def initial_state(self) -> Mamba1State:
        """Nothing seen."""
        return Mamba1State()

    def forward(self, x_BTD: Tensor, segments: Segments, state: MixerState | None) -> tuple[Tensor, MixerState | None]:
        """See `Mixer.forward`."""
        assert state is None or isinstance(state, Mamba1State)
        before = state or Mamba1State()
        if segments.step is not None:
            return self._fixed_step(x_BTD, before), before
        if x_BTD.shape[1] == 1 and segments.state_doc is None and before.scan is not None:
            return self._step(x_BTD, before)
        x, z = self.in_proj(x_BTD).chunk(2, dim=-1)
        x, tail, tail_doc = short_conv(x, self.conv_weight, self.conv_bias, segments, before.tail, before.tail_doc)
        dt, B, C = self._selected(x)
        # The scan chooses its own precision: autocast would round its sums of decays.
        with without_autocast(x_BTD.device):
            y_BTE, scan = selective_scan(
                x,
                F.softplus(dt.float() + self.dt_bias.float()),
                -torch.exp(self.A_log.float()),
                B,
                C,
                self.D.float(),
                doc_BT=segments.state_doc,
                initial_state_BNE=before.scan,
                initial_doc_B=segments.previous_doc if before.scan is not None else None,
            )
        y_BTD = self.out_proj(y_BTE * F.silu(z))
        return y_BTD, None if state is None else Mamba1State(tail, tail_doc, scan)

    def _selected(self, x_E: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(..., E) to the step sizes before bias and softplus (..., E), and B and C (..., N)."""
        state = self.settings.mamba1_state
        low_rank, B, C = self.x_proj(x_E).split_with_sizes([self.rank, state, state], dim=-1)
        return self.dt_proj(low_rank), B, C

    def _step(self, x_B1D: Tensor, before: Mamba1State) -> tuple[Tensor, Mamba1State]:
        """One more token of the open document: decoding, where every call into torch counts."""
        assert before.tail is not None
        assert before.scan is not None
        x, z = self.in_proj(x_B1D[:, 0]).chunk(2, dim=-1)
        conv_weight, conv_bias = self.conv_weight.to(x.dtype), self.conv_bias.to(x.dtype)
        x, tail = causal_conv_step(x, conv_weight, conv_bias, before.tail.to(x.dtype))
        x = F.silu(x)
        dt, B, C = self._selected(x)
        with without_autocast(x_B1D.device):
            y_BE, scan = selective_scan_step(
                x.float(),
                F.softplus(dt.float() + self.dt_bias.float()),
                torch.exp(self.A_log.float().T.contiguous()).neg_(),
                B.float(),
                C.float(),
                self.D.float(),
                before.scan,
            )
        y_BD = self.out_proj(y_BE.to(z.dtype) * F.silu(z))
        return y_BD.unsqueeze(1), Mamba1State(tail, None, scan)

    def _fixed_step(self, x_B1D: Tensor, state: Mamba1State) -> Tensor:
        """One more token, on a state that it overwrites."""
        assert state.tail is not None
        assert state.scan is not None
        x, z = self.in_proj(x_B1D[:, 0]).chunk(2, dim=-1)
        x = conv_step(x, self.conv_weight, self.conv_bias, state.tail)
        low_rank, BC = self.x_proj(x).tensor_split([self.rank], dim=-1)
        dt = self.dt_proj(low_rank)
        with without_autocast(x_B1D.device):
            y_BE = mamba1_step(x, dt, BC, z, self.dt_bias, self.A_log, self.D, state.scan)
        return self.out_proj(y_BE).unsqueeze(1)  # type: ignore[no-any-return]

    def flops(self, context: int) -> float:
        """Projections, convolution, and per channel 7N + 3 for the scan.

        Per channel and state: dt A, its exponential, two for decay and drive of the state, (dt x) B, two to read it
        with C. Per channel: dt x, and two for D x.
        """
        linears = (self.in_proj, self.x_proj, self.dt_proj, self.out_proj)
        weights = sum(linear.weight.numel() for linear in linears) + self.conv_weight.numel()
        return float(2 * weights + self.inner * (7 * self.settings.mamba1_state + 3))

    def state_bytes(self, context: int, element_bytes: int) -> int:
        """The scan state in fp32 and K-1 inputs of the convolution."""
        return 4 * self.inner * self.settings.mamba1_state + (self.settings.conv - 1) * self.inner * element_bytes
