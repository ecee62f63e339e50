"""What attention keeps of the tokens before: keys and values that grow, or a ring of them that steps overwrite.

Legend: B rows, T new tokens, S cached keys, C slots of a ring, G key-value heads, P head dim.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from longspan.models.mixers.base import MixerState

# Dropped keys that a cache may keep alive, beside as many as it needs.
SPARE_KEYS = 64


class Cache:
    """Room for keys and values; whoever holds the newest state may fill the free part."""

    def __init__(self, k_BSGP: Tensor, v_BSGP: Tensor, used: int) -> None:
        self.k_BSGP, self.v_BSGP, self.used = k_BSGP, v_BSGP, used


@dataclass(frozen=True)
class AttentionState(MixerState):
    """Keys and values of the tokens still visible: `length` entries of the cache from `start` on."""

    cache: Cache | None = None
    start: int = 0
    length: int = 0

    @property
    def end(self) -> int:
        """One past the last entry."""
        return self.start + self.length

    def live(self) -> tuple[Tensor, Tensor] | None:
        """Keys and values (B, length, G, P), views; None before the first token."""
        if self.cache is None:
            return None
        return self.cache.k_BSGP[:, self.start : self.end], self.cache.v_BSGP[:, self.start : self.end]

    def map(self, function: Callable[[Tensor], Tensor]) -> Self:
        """The same state with `function` applied to the live keys and values."""
        live = self.live()
        if live is None:
            return self
        return self.of(function(live[0]), function(live[1]))

    def bytes(self) -> int:
        """Bytes of the live keys and values, spare room not counted."""
        return sum(t.numel() * t.element_size() for t in self.live() or ())

    def append(self, k_BTGP: Tensor, v_BTGP: Tensor) -> Self:
        """The state with T more keys and values; this state stays valid."""
        num_tokens = k_BTGP.shape[1]
        live = self.live()
        if torch.is_grad_enabled() and k_BTGP.requires_grad:
            old_k, old_v = live or (k_BTGP[:, :0], v_BTGP[:, :0])
            return self.of(torch.cat([old_k, k_BTGP], 1), torch.cat([old_v, v_BTGP], 1))
        cache, start = self.cache, self.start
        # Only the newest state may write into the shared room: another continuation of this state may already have.
        if cache is None or cache.used != self.end or cache.k_BSGP.shape[1] < self.end + num_tokens:
            cache, start = self._with_room(k_BTGP), 0
        end = cache.used + num_tokens
        cache.k_BSGP[:, cache.used : end] = k_BTGP
        cache.v_BSGP[:, cache.used : end] = v_BTGP
        cache.used = end
        return type(self)(cache, start, end - start)

    def _with_room(self, more_BTGP: Tensor) -> Cache:
        """A copy of the live entries with room for these and, after the first call, for a quarter more."""
        rows, num_tokens, groups, head_dim = more_BTGP.shape
        length = self.length + num_tokens
        room = length if self.length == 0 else -(-(length + length // 4) // 64) * 64
        k, v = (more_BTGP.new_empty(rows, room, groups, head_dim) for _ in range(2))
        live = self.live()
        if live is not None:
            k[:, : self.length], v[:, : self.length] = live
        return Cache(k, v, self.length)

    def last(self, num_keys: int) -> Self:
        """Only the last `num_keys` entries; copied where most of the cache would be kept alive for nothing."""
        live = self.live()
        dropped = self.length - num_keys
        if dropped == 0 or live is None:
            return self
        assert self.cache is not None
        if num_keys + SPARE_KEYS >= self.cache.k_BSGP.shape[1] // 2:
            return type(self)(self.cache, self.start + dropped, num_keys)
        return self.of(live[0][:, dropped:].clone(), live[1][:, dropped:].clone())

    @classmethod
    def of(cls, k_BSGP: Tensor, v_BSGP: Tensor) -> Self:
        """These keys and values, all live."""
        length = k_BSGP.shape[1]
        return cls(Cache(k_BSGP, v_BSGP, length), 0, length)


@dataclass(frozen=True)
class FixedAttentionState(MixerState):
    """A ring of keys and values (B, C, G, P) that steps overwrite: key number `place` stands in slot `place % C`."""

    keys: Tensor
    values: Tensor
