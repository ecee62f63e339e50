"""Gated DeltaNet: a recurrent mixer that corrects what its state remembers of a key instead of adding to it.

Legend: B rows, T tokens, D model width, H heads, K key dim, V value dim of a head.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from longspan.foundation.config import Config
from longspan.foundation.errors import UserError
from longspan.models.mixers.base import Mixer, MixerState, init_linear, register, without_autocast
from longspan.models.mixers.mamba2 import DT_FLOOR, DT_MAX, DT_MIN
from longspan.models.mixers.short_conv import ConvolvedState, short_conv
from longspan.models.norms import RMSNorm
from longspan.models.segments import LONGEST_CONVOLUTION, Segments
from longspan.ops import gated_deltanet as deltanet
from longspan.ops import kernels
from longspan.ops.causal_conv import causal_conv_step
from longspan.ops.delta_step import delta_step
from longspan.ops.gated_delta import LARGEST_KERNEL_KEY, gated_delta, gated_delta_step

A_MIN, A_MAX = 0.01, 16.0
WHOLE_COLUMNS = 8
"""16 bytes of bf16: products whose rows are no multiple of it run 2.5 times as long on Hopper (docs/LOG.md), and two
gates of an odd number of heads make such rows."""
MANY_ROWS = 256
"""Of one token: where the product costs more than the zeros put beside its weight."""


class GatedDeltaNetSettings(Config):
    """Settings of one Gated DeltaNet mixer.

    Attributes:
        delta_head_dim: K, the key dimension of a head.
        delta_heads: H; None: 3/4 width / delta_head_dim, which makes about 6 width^2 parameters and must be whole.
        expand_v: value dimension / key dimension of a head, an integer.
        conv: taps of the convolution over q, k and v.
        norm_eps: of the norm before the gate.
        negative_eigenvalues: beta in [0, 2] instead of [0, 1], so that a state may also change its sign along a key.
        chunk: tokens per chunk of the matmul form; changes speed, not results.
    """

    delta_head_dim: int = Field(64, ge=1)
    delta_heads: int | None = Field(None, ge=1)
    expand_v: int = Field(2, ge=1)
    conv: int = Field(4, ge=2, le=LONGEST_CONVOLUTION)
    norm_eps: float = Field(1e-5, gt=0)
    negative_eigenvalues: bool = False
    chunk: int = Field(64, ge=1)


@dataclass(frozen=True)
class GatedDeltaNetState(ConvolvedState):
    """The last inputs of the convolution (B, conv - 1, channels), their documents, and the memory (B, H, K, V)."""

    memory: Tensor | None = None


@register("D")
class GatedDeltaNet(Mixer):
    """Gated DeltaNet (Yang, Kautz & Hatamizadeh 2024) as in `fla/layers/gated_deltanet.py` and Qwen3-Next.

    With q, k, v = SiLU(conv(W u)), `beta = sigmoid(b)`, `g = -exp(A_log) softplus(a + dt_bias)` and the recurrence of
    `gated_delta`, the output is `W_o(RMSNorm(o) * SiLU(z))`: the norm comes first, over each head alone. The rows of
    `in_proj` are q, k, v, z, b, a; the convolution has no bias.
    """

    name = "gated_deltanet"
    Settings = GatedDeltaNetSettings
    no_decay = frozenset({"A_log", "dt_bias", "norm.weight"})
    fp32 = frozenset({"A_log", "dt_bias"})

    @classmethod
    def check(cls, width: int, settings: Config) -> None:
        """Refuse a head dimension that gives no whole number of heads."""
        assert isinstance(settings, GatedDeltaNetSettings)
        head_dim = settings.delta_head_dim
        if settings.delta_heads is not None or 3 * width % (4 * head_dim) == 0:
            return
        if width % 4:
            given, fix = f"width = {width} with Gated DeltaNet", "change the width, or set delta_heads"
            raise UserError(given, "a multiple of 4, so that 3/4 width is whole", fix)
        keys = 3 * width // 4
        near = sorted((d for d in range(1, keys + 1) if keys % d == 0), key=lambda d: abs(d - head_dim))[:4]
        fix = f"use one of {', '.join(map(str, sorted(near)))}, or set delta_heads"
        raise UserError(f"delta_head_dim = {head_dim}", f"a divisor of 3/4 width = {keys}", fix)

    @classmethod
    def width_step(cls, settings: Config) -> int:
        """Widths that make a whole number of heads."""
        assert isinstance(settings, GatedDeltaNetSettings)
        if settings.delta_heads is not None:
            return 1
        return 4 * settings.delta_head_dim // math.gcd(3, settings.delta_head_dim)

    def __init__(self, width: int, settings: GatedDeltaNetSettings) -> None:
        super().__init__()
        self.check(width, settings)
        self.settings = settings
        self.heads = settings.delta_heads or 3 * width // (4 * settings.delta_head_dim)
        self.keys = self.heads * settings.delta_head_dim
        self.values = self.keys * settings.expand_v
        self.conv_width = 2 * self.keys + self.values
        self.in_proj = nn.Linear(width, self.conv_width + self.values + 2 * self.heads, bias=False)
        self.conv_weight = nn.Parameter(torch.empty(self.conv_width, settings.conv))
        self.A_log = nn.Parameter(torch.empty(self.heads))
        self.dt_bias = nn.Parameter(torch.empty(self.heads))
        self.norm = RMSNorm(settings.delta_head_dim * settings.expand_v, settings.norm_eps)
        self.out_proj = nn.Linear(self.values, width, bias=False)

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator) -> None:
        """As the authors' code: A ~ U(0, 16) off zero, dt log-uniform in [1e-3, 1e-1]; linears kaiming-uniform."""
        init_linear(self.in_proj, generator)
        bound = 1.0 / math.sqrt(self.settings.conv)
        self.conv_weight.uniform_(-bound, bound, generator=generator)
        self.A_log.uniform_(A_MIN, A_MAX, generator=generator).log_()
        dt = self.dt_bias.uniform_(math.log(DT_MIN), math.log(DT_MAX), generator=generator).exp().clamp(min=DT_FLOOR)
        # softplus(dt_bias) = dt
        self.dt_bias.copy_(dt + torch.log(-torch.expm1(-dt)))
        self.norm.init_weights()
        init_linear(self.out_proj, generator)

    def traceable(self, device: torch.device) -> bool:
        """As a kernel; plain torch would be unrolled chunk by chunk."""
        return kernels.wanted(device) and self.settings.delta_head_dim <= LARGEST_KERNEL_KEY

    def initial_state(self) -> GatedDeltaNetState:
        """Nothing seen."""
        return GatedDeltaNetState()

    def forward(self, x_BTD: Tensor, segments: Segments, state: MixerState | None) -> tuple[Tensor, MixerState | None]:
        """See `Mixer.forward`."""
        assert state is None or isinstance(state, GatedDeltaNetState)
        before = state or GatedDeltaNetState()
        if segments.step is not None:
            return self._fixed_step(x_BTD, before), before
        if x_BTD.shape[1] == 1 and segments.state_doc is None and before.memory is not None:
            return self._step(x_BTD, before)
        whole = WHOLE_COLUMNS if x_BTD.is_cuda else 1
        value_dim = self.settings.delta_head_dim * self.settings.expand_v
        if state is None and deltanet.serves(x_BTD, self.settings.conv, self.settings.delta_head_dim, value_dim):
            return self._between_projections(x_BTD, segments.state_doc, whole), None
        qkv, z, b, a = self._split_projected(self._projected(x_BTD, whole))
        qkv, tail, tail_doc = short_conv(qkv, self.conv_weight, None, segments, before.tail, before.tail_doc)
        q, k, v = (part.view(*part.shape[:2], self.heads, -1) for part in self._split(qkv))
        # The scan chooses its own precision: autocast would round its sums of decays.
        with without_autocast(x_BTD.device):
            o_BTHV, memory = gated_delta(
                q,
                k,
                v,
                *self._gates(b, a),
                doc_BT=segments.state_doc,
                initial_state_BHKV=before.memory,
                initial_doc_B=segments.previous_doc if before.memory is not None else None,
                chunk=self.settings.chunk,
            )
        y_BTD = self.out_proj(self.norm(o_BTHV).flatten(2) * F.silu(z))
        return y_BTD, None if state is None else GatedDeltaNetState(tail, tail_doc, memory)

    def _between_projections(self, x_BTD: Tensor, doc_BT: Tensor | None, whole: int) -> Tensor:
        """What `forward` does in steps, for rows that start here."""
        rows, num_tokens, _ = x_BTD.shape
        # Tokens in one dimension: for a compiler every view of a product is a reason to copy it.
        projected_MP = self._projected(x_BTD.flatten(0, 1), whole)
        with without_autocast(x_BTD.device):
            between_ME = deltanet.between_projections(
                projected_MP,
                self.conv_weight,
                self.dt_bias,
                self.A_log,
                self.norm.weight,
                doc_BT=doc_BT,
                rows=rows,
                eps=self.settings.norm_eps,
                negative_eigenvalues=self.settings.negative_eigenvalues,
            )
        return self.out_proj(between_ME).unflatten(0, (rows, num_tokens))  # type: ignore[no-any-return]

    def _projected(self, x_D: Tensor, whole: int) -> Tensor:
        """q k v, z, b and a as columns of one product, which has zeros after them up to a multiple of `whole`."""
        padding = -self.in_proj.out_features % whole
        if not padding:
            return self.in_proj(x_D)  # type: ignore[no-any-return]
        return F.linear(x_D, F.pad(self.in_proj.weight, (0, 0, 0, padding)))

    def _split_projected(self, projected: Tensor) -> tuple[Tensor, ...]:
        """q k v, z, b and a."""
        sizes = [self.conv_width, self.values, self.heads, self.heads]
        sizes.append(projected.shape[-1] - sum(sizes))
        return projected.split_with_sizes(sizes, dim=-1)[:-1]

    def _step(self, x_B1D: Tensor, before: GatedDeltaNetState) -> tuple[Tensor, GatedDeltaNetState]:
        """One more token of the open document: decoding, where every call into torch counts."""
        assert before.tail is not None
        assert before.memory is not None
        qkv, z, b, a = self._split_projected(self.in_proj(x_B1D[:, 0]))
        qkv, tail = causal_conv_step(qkv, self.conv_weight.to(qkv.dtype), None, before.tail.to(qkv.dtype))
        q, k, v = (part.view(part.shape[0], self.heads, -1) for part in self._split(F.silu(qkv).float()))
        with without_autocast(x_B1D.device):
            o_BHV, memory = gated_delta_step(q, k, v, *self._gates(b, a), before.memory)
        y_BD = self.out_proj(self.norm(o_BHV.to(z.dtype)).flatten(1) * F.silu(z))
        return y_BD.unsqueeze(1), GatedDeltaNetState(tail, None, memory)

    def _fixed_step(self, x_B1D: Tensor, state: GatedDeltaNetState) -> Tensor:
        """One more token, on a state that it overwrites."""
        assert state.tail is not None
        assert state.memory is not None
        many = x_B1D.is_cuda and x_B1D.shape[0] >= MANY_ROWS
        qkv, z, b, a = self._split_projected(self._projected(x_B1D[:, 0], WHOLE_COLUMNS if many else 1))
        with without_autocast(x_B1D.device):
            y_BHV = delta_step(
                qkv,
                z.view(z.shape[0], self.heads, -1),
                b,
                a,
                self.conv_weight,
                self.dt_bias,
                self.A_log,
                self.norm.weight,
                state.tail,
                state.memory,
                eps=self.settings.norm_eps,
                negative_eigenvalues=self.settings.negative_eigenvalues,
            )
        return self.out_proj(y_BHV.flatten(1)).unsqueeze(1)  # type: ignore[no-any-return]

    def _split(self, qkv: Tensor) -> tuple[Tensor, ...]:
        return qkv.split_with_sizes([self.keys, self.keys, self.values], dim=-1)

    def _gates(self, b: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
        """The log decay g and beta, fp32."""
        beta = torch.sigmoid(b.float())
        if self.settings.negative_eigenvalues:
            beta = 2.0 * beta
        return -torch.exp(self.A_log.float()) * F.softplus(a.float() + self.dt_bias.float()), beta

    def flops(self, context: int) -> float:
        """Projections, convolution, and the chunked delta rule with the causal half of its (chunk, chunk) products.

        Those are k k, q k and u at the scores, and the triangular system solved for K + V right-hand sides; the state
        is read for keys and queries and written once.
        """
        chunk, head_dim = min(self.settings.chunk, context), self.settings.delta_head_dim
        linear = 2 * (self.in_proj.weight.numel() + self.out_proj.weight.numel() + self.conv_weight.numel())
        return float(linear + chunk * (3 * self.keys + 2 * self.values) + 6 * self.values * head_dim)

    def state_bytes(self, context: int, element_bytes: int) -> int:
        """The memory in fp32 and conv - 1 inputs of the convolution."""
        memory = 4 * self.values * self.settings.delta_head_dim
        return memory + (self.settings.conv - 1) * self.conv_width * element_bytes
