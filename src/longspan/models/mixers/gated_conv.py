"""Gated short convolution: a mixer without recurrence that sees a few tokens and no more. It is no state-space model.

It exists because an earlier comparison of attention with "Mamba" ran this layer under that name. Its formulas look like
a selective scan, but nothing is carried from token to token: a "state" is made and read at the same position. Whoever
asks what those results say needs the layer that gave them, and under its own name it is a useful control: what a model
gains from the last few tokens alone.

Legend: B rows, T tokens, D model width, I inner width = expand * D, N features, K taps of the convolution.
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
from longspan.models.norms import LayerNorm
from longspan.models.segments import LONGEST_CONVOLUTION, Segments
from longspan.ops import kernels
from longspan.ops.conv_step import conv_step
from longspan.ops.decay_mixture import decay_mixture

DELTA_MIN, DELTA_MAX = 1e-6, 10.0
RATE_MIN, RATE_MAX = 0.1, 10.0


class GatedShortConvolutionSettings(Config):
    """Settings of one gated short convolution.

    Attributes:
        expand: inner width / model width.
        conv: K; a layer sees K - 1 tokens before its own.
        feature_state: N, features per channel, each made and read at one position (the "state size" of the earlier
            project; not the model's `state`, which carries something).
        norm_eps: of the norm after the convolution.
        pytorch_init: keep PyTorch's default initialisation of the linear layers, as the earlier project did for this
            layer alone: neither `init: normal` nor the scale of residual outputs touches them.
    """

    expand: int = Field(2, ge=1)
    conv: int = Field(4, ge=2, le=LONGEST_CONVOLUTION)
    feature_state: int = Field(16, ge=1)
    norm_eps: float = Field(1e-5, gt=0)
    pytorch_init: bool = False


@dataclass(frozen=True)
class GatedShortConvolutionState(ConvolvedState):
    """The last K-1 inputs of the convolution (B, K-1, I) and their documents."""


@register("C")
class GatedShortConvolution(Mixer):
    """The layer that ran as "Mamba" (`ImprovedSSM`) in the earlier project `hybrid-llm-mamba-transformer-research-3`.

    At every position, with `x, z` the halves of `W_in u` and the document's own tokens alone in the convolution:

        x = LayerNorm(SiLU(conv(x)))                                      (I), convolution without bias
        Delta, B, C = W_x x                                               (1), (N), (N)
        Delta = clamp(softplus(Delta), 1e-6, 10)
        A = -clamp(softplus(A), 0.1, 10)                                  (I, N), of the parameter A
        decay = clamp(exp(Delta A), 1e-6, 1)                              (I, N)
        y = sum_n x B_n decay_n C_n + D x = x (D + sum_n B_n C_n decay_n)
        out = W_out (y SiLU(z))

    The second form of y is the one computed: the sum over n needs no (B, T, I, N) tensor in memory, only its weights
    B_n C_n. There is no `h[t-1]` anywhere; the reach of a layer is K-1 tokens, and its state the tail of the
    convolution.
    """

    name = "gated_short_convolution"
    Settings = GatedShortConvolutionSettings
    no_decay = frozenset({"A", "D"})
    fp32 = frozenset({"A", "D"})
    carried = 0

    def __init__(self, width: int, settings: GatedShortConvolutionSettings) -> None:
        super().__init__()
        self.settings = settings
        self.inner = settings.expand * width
        self.keeps_init = settings.pytorch_init
        self.residual_outputs = () if settings.pytorch_init else ("out_proj.weight",)
        self.in_proj = nn.Linear(width, 2 * self.inner, bias=False)
        self.conv_weight = nn.Parameter(torch.empty(self.inner, settings.conv))
        self.norm = LayerNorm(self.inner, eps=settings.norm_eps)
        self.x_proj = nn.Linear(self.inner, 1 + 2 * settings.feature_state, bias=False)
        self.A = nn.Parameter(torch.empty(self.inner, settings.feature_state))
        self.D = nn.Parameter(torch.empty(self.inner))
        self.out_proj = nn.Linear(self.inner, width, bias=False)

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator) -> None:
        """Linears and convolution as `nn.Linear` and `nn.Conv1d`, A ~ N(0, 0.1), D = 1."""
        for linear in (self.in_proj, self.x_proj, self.out_proj):
            init_linear(linear, generator)
        bound = 1.0 / math.sqrt(self.settings.conv)
        self.conv_weight.uniform_(-bound, bound, generator=generator)
        self.norm.init_weights()
        self.A.normal_(0.0, 0.1, generator=generator)
        self.D.fill_(1.0)

    def traceable(self, device: torch.device) -> bool:
        """Its sum over features walks through blocks of tokens."""
        return False

    def capturable(self, device: torch.device) -> bool:
        """Those blocks depend on shapes alone, and the convolution is a kernel."""
        return kernels.wanted(device)

    def initial_state(self) -> GatedShortConvolutionState:
        """Nothing seen."""
        return GatedShortConvolutionState()

    def forward(self, x_BTD: Tensor, segments: Segments, state: MixerState | None) -> tuple[Tensor, MixerState | None]:
        """See `Mixer.forward`."""
        assert state is None or isinstance(state, GatedShortConvolutionState)
        before = state or GatedShortConvolutionState()
        x_BTI, z_BTI = self.in_proj(x_BTD).chunk(2, dim=-1)
        if segments.step is not None and before.tail is not None:
            tail, tail_doc = before.tail, None
            x_BTI = conv_step(x_BTI[:, 0], self.conv_weight, None, tail).unsqueeze(1)
        else:
            x_BTI, tail, tail_doc = short_conv(x_BTI, self.conv_weight, None, segments, before.tail, before.tail_doc)
        x_BTI = self.norm(x_BTI)
        features = self.settings.feature_state
        delta, B, C = self.x_proj(x_BTI).split_with_sizes([1, features, features], dim=-1)
        with without_autocast(x_BTD.device):
            delta_BT = F.softplus(delta[..., 0].float()).clamp(DELTA_MIN, DELTA_MAX)
            A_IN = -F.softplus(self.A.float()).clamp(RATE_MIN, RATE_MAX)
            factor_BTI = decay_mixture(B.float() * C.float(), delta_BT, A_IN) + self.D.float()
        y_BTI = x_BTI * factor_BTI.to(x_BTI.dtype) * F.silu(z_BTI)
        return self.out_proj(y_BTI), None if state is None else GatedShortConvolutionState(tail, tail_doc)

    def flops(self, context: int) -> float:
        """Projections, convolution, and the sum over features at every channel."""
        matrices = (self.in_proj.weight, self.x_proj.weight, self.out_proj.weight, self.conv_weight)
        return 2.0 * (sum(matrix.numel() for matrix in matrices) + self.inner * self.settings.feature_state)

    def state_bytes(self, context: int, element_bytes: int) -> int:
        """K-1 inputs of the convolution, at every context."""
        return (self.settings.conv - 1) * self.inner * element_bytes
