"""Mamba-2: a selective state-space mixer whose state has the same size at every context.

Legend: B rows, T tokens, D model width, H heads, P head dim, N state, G = 1 group, K conv width.
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
from longspan.models.mixers.short_conv import ConvolvedState, short_conv
from longspan.models.norms import GatedRMSNorm
from longspan.models.segments import LONGEST_CONVOLUTION, Segments
from longspan.ops import kernels, mamba2
from longspan.ops.causal_conv import causal_conv_step
from longspan.ops.mamba2_step import mamba2_step
from longspan.ops.ssd import ssd, ssd_step

DT_MIN, DT_MAX, DT_FLOOR = 1e-3, 1e-1, 1e-4


class Mamba2Settings(Config):
    """Settings of one Mamba-2 mixer.

    Attributes:
        state: N, the state per head and channel.
        expand: inner width / model width, an integer (the exported formats allow no other).
        mamba_head_dim: P; must divide expand * width.
        conv: taps of the convolution before the scan.
        decay_init: A starts uniform between these two, as `A_init_range` in the authors' code; near 0 a fresh state
            forgets next to nothing.
        dt_init: dt starts log-uniform between these two, as `dt_min` and `dt_max` there.
        chunk: tokens per chunk of the matmul form; changes speed, not results.
        norm_eps: of the gated norm.
    """

    state: int = Field(64, ge=1)
    expand: int = Field(2, ge=1)
    mamba_head_dim: int = Field(64, ge=1)
    conv: int = Field(4, ge=2, le=LONGEST_CONVOLUTION)
    decay_init: tuple[float, float] = (1.0, 16.0)
    dt_init: tuple[float, float] = (DT_MIN, DT_MAX)
    chunk: int = Field(64, ge=1)
    norm_eps: float = Field(1e-5, gt=0)


@dataclass(frozen=True)
class Mamba2State(ConvolvedState):
    """The last K-1 inputs of the convolution (B, K-1, channels), their documents, and the scan state (B, H, P, N)."""

    scan: Tensor | None = None


@register("M")
class Mamba2(Mixer):
    """Mamba-2 (Dao & Gu 2024) as in `mamba_ssm/modules/mamba2.py` and transformers' `Mamba2Mixer`, one B/C group.

    The rows of `in_proj` are z, x, B, C, dt; the convolution has a bias.
    """

    name = "mamba2"
    Settings = Mamba2Settings
    no_decay = frozenset({"A_log", "D", "dt_bias", "conv_bias", "norm.weight"})
    fp32 = frozenset({"A_log", "D", "dt_bias"})

    @classmethod
    def check(cls, width: int, settings: Config) -> None:
        """Refuse a head dimension that does not divide the inner width, and ranges that are none."""
        assert isinstance(settings, Mamba2Settings)
        for name in ("decay_init", "dt_init"):
            low, high = getattr(settings, name)
            if not 0 < low <= high:
                allowed = "two positive numbers, the smaller one first"
                raise UserError(
                    f"{name} = [{low:g}, {high:g}]", allowed, "one value alone is a range too: write it twice"
                )
        inner, head_dim = settings.expand * width, settings.mamba_head_dim
        if inner % head_dim:
            near = sorted((d for d in range(1, inner + 1) if inner % d == 0), key=lambda d: abs(d - head_dim))[:4]
            allowed = f"a divisor of expand * width = {inner}"
            raise UserError(f"mamba_head_dim = {head_dim}", allowed, f"use one of {', '.join(map(str, sorted(near)))}")

    @classmethod
    def width_step(cls, settings: Config) -> int:
        """Widths for which the head dimension divides expand * width."""
        assert isinstance(settings, Mamba2Settings)
        return settings.mamba_head_dim // math.gcd(settings.mamba_head_dim, settings.expand)

    def __init__(self, width: int, settings: Mamba2Settings) -> None:
        super().__init__()
        self.check(width, settings)
        self.settings = settings
        self.inner = settings.expand * width
        self.heads = self.inner // settings.mamba_head_dim
        self.conv_width = self.inner + 2 * settings.state
        self.in_proj = nn.Linear(width, self.inner + self.conv_width + self.heads, bias=False)
        self.conv_weight = nn.Parameter(torch.empty(self.conv_width, settings.conv))
        self.conv_bias = nn.Parameter(torch.empty(self.conv_width))
        self.dt_bias = nn.Parameter(torch.empty(self.heads))
        self.A_log = nn.Parameter(torch.empty(self.heads))
        self.D = nn.Parameter(torch.empty(self.heads))
        self.norm = GatedRMSNorm(self.inner, settings.norm_eps)
        self.out_proj = nn.Linear(self.inner, width, bias=False)

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator) -> None:
        """As the authors' code: A uniform, dt log-uniform, D = 1, convolution as `nn.Conv1d`."""
        init_linear(self.in_proj, generator)
        bound = 1.0 / math.sqrt(self.settings.conv)
        self.conv_weight.uniform_(-bound, bound, generator=generator)
        self.conv_bias.uniform_(-bound, bound, generator=generator)
        self.A_log.uniform_(*self.settings.decay_init, generator=generator).log_()
        low, high = map(math.log, self.settings.dt_init)
        dt = self.dt_bias.uniform_(low, high, generator=generator).exp().clamp(min=DT_FLOOR)
        # softplus(dt_bias) = dt
        self.dt_bias.copy_(dt + torch.log(-torch.expm1(-dt)))
        self.D.fill_(1.0)
        self.norm.init_weights()
        init_linear(self.out_proj, generator)

    def traceable(self, device: torch.device) -> bool:
        """As kernels; plain torch would be unrolled chunk by chunk."""
        return kernels.wanted(device)

    def initial_state(self) -> Mamba2State:
        """Nothing seen."""
        return Mamba2State()

    def forward(self, x_BTD: Tensor, segments: Segments, state: MixerState | None) -> tuple[Tensor, MixerState | None]:
        """See `Mixer.forward`."""
        assert state is None or isinstance(state, Mamba2State)
        before = state or Mamba2State()
        rows, num_tokens, _ = x_BTD.shape
        settings, doc_BT = self.settings, segments.state_doc
        if segments.step is not None:
            return self._fixed_step(x_BTD, before), before
        if num_tokens == 1 and doc_BT is None and before.scan is not None:
            return self._step(x_BTD, before)
        sizes = (self.inner, settings.conv, settings.mamba_head_dim, settings.state)
        if state is None and mamba2.serves(x_BTD, *sizes):
            # Tokens in one dimension: for a compiler every view of a product is a reason to copy it.
            between_ME = self._between_projections(self.in_proj(x_BTD.flatten(0, 1)), doc_BT, rows)
            return self.out_proj(between_ME).unflatten(0, (rows, num_tokens)), None
        begins = state is not None and before.scan is None and num_tokens >= settings.conv
        if begins and not torch.is_grad_enabled() and mamba2.serves(x_BTD, *sizes):
            return self._read(x_BTD, doc_BT)
        z, xBC, dt = self.in_proj(x_BTD).split_with_sizes([self.inner, self.conv_width, self.heads], dim=-1)
        xBC, tail, tail_doc = short_conv(xBC, self.conv_weight, self.conv_bias, segments, before.tail, before.tail_doc)
        x, B, C = xBC.split_with_sizes([self.inner, settings.state, settings.state], dim=-1)
        # The scan chooses its own precision: autocast would round its sums of decays.
        with without_autocast(x_BTD.device):
            y_BTHP, scan = ssd(
                x.reshape(rows, num_tokens, self.heads, settings.mamba_head_dim),
                F.softplus(dt.float() + self.dt_bias.float()),
                -torch.exp(self.A_log.float()),
                B[:, :, None],
                C[:, :, None],
                self.D.float(),
                doc_BT=doc_BT,
                initial_state_BHPN=before.scan,
                initial_doc_B=segments.previous_doc if before.scan is not None else None,
                chunk=settings.chunk,
            )
        y_BTD = self.out_proj(self.norm(y_BTHP.flatten(2), z))
        return y_BTD, None if state is None else Mamba2State(tail, tail_doc, scan)

    def _between_projections(self, projected_MK: Tensor, doc_BT: Tensor | None, rows: int) -> Tensor:
        """(B * T, E): what `forward` does in steps, for rows that start here."""
        settings = self.settings
        with without_autocast(projected_MK.device):
            return mamba2.between_projections(
                projected_MK,
                self.conv_weight,
                self.conv_bias,
                self.dt_bias,
                self.A_log,
                self.D,
                self.norm.weight,
                doc_BT=doc_BT,
                rows=rows,
                state=settings.state,
                eps=settings.norm_eps,
            )

    def _read(self, x_BTD: Tensor, doc_BT: Tensor | None) -> tuple[Tensor, Mamba2State]:
        """The beginning of a prompt, without gradients."""
        settings, last = self.settings, x_BTD.shape[1] - self.settings.conv + 1
        projected_BTK = self.in_proj(x_BTD)
        parameters = (self.conv_weight, self.conv_bias, self.dt_bias, self.A_log, self.D, self.norm.weight)
        y_BTE, scan = mamba2.read_between_projections(
            projected_BTK, *parameters, doc_BT=doc_BT, state=settings.state, eps=settings.norm_eps
        )
        # Copies: a view would keep what the whole prompt was projected to alive.
        tail = projected_BTK[:, last:, self.inner : self.inner + self.conv_width].clone()
        tail_doc = None if doc_BT is None else doc_BT[:, last:].clone()
        return self.out_proj(y_BTE), Mamba2State(tail, tail_doc, scan)

    def _step(self, x_B1D: Tensor, before: Mamba2State) -> tuple[Tensor, Mamba2State]:
        """One more token of the open document: decoding, where every call into torch counts."""
        assert before.tail is not None
        assert before.scan is not None
        size = self.settings.state
        z, xBC, dt = self.in_proj(x_B1D[:, 0]).split_with_sizes([self.inner, self.conv_width, self.heads], dim=-1)
        conv_weight, conv_bias = self.conv_weight.to(xBC.dtype), self.conv_bias.to(xBC.dtype)
        xBC, tail = causal_conv_step(xBC, conv_weight, conv_bias, before.tail.to(xBC.dtype))
        x, B, C = F.silu(xBC).float().split_with_sizes([self.inner, size, size], dim=-1)
        with without_autocast(x_B1D.device):
            y_BHP, scan = ssd_step(
                x.view(-1, self.heads, self.settings.mamba_head_dim),
                F.softplus(dt.float() + self.dt_bias.float()),
                torch.exp(self.A_log.float()).neg_(),
                B.unsqueeze(1),
                C.unsqueeze(1),
                self.D.float(),
                before.scan,
            )
        y_BD = self.out_proj(self.norm(y_BHP.flatten(1).to(z.dtype), z))
        return y_BD.unsqueeze(1), Mamba2State(tail, None, scan)

    def _fixed_step(self, x_B1D: Tensor, state: Mamba2State) -> Tensor:
        """One more token, on a state that it overwrites."""
        assert state.tail is not None
        assert state.scan is not None
        z, xBC, dt = self.in_proj(x_B1D[:, 0]).split_with_sizes([self.inner, self.conv_width, self.heads], dim=-1)
        filters = (self.conv_weight, self.conv_bias)
        with without_autocast(x_B1D.device):
            y_BHP = mamba2_step(xBC, dt, *filters, self.dt_bias, self.A_log, self.D, state.tail, state.scan)
        return self.out_proj(self.norm(y_BHP.flatten(1), z)).unsqueeze(1)  # type: ignore[no-any-return]

    def flops(self, context: int) -> float:
        """Projections, convolution, and the causal half of the chunked scan (facts: QNG + QHP + 4HPN)."""
        chunk, state = min(self.settings.chunk, context), self.settings.state
        linear = 2 * (self.in_proj.weight.numel() + self.out_proj.weight.numel() + self.conv_weight.numel())
        return float(linear + chunk * (state + self.inner) + 4 * self.inner * state)

    def state_bytes(self, context: int, element_bytes: int) -> int:
        """The scan state in fp32 and K-1 inputs of the convolution."""
        return 4 * self.inner * self.settings.state + (self.settings.conv - 1) * self.conv_width * element_bytes
