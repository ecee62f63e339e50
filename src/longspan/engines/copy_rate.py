"""How fast a device copies memory, measured: the ceiling of decoding, which reads all weights for every token."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import cache

import torch

from longspan.engines.generation import synchronise

COPIED = {"cuda": 1 << 30, "cpu": 1 << 27}
"""Bytes of the copy, far beyond any cache."""
REPEATS = 5


@cache
def copy_rate(device: torch.device) -> float:
    """Bytes/s of a copy, read and written: the best of a few repeats. Measured once in a process.

    Raises:
        torch.cuda.OutOfMemoryError: no room for both sides of the copy.
    """
    source = torch.ones(COPIED[device.type], device=device, dtype=torch.uint8)
    target = torch.empty_like(source)
    return 2 * COPIED[device.type] / best_seconds(lambda: target.copy_(source), device)


def best_seconds(work: Callable[[], object], device: torch.device) -> float:
    """Of a few repeats, after one that is not counted."""
    times = []
    for _ in range(REPEATS + 1):
        synchronise(device)
        started = time.perf_counter()
        work()
        synchronise(device)
        times.append(time.perf_counter() - started)
    return min(times[1:])
