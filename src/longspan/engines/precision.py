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


def no_room_for_fp32(model: nn.Module) -> str | None:
    """What it takes and what is free, where that is less or not known, on a GPU after giving back what is cached."""
    more = [tensor.numel() * 4 for tensor in _rounded(model)]
    if not more:
        return None
    device = next(model.parameters()).device
    if device.type == "cuda":
        torch.cuda.empty_cache()
        free: int | None = torch.cuda.mem_get_info(device)[0]
    else:
        free = free_memory()
    # One tensor is there twice while it changes, and half of each was there before.
    needed = sum(more) // 2 + 2 * max(more)
    if free is not None and needed < free:
        return None
    there = "how much is free is not known" if free is None else f"{_gib(free)} are free"
    return f"{_gib(needed)} GiB more are needed, {there}"


def _gib(size: int) -> str:
    return f"{size / 2**30:.3g}"


def _rounded(model: nn.Module) -> list[Tensor]:
    tensors = (*model.parameters(), *model.buffers())
    return [tensor for tensor in tensors if tensor.is_floating_point() and tensor.dtype.itemsize < 4]
