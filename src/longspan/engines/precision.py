"""A model in fp32 for a while: what it says without the rounding of the precision it is asked in."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from longspan.foundation.machine import free_memory


@contextmanager
def in_fp32(model: nn.Module) -> Iterator[None]:
    """Every weight of less precision in fp32 while this lasts, and then the same bytes as before, in another place."""
    rounded = [(tensor, tensor.dtype) for tensor in _rounded(model)]
    try:
        for tensor, _ in rounded:
            tensor.data = tensor.data.float()
        yield
    finally:
        for tensor, dtype in rounded:
            tensor.data = tensor.data.to(dtype)
        if rounded and rounded[0][0].is_cuda:
            torch.cuda.empty_cache()


def fits_in_fp32(model: nn.Module) -> bool:
    """Whether there is memory for it, on a GPU after giving back what is cached; not where that is not known."""
    more = [tensor.numel() * 4 for tensor in _rounded(model)]
    if not more:
        return True
    device = next(model.parameters()).device
    if device.type == "cuda":
        torch.cuda.empty_cache()
        free = torch.cuda.mem_get_info(device)[0]
    else:
        free = free_memory() or 0
    # One tensor is there twice while it changes, and half of each was there before.
    return sum(more) // 2 + 2 * max(more) < free


def _rounded(model: nn.Module) -> list[Tensor]:
    tensors = (*model.parameters(), *model.buffers())
    return [tensor for tensor in tensors if tensor.is_floating_point() and tensor.dtype.itemsize < 4]
