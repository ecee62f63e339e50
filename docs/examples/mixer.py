"""A mixer of one's own: a gated moving average whose heads forget at learned rates.

Legend: B rows, T tokens, D model width, H heads, P head dim.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from longspan.foundation.config import Config
from longspan.foundation.errors import UserError
from longspan.models.mixers.base import Mixer, MixerState, init_linear, register
from longspan.models.segments import Segments


class MovingAverageSettings(Config):
    """Settings of one moving-average mixer; a study sets them as `model: {mixers: {E: {average_heads: 8}}}`.

    Attributes:
        average_heads: groups of channels that share a rate; must divide the width.
        average_chunk: tokens per chunk of the matmul form; changes speed, not results.
    """

    average_heads: int = Field(4, ge=1)
    average_chunk: int = Field(64, ge=1)


@dataclass(frozen=True)
class MovingAverageState(MixerState):
    """The average after the last token, fp32 (B, H, P)."""

    average: Tensor | None = None


@register("E")
class MovingAverage(Mixer):
    """y_t = a_h y_(t-1) + u_t per head, with a_h in (0, 1) learned, times a gate."""

    name = "moving_average"
    Settings = MovingAverageSettings
    fp32 = frozenset({"rate"})

    @classmethod
    def check(cls, width: int, settings: Config) -> None:
        """Refuse heads that do not divide the width."""
        assert isinstance(settings, MovingAverageSettings)
        if width % settings.average_heads:
            raise UserError(
                f"average_heads = {settings.average_heads} at width {width}", "a divisor of the width", "change one"
            )

    @classmethod
    def width_step(cls, settings: Config) -> int:
        """Widths are multiples of the heads."""
        assert isinstance(settings, MovingAverageSettings)
        return settings.average_heads

    def __init__(self, width: int, settings: MovingAverageSettings) -> None:
        super().__init__()
        self.width, self.heads, self.chunk = width, settings.average_heads, settings.average_chunk
        self.in_proj = nn.Linear(width, 2 * width, bias=False)
        self.rate = nn.Parameter(torch.empty(self.heads))
        self.out_proj = nn.Linear(width, width, bias=False)

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator) -> None:
        """Half-lives from about 1 to 500 tokens."""
        init_linear(self.in_proj, generator)
        init_linear(self.out_proj, generator)
        self.rate.copy_(torch.linspace(0.0, -6.6, self.heads))

    def initial_state(self) -> MovingAverageState:
        """Nothing seen."""
        return MovingAverageState()

    def forward(self, x_BTD: Tensor, segments: Segments, state: MixerState | None) -> tuple[Tensor, MixerState | None]:
        """See `Mixer.forward`."""
        assert state is None or isinstance(state, MovingAverageState)
        u_BTD, gate_BTD = self.in_proj(x_BTD).chunk(2, dim=-1)
        average_BHP = None if state is None else state.average
        previous_B = segments.previous_doc
        parts = []
        # Autocast would round the sums to bf16.
        with torch.autocast(x_BTD.device.type, enabled=False):
            u_BTHP = u_BTD.to(self.rate.dtype).unflatten(-1, (self.heads, -1))
            for start in range(0, segments.num_tokens, self.chunk):
                part = slice(start, start + self.chunk)
                doc_BT = None if segments.state_doc is None else segments.state_doc[:, part]
                y_BTHP = self._scan(u_BTHP[:, part], doc_BT, average_BHP, previous_B)
                average_BHP = y_BTHP[:, -1]
                previous_B = None if doc_BT is None else doc_BT[:, -1]
                parts.append(y_BTHP)
        y_BTD = torch.cat(parts, dim=1).flatten(2).to(x_BTD.dtype)
        # In training there is no state, and none is returned.
        return self.out_proj(y_BTD * F.silu(gate_BTD)), None if state is None else MovingAverageState(average_BHP)

    def _scan(
        self, u_BTHP: Tensor, doc_BT: Tensor | None, before_BHP: Tensor | None, before_doc_B: Tensor | None
    ) -> Tensor:
        """One chunk: what each token keeps of the tokens of its document up to it, and of the average before."""
        log_decay_H = -F.softplus(self.rate)
        time = torch.arange(u_BTHP.shape[1], device=u_BTHP.device)
        distance_TT = time[:, None] - time
        visible_BTT = (distance_TT >= 0)[None]
        if doc_BT is not None:
            visible_BTT = visible_BTT & (doc_BT[:, :, None] == doc_BT[:, None, :])
        # Masked before `exp`: weights of other documents are exactly 0, and no gradient is inf * 0.
        logs_BHTT = (log_decay_H[:, None, None] * distance_TT).masked_fill(~visible_BTT[:, None], -torch.inf)
        y_BTHP = (logs_BHTT.exp() @ u_BTHP.transpose(1, 2)).transpose(1, 2)
        if before_BHP is None:
            return y_BTHP
        carry_BTH = (log_decay_H * (time + 1)[:, None])[None]
        if doc_BT is not None and before_doc_B is not None:
            carry_BTH = carry_BTH.masked_fill((doc_BT != before_doc_B[:, None])[..., None], -torch.inf)
        return y_BTHP + carry_BTH.exp()[..., None] * before_BHP[:, None]

    def flops(self, context: int) -> float:
        """Both projections, the causal half of a chunk, and the carry."""
        matrices = self.in_proj.weight.numel() + self.out_proj.weight.numel()
        return 2.0 * (matrices + self.width * (min(self.chunk, context) + 1) / 2 + self.width)

    def state_bytes(self, context: int, element_bytes: int) -> int:
        """One fp32 average, whatever the context and the compute dtype."""
        return 4 * self.width
