"""From the corpus's NumPy batches to tensors on the device."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch

from longspan.models.language_model import IGNORE

if TYPE_CHECKING:
    from longspan.corpus.packing import Batch


class ResumableBatches(Protocol):
    """An endless stream of equally shaped batches whose place can be written down as JSON."""

    def __iter__(self) -> Iterator[Batch]:
        """Itself."""

    def __next__(self) -> Batch:
        """The next batch."""

    def state_dict(self) -> dict[str, Any]:
        """The place after the last batch handed out."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from that place."""


def num_targets(batch: Batch) -> int:
    """Positions of the batch that carry loss, counted without the device."""
    return int(np.count_nonzero(batch.targets != IGNORE))


def to_device(batch: Batch, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """tokens (B, T) int64 and targets (B, T) int64 on the device, doc_id (B, T) int32 on the CPU.

    Nothing waits for the device; document ids stay where what follows from them can be decided without waiting.
    """

    def move(array: np.ndarray, dtype: torch.dtype) -> torch.Tensor:
        # Ids cross the bus as int32, half of what the embedding wants.
        tensor = torch.from_numpy(np.ascontiguousarray(array, dtype=np.int32))
        if device.type == "cuda":
            tensor = tensor.pin_memory().to(device, non_blocking=True)
        return tensor.to(device=device, dtype=dtype)

    return (
        move(batch.tokens, torch.int64),
        move(batch.targets, torch.int64),
        torch.from_numpy(np.array(batch.doc_id, np.int32)),
    )
