"""Causal self-attention with a key-value cache: the mixer whose state grows with the context.

Legend: B rows, T tokens, S cached and new keys, D model width, H query heads, G key-value heads, P head dim.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Self

import torch
from torch import Tensor, nn

from longspan.foundation.config import Config
from longspan.foundation.errors import UserError
from longspan.models.mixers.base import Mixer, MixerState, init_linear, register
from longspan.models.segments import Segments
from longspan.ops.attention import attention
from longspan.ops.rotary import rotary

Positions = Literal["rope", "nope", "alibi", "learned"]


class AttentionSettings(Config):
    """Settings of one attention mixer.

    Attributes:
        heads: query heads; must divide the width.
        kv_heads: key-value heads (grouped-query attention); must divide `heads`; None: as many as `heads`.
        positions: `rope`, `nope` (none), `alibi`, or `learned` (the model adds them to the embeddings).
        rope_base: base of the rotary frequencies.
        attention_bias: biases on the query, key, value and output projections.
    """

    heads: int | None = None
    kv_heads: int | None = None
    positions: Positions = "rope"
    rope_base: float = 10_000.0
    attention_bias: bool = False


class _Cache:
    """Room for keys and values; whoever holds the newest state may fill the free part."""

    def __init__(self, k_BSGP: Tensor, v_BSGP: Tensor, used: int) -> None:
        self.k_BSGP, self.v_BSGP, self.used = k_BSGP, v_BSGP, used


@dataclass(frozen=True)
class AttentionState(MixerState):
    """Keys and values of the tokens still visible: the first `length` entries of the cache."""

    cache: _Cache | None = None
    length: int = 0

    def live(self) -> tuple[Tensor, Tensor] | None:
        """Keys and values (B, length, G, P), views; None before the first token."""
        if self.cache is None:
            return None
        return self.cache.k_BSGP[:, : self.length], self.cache.v_BSGP[:, : self.length]

    def map(self, function: Callable[[Tensor], Tensor]) -> Self:
        """The same state with `function` applied to the live keys and values."""
        live = self.live()
        if live is None:
            return self
        k, v = function(live[0]), function(live[1])
        return type(self)(_Cache(k, v, self.length), self.length)

    def bytes(self) -> int:
        """Bytes of the live keys and values, spare room not counted."""
        return sum(t.numel() * t.element_size() for t in self.live() or ())

    def append(self, k_BTGP: Tensor, v_BTGP: Tensor) -> Self:
        """The state with T more keys and values; this state stays valid."""
        length = self.length + k_BTGP.shape[1]
        live = self.live()
        if torch.is_grad_enabled() and k_BTGP.requires_grad:
            old_k, old_v = live or (k_BTGP[:, :0], v_BTGP[:, :0])
            return type(self)(_Cache(torch.cat([old_k, k_BTGP], 1), torch.cat([old_v, v_BTGP], 1), length), length)
        cache = self.cache
        # Only the newest state may write into the shared room: another continuation of this state may already have.
        if cache is None or cache.used != self.length or cache.k_BSGP.shape[1] < length:
            cache = self._with_room(k_BTGP, length)
        cache.k_BSGP[:, self.length : length] = k_BTGP
        cache.v_BSGP[:, self.length : length] = v_BTGP
        cache.used = length
        return type(self)(cache, length)

    def _with_room(self, like_BTGP: Tensor, length: int) -> _Cache:
        rows, _, groups, head_dim = like_BTGP.shape
        room = length if self.length == 0 else -(-(length + length // 4) // 64) * 64
        k, v = (like_BTGP.new_empty(rows, room, groups, head_dim) for _ in range(2))
        live = self.live()
        if live is not None:
            k[:, : self.length], v[:, : self.length] = live
        return _Cache(k, v, self.length)

    def drop(self, keep_from: int) -> Self:
        """Without the first `keep_from` entries."""
        live = self.live()
        if keep_from == 0 or live is None:
            return self
        k, v = (t[:, keep_from:].clone() for t in live)
        return type(self)(_Cache(k, v, k.shape[1]), k.shape[1])


@register("A")
class Attention(Mixer):
    """Multi-head or grouped-query attention; scale 1/sqrt(P); rotary embedding over the whole head in NeoX pairing."""

    name = "attention"
    Settings = AttentionSettings
    isolated_as = "attention"

    @classmethod
    def check(cls, width: int, settings: Config) -> None:
        """Refuse heads that do not divide the width, and the like."""
        assert isinstance(settings, AttentionSettings)
        heads, kv_heads = settings.heads, settings.kv_heads
        if heads is None:
            raise UserError("attention has no number of heads", f"a divisor of the width {width}", "set `heads`")
        if heads < 1 or width % heads:
            near = sorted((d for d in range(1, width + 1) if width % d == 0), key=lambda d: abs(d - heads))[:4]
            allowed = f"a divisor of the width {width}"
            raise UserError(f"heads = {heads}", allowed, f"use one of {', '.join(map(str, sorted(near)))}")
        if kv_heads is not None and (kv_heads < 1 or heads % kv_heads):
            raise UserError(f"kv_heads = {kv_heads}", f"a divisor of heads = {heads}", "change one of the two")
        if settings.positions == "rope" and (width // heads) % 2:
            odd = f"rotary positions on a head dimension of {width // heads} (width {width} / heads {heads})"
            raise UserError(odd, "an even head dimension", "change `heads` or `width`, or use other positions")
        if settings.rope_base <= 0:
            raise UserError(f"rope_base = {settings.rope_base}", "a positive number", "the usual base is 10000")

    @classmethod
    def width_step(cls, settings: Config) -> int:
        """A multiple of the heads, of twice the heads with rotary positions."""
        assert isinstance(settings, AttentionSettings)
        return (settings.heads or 1) * (2 if settings.positions == "rope" else 1)

    def __init__(self, width: int, settings: AttentionSettings) -> None:
        super().__init__()
        self.check(width, settings)
        assert settings.heads is not None
        self.settings = settings
        self.width = width
        self.heads = settings.heads
        self.kv_heads = settings.kv_heads or settings.heads
        self.head_dim = width // settings.heads
        # One matrix, rows in the order query, key, value: one large product in place of three.
        rows = (self.heads + 2 * self.kv_heads) * self.head_dim
        self.qkv_proj = nn.Linear(width, rows, bias=settings.attention_bias)
        self.out_proj = nn.Linear(self.heads * self.head_dim, width, bias=settings.attention_bias)
        self.alibi_slopes_H: Tensor | None
        slopes = torch.empty(self.heads) if settings.positions == "alibi" else None
        self.register_buffer("alibi_slopes_H", slopes, persistent=False)

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator) -> None:
        """Kaiming-uniform projections, zero biases."""
        init_linear(self.qkv_proj, generator)
        init_linear(self.out_proj, generator)
        if self.alibi_slopes_H is not None:
            self.alibi_slopes_H.copy_(torch.tensor(alibi_slopes(self.heads)))

    def initial_state(self) -> AttentionState:
        """An empty cache."""
        return AttentionState()

    def forward(self, x_BTD: Tensor, segments: Segments, state: MixerState | None) -> tuple[Tensor, MixerState | None]:
        """See `Mixer.forward`."""
        rows, num_tokens, _ = x_BTD.shape
        qkv = self.qkv_proj(x_BTD).view(rows, num_tokens, -1, self.head_dim)
        qk, v = qkv.split([self.heads + self.kv_heads, self.kv_heads], dim=2)
        if self.settings.positions == "rope":
            dtype = torch.float64 if qk.dtype == torch.float64 else torch.float32
            qk = rotary(qk, segments.rotation(self.head_dim, self.settings.rope_base, dtype))
        q, k = qk.split([self.heads, self.kv_heads], dim=2)
        after: AttentionState | None = None
        if state is not None:
            assert isinstance(state, AttentionState)
            after = state.append(k, v)
            live = after.live()
            assert live is not None
            k, v = live
            after = after.drop(segments.keep_from)
        y_BTHP = attention(
            q,
            k,
            v,
            q_doc_BT=segments.attention_doc,
            k_doc_BS=segments.key_doc,
            q_offset=segments.num_keys,
            alibi_slopes_H=self.alibi_slopes_H,
        )
        return self.out_proj(y_BTHP.reshape(rows, num_tokens, -1)), after

    def flops(self, context: int) -> float:
        """Projections, and scores and values over the causal average of context/2 keys."""
        projections = 2 * (self.qkv_proj.weight.numel() + self.out_proj.weight.numel())
        return float(projections + 2 * context * self.heads * self.head_dim)

    def state_bytes(self, context: int, element_bytes: int) -> int:
        """Keys and values of every token."""
        return 2 * context * self.kv_heads * self.head_dim * element_bytes


def alibi_slopes(heads: int) -> list[float]:
    """One slope per head (Press et al. 2022, and their published code for numbers that are no power of two)."""
    power = 2 ** math.floor(math.log2(heads))
    slopes = [2.0 ** (-8.0 * (i + 1) / power) for i in range(power)]
    between = [2.0 ** (-8.0 * (2 * i + 1) / (2 * power)) for i in range(heads - power)]
    return slopes + between
