"""What a model remembers between calls: one object for prefill, chunked prefill and decode.

Legend: B rows.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from longspan.models.mixers.base import MixerState
from longspan.models.segments import Past


@dataclass(frozen=True)
class ModelState:
    """The state of every layer after `length` tokens. Calls return a new one and never change the one they got.

    Attributes:
        layers: one mixer state per layer, first layer first.
        past: tokens seen, open documents and the documents of cached keys.
    """

    layers: tuple[MixerState, ...]
    past: Past = field(default_factory=Past)

    @property
    def length(self) -> int:
        """Tokens seen per row."""
        return self.past.length

    def bytes(self) -> int:
        """Bytes of the live entries of all layers and rows."""
        return sum(layer.bytes() for layer in self.layers)

    def expand(self, n: int) -> ModelState:
        """n rows that all continue the one row of this state: a prefix shared among n continuations."""
        return self.select(torch.zeros(n, dtype=torch.long))

    def select(self, index: Tensor) -> ModelState:
        """The rows `index` (int64), copied; rows may repeat."""
        index = index.cpu()
        layers = tuple(layer.map(_rows(index)) for layer in self.layers)
        return ModelState(layers, self.past.select(index))

    def clone(self) -> ModelState:
        """A copy that shares no memory."""
        return dataclasses.replace(self, layers=tuple(layer.map(torch.clone) for layer in self.layers))

    def detach(self) -> ModelState:
        """The same values without their gradient history."""
        return dataclasses.replace(self, layers=tuple(layer.map(torch.detach) for layer in self.layers))


def _rows(index: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda t: t.index_select(0, index.to(t.device))
