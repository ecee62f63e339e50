"""Random documents for the tests of the ops."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

Documents = Callable[[int, int, float, int], Tensor]


@pytest.fixture
def documents() -> Documents:
    """(batch, time, chance of a boundary, seed) -> int32 ids; chance 1 makes one-token documents."""

    def make(batch: int, time: int, chance: float, seed: int = 0) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return (torch.rand(batch, time, generator=generator) < chance).cumsum(1).int()

    return make


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """torch.empty and its kin hand out NaN, so that a result that reads what was never written shows."""
    # The public switch imports the compiler, seconds that this fixture does not need.
    torch._C._set_deterministic_algorithms(True)
    filled = torch.utils.deterministic.fill_uninitialized_memory
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.utils.deterministic.fill_uninitialized_memory = filled
    torch._C._set_deterministic_algorithms(False)
