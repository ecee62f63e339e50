"""What this device can do at best, measured: multiply matrices, and copy memory."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from longspan.engines.copy_rate import best_seconds, copy_rate
from longspan.training.measurement import device_name

SIZES = {"cuda": 8192, "cpu": 1024}
"""Rows and columns of the product."""


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
    matmul = 2 * size**3 / best_seconds(lambda: torch.mm(a, a, out=product), device)
    return Ceilings(device_name(device), matmul, copy_rate(device))
