"""What this device can do at best, measured: multiply matrices, and copy memory."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from longspan.training.measurement import device_name, synchronizer

SIZES = {"cuda": 8192, "cpu": 1024}
"""Rows and columns of the product."""
COPIED = {"cuda": 1 << 30, "cpu": 1 << 27}
"""Bytes of the copy, far beyond any cache."""
REPEATS = 5


@dataclass(frozen=True)
class Ceilings:
    """Rates of one device.

    Attributes:
        device: its name.
        matmul: FLOP/s of a square matrix product in the dtype of training.
        copy: bytes/s of a copy, read and written.
    """

    device: str
    matmul: float
    copy: float


def measure_ceilings(device: torch.device, dtype: torch.dtype) -> Ceilings:
    """Best of a few repeats, after one that is not counted."""
    size = SIZES[device.type]
    a = torch.empty(size, size, device=device, dtype=dtype)
    a.normal_(generator=torch.Generator(device).manual_seed(0))
    product = torch.empty_like(a)
    matmul = 2 * size**3 / _best_seconds(lambda: torch.mm(a, a, out=product), device)
    source = torch.ones(COPIED[device.type], device=device, dtype=torch.uint8)
    target = torch.empty_like(source)
    copy = 2 * COPIED[device.type] / _best_seconds(lambda: target.copy_(source), device)
    return Ceilings(device_name(device), matmul, copy)


def _best_seconds(work: Callable[[], object], device: torch.device) -> float:
    wait = synchronizer(device)
    times = []
    for _ in range(REPEATS + 1):
        wait()
        started = time.perf_counter()
        work()
        wait()
        times.append(time.perf_counter() - started)
    return min(times[1:])
