"""Causal self-attention with a key-value cache: the mixer whose state grows with the context.

Legend: B rows, T tokens, S cached and new keys, D model width, H query heads, G key-value heads, P head dim.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from longspan.foundation.config import Config
from longspan.foundation.errors import UserError
from longspan.models.mixers.attention_state import AttentionState, Cache, FixedAttentionState
from longspan.models.mixers.base import Mixer, MixerState, computed_dtype, init_linear, register
from longspan.models.segments import Segments, Step
from longspan.ops.attention import attention
from longspan.ops.decode_attention import decode_attention, place_token
from longspan.ops.flex_attention import flex_serves
from longspan.ops.rotary import RopeScaling, Rotation, rotary

Positions = Literal["rope", "nope", "alibi", "hard_alibi", "hard_alibi_rope", "learned"]


class AttentionSettings(Config):
    """Settings of one attention mixer.

    Attributes:
        heads: query heads; must divide the width.
        kv_heads: key-value heads (grouped-query attention); must divide `heads`; None: as many as `heads`.
        positions: `rope`, `nope` (none), `alibi`, `learned` (the model adds them to the embeddings), or `hard_alibi`:
            head i of the first `masked_heads` sees itself and the i tokens before it (i from 0), the others see all
            and have no positions, or rotary ones with `hard_alibi_rope` (Jelassi et al. 2024).
        masked_heads: of `hard_alibi`; None: half of the heads.
        rope_base: base of the rotary frequencies.
        rope_scaling: how they are slowed for long contexts; None: not.
        attention_bias: biases on the query, key, value and output projections.
        attention_dropout: probability of dropping an attention weight in training; drawn from torch's own generator of
            the device.
    """

    heads: int | None = None
    kv_heads: int | None = None
    positions: Positions = "rope"
    masked_heads: int | None = Field(None, ge=1)
    rope_base: float = 10_000.0
    rope_scaling: RopeScaling | None = None
    attention_bias: bool = False
    attention_dropout: float = Field(0.0, ge=0, lt=1)

    @property
    def num_masked(self) -> int:
        """Heads that see a few tokens only."""
        if not self.positions.startswith("hard_alibi"):
            return 0
        return (self.heads or 0) // 2 if self.masked_heads is None else self.masked_heads

    @property
    def rotates(self) -> bool:
        """Whether some heads have rotary positions."""
        return self.positions in ("rope", "hard_alibi_rope")


@register("A")
class Attention(Mixer):
    """Multi-head or grouped-query attention; scale 1/sqrt(P); rotary embedding over the whole head in NeoX pairing.

    Attributes:
        window: each token sees so many, itself included; None: all before it.
    """

    name = "attention"
    Settings = AttentionSettings
    isolated_as = "attention"
    carried = 2
    windowed: ClassVar[bool] = False
    window: int | None = None

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
        if settings.rotates and (width // heads) % 2:
            odd = f"rotary positions on a head dimension of {width // heads} (width {width} / heads {heads})"
            raise UserError(odd, "an even head dimension", "change `heads` or `width`, or use other positions")
        cls._check_masked(settings, heads)
        if settings.rope_base <= 0:
            raise UserError(f"rope_base = {settings.rope_base}", "a positive number", "the usual base is 10000")

    @classmethod
    def _check_masked(cls, settings: AttentionSettings, heads: int) -> None:
        """Refuse hard ALiBi where its heads have no meaning."""
        if not settings.positions.startswith("hard_alibi"):
            return
        if not 1 <= settings.num_masked < heads:
            given = f"{settings.num_masked} masked heads of {heads}"
            raise UserError(given, f"1 to {heads - 1}: some see few tokens, some see all", "change `masked_heads`")
        if settings.kv_heads not in (None, heads):
            given = f"positions `{settings.positions}` with {settings.kv_heads} key-value heads for {heads} heads"
            raise UserError(given, "keys of its own for every head", "leave `kv_heads` out")
        if cls.windowed:
            raise UserError(
                f"positions `{settings.positions}` with a sliding window", "other positions", "use attention, `A`"
            )

    @classmethod
    def width_step(cls, settings: Config) -> int:
        """A multiple of the heads, of twice the heads with rotary positions."""
        assert isinstance(settings, AttentionSettings)
        return (settings.heads or 1) * (2 if settings.rotates else 1)

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
        self.num_masked = settings.num_masked
        self.head_windows_H: Tensor | None
        windows = torch.empty(self.num_masked, dtype=torch.int64) if self.num_masked else None
        self.register_buffer("head_windows_H", windows, persistent=False)

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator) -> None:
        """Kaiming-uniform projections, zero biases."""
        init_linear(self.qkv_proj, generator)
        init_linear(self.out_proj, generator)
        if self.alibi_slopes_H is not None:
            self.alibi_slopes_H.copy_(torch.tensor(alibi_slopes(self.heads)))
        if self.head_windows_H is not None:
            self.head_windows_H.copy_(torch.arange(1, self.num_masked + 1))

    def traceable(self, device: torch.device) -> bool:
        """On a CPU documents decide which calls are made."""
        return device.type != "cpu"

    def prepare(self, segments: Segments, x_BTD: Tensor) -> None:
        """Angles and the mask of the batch."""
        dtype = computed_dtype(x_BTD)
        if self.settings.rotates:
            self._rotation(segments, dtype)
        q_BTHP = x_BTD.new_empty((), dtype=dtype).expand(*x_BTD.shape[:2], self.heads, self.head_dim)
        if not self.num_masked and self._has_flex(q_BTHP, segments):
            segments.block_mask(self.window)

    def initial_state(self) -> AttentionState:
        """An empty cache."""
        return AttentionState()

    def forward(self, x_BTD: Tensor, segments: Segments, state: MixerState | None) -> tuple[Tensor, MixerState | None]:
        """See `Mixer.forward`."""
        rows, num_tokens, _ = x_BTD.shape
        if segments.step is not None:
            assert isinstance(state, FixedAttentionState)
            return self._fixed_step(x_BTD, segments, segments.step, state), state
        qkv = self.qkv_proj(x_BTD).view(rows, num_tokens, -1, self.head_dim)
        qk, v = qkv.split([self.heads + self.kv_heads, self.kv_heads], dim=2)
        if self.settings.rotates:
            qk = self._rotated(qk, segments)
        q, k = qk.split([self.heads, self.kv_heads], dim=2)
        # A window's cache is the end of what the whole cache would be, and so are the documents of its keys.
        num_cached = self._cached(segments.num_keys)
        after: AttentionState | None = None
        if state is not None:
            assert isinstance(state, AttentionState)
            assert state.length == num_cached
            after = state.append(k, v)
            live = after.live()
            assert live is not None
            k, v = live
            after = after.last(self._cached(segments.past.num_keys))
        key_doc = segments.key_doc
        k_doc = None if key_doc is None else key_doc[:, segments.num_keys - num_cached :]
        if state is None and not self.num_masked and self._has_flex(q, segments):
            rules: dict[str, Any] = {"alibi_slopes_H": self.alibi_slopes_H, "window": self.window}
            y_BTHP = attention(q, k, v, **rules, backend="flex", block_mask=segments.block_mask(self.window))
        else:
            y_BTHP = self._attend(q, k, v, segments.attention_doc, k_doc, num_cached)
        return self.out_proj(y_BTHP.reshape(rows, num_tokens, -1)), after

    def _fixed_step(self, x_B1D: Tensor, segments: Segments, step: Step, state: FixedAttentionState) -> Tensor:
        """One more token, whose key and value go into the ring."""
        qkv_BKP = self.qkv_proj(x_B1D[:, 0]).unflatten(1, (-1, self.head_dim))
        rotation = self._rotation(segments, qkv_BKP.dtype) if self.settings.rotates else None
        q_BHP = place_token(qkv_BKP, rotation, self.num_masked, state.keys, state.values, step.newest)
        windows = None
        if self.head_windows_H is not None:
            windows = F.pad(self.head_windows_H, (0, self.heads - self.num_masked))
        y_BHP = decode_attention(
            q_BHP,
            state.keys,
            state.values,
            step.newest,
            step.first,
            alibi_slopes_H=self.alibi_slopes_H,
            window=self.window,
            head_windows_H=windows,
        )
        return self.out_proj(y_BHP.flatten(1))[:, None]  # type: ignore[no-any-return]

    def fixed_state(self, state: MixerState, slots: int) -> FixedAttentionState:
        """See `Mixer.fixed_state`; a window needs no more slots than it is wide."""
        assert isinstance(state, AttentionState)
        live = state.live()
        assert live is not None
        slots = slots if self.window is None else self.window
        # Zeros: what no key has been written to is multiplied by a weight of 0.
        k, v = (each.new_zeros(each.shape[0], slots, *each.shape[2:]) for each in live)
        return FixedAttentionState(k, v)

    def start_in(self, fixed: MixerState) -> AttentionState:
        """An empty cache; without a window it fills the ring, which never turns."""
        assert isinstance(fixed, FixedAttentionState)
        if self.window is not None:
            return self.initial_state()
        return AttentionState(Cache(fixed.keys, fixed.values, 0), 0, 0)

    def fix(self, state: MixerState, fixed: MixerState, num_keys: int) -> None:
        """See `Mixer.fix`."""
        assert isinstance(state, AttentionState)
        assert isinstance(fixed, FixedAttentionState)
        live = state.live()
        if live is None or state.cache is None:
            return
        slots = fixed.keys.shape[1]
        if state.cache.k_BSGP.data_ptr() == fixed.keys.data_ptr():
            # Steps write behind these entries: a call that goes on from this state has to find room elsewhere.
            state.cache.used = slots
        for held, given in zip((fixed.keys, fixed.values), live, strict=True):
            if held.data_ptr() == given.data_ptr():
                continue
            if held.untyped_storage().data_ptr() == given.untyped_storage().data_ptr():
                given = given.clone()
            if self.window is None:
                held[:, : state.length] = given
            else:
                places = torch.arange(num_keys - state.length, num_keys, device=held.device)
                held.index_copy_(1, places % slots, given.expand(held.shape[0], -1, -1, -1))

    def unfix(self, fixed: MixerState, num_keys: int) -> AttentionState:
        """See `Mixer.unfix`."""
        assert isinstance(fixed, FixedAttentionState)
        places = torch.arange(num_keys - self._cached(num_keys), num_keys, device=fixed.keys.device)
        slots = places % fixed.keys.shape[1]
        return AttentionState.of(fixed.keys.index_select(1, slots), fixed.values.index_select(1, slots))

    def fixed_bytes(self, fixed: MixerState, num_keys: int) -> int:
        """See `Mixer.fixed_bytes`."""
        assert isinstance(fixed, FixedAttentionState)
        return fixed.bytes() // fixed.keys.shape[1] * self._cached(num_keys)

    def _has_flex(self, q_BTHP: Tensor, segments: Segments) -> bool:
        """One document to a row needs no mask, and no kernel that takes one."""
        dropout = self.settings.attention_dropout if self.training else 0.0
        return segments.attention_doc is not None and flex_serves(q_BTHP, dropout)

    def _rotated(self, qk_BTHP: Tensor, segments: Segments) -> Tensor:
        """Queries and keys with rotary positions; masked heads have none."""
        rotation = self._rotation(segments, qk_BTHP.dtype)
        if not self.num_masked:
            return rotary(qk_BTHP, rotation)
        masked = self.num_masked
        parts = [(part[:, :, :masked], part[:, :, masked:]) for part in torch.split(qk_BTHP, self.heads, dim=2)]
        return torch.cat([each for low, high in parts for each in (low, rotary(high, rotation))], dim=2)

    def _rotation(self, segments: Segments, dtype: torch.dtype) -> Rotation:
        precise = torch.float64 if dtype == torch.float64 else torch.float32
        return segments.rotation(self.head_dim, self.settings.rope_base, precise, self.settings.rope_scaling)

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, q_doc: Tensor | None, k_doc: Tensor | None, offset: int
    ) -> Tensor:
        """(B, T, H, P); heads with windows of their own go through on their own."""
        dropout = self.settings.attention_dropout if self.training else 0.0
        slopes, masked = self.alibi_slopes_H, self.num_masked
        documents: dict[str, Any] = {"q_doc_BT": q_doc, "k_doc_BS": k_doc, "q_offset": offset, "dropout": dropout}
        if not masked:
            return attention(q, k, v, **documents, alibi_slopes_H=slopes, window=self.window)
        near, far = (tuple(part[:, :, heads] for part in (q, k, v)) for heads in (slice(masked), slice(masked, None)))
        return torch.cat(
            [
                attention(*near, **documents, window=masked, head_windows_H=self.head_windows_H),
                attention(*far, **documents),
            ],
            dim=2,
        )

    def flops(self, context: int) -> float:
        """Projections, and scores and values over the causal average of context/2 keys, fewer in a window."""
        projections = 2 * (self.qkv_proj.weight.numel() + self.out_proj.weight.numel())
        windows = [self.window] * (self.heads - self.num_masked) + list(range(1, self.num_masked + 1))
        reaches = [context if window is None else min(context, window) for window in windows]
        keys = sum(reach - reach * reach / (2 * context) for reach in reaches)
        return projections + 4 * keys * self.head_dim

    def state_bytes(self, context: int, element_bytes: int) -> int:
        """Keys and values of every token, in a window of all that the next token still sees."""
        return 2 * self._cached(context) * self.kv_heads * self.head_dim * element_bytes

    def _cached(self, num_keys: int) -> int:
        """How many of `num_keys` keys stay in the cache."""
        return num_keys if self.window is None else min(num_keys, self.window - 1)


def alibi_slopes(heads: int) -> list[float]:
    """One slope per head (Press et al. 2022, and their published code for numbers that are no power of two)."""
    power = 2 ** math.floor(math.log2(heads))
    slopes = [2.0 ** (-8.0 * (i + 1) / power) for i in range(power)]
    between = [2.0 ** (-8.0 * (2 * i + 1) / (2 * power)) for i in range(heads - power)]
    return slopes + between
