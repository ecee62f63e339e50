"""Which numbers the matrix products run in: said openly, refused where it would be a trap."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch

from longspan.foundation.errors import UserError


def resolve_dtype(dtype: Literal["auto", "fp32", "bf16"], device: torch.device) -> Literal["fp32", "bf16"]:
    """What `dtype` means on this device.

    Raises:
        UserError: bf16 asked for on hardware that only emulates it (many times slower than fp32).
    """
    if dtype == "auto":
        return "bf16" if device.type == "cuda" and _native_bf16(device) else "fp32"
    if dtype == "bf16" and not _native_bf16(device):
        raise UserError(
            f"dtype = bf16 on {device.type}, which has no native bf16 (about 15 times slower than fp32)",
            "fp32 or auto on this machine",
            "set `training.dtype` to auto: it is bf16 where that is fast and fp32 elsewhere",
        )
    return dtype


def autocast_for(dtype: Literal["fp32", "bf16"], device: torch.device) -> Callable[[], torch.autocast]:
    """A maker of the autocast context that every forward pass runs in; parameters stay fp32."""
    return lambda: torch.autocast(device.type, dtype=torch.bfloat16, enabled=dtype == "bf16")


def _native_bf16(device: torch.device) -> bool:
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return device.type == "cpu" and bool(torch.cpu._is_avx512_bf16_supported())
