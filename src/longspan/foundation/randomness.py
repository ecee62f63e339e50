"""Explicit seeds: every random stream is named, and the same names give the same numbers everywhere."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch


def stream_seed(seed: int, *names: object) -> int:
    """A 63-bit seed for the stream called `names` under the study seed `seed`."""
    text = "\x1f".join([str(seed), *map(str, names)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def numpy_generator(seed: int, *names: object) -> np.random.Generator:
    """A NumPy generator (Philox) for the named stream."""
    return np.random.Generator(np.random.Philox(key=stream_seed(seed, *names)))


def torch_generator(seed: int, *names: object, device: torch.device | str = "cpu") -> torch.Generator:
    """A torch generator for the named stream; another device draws other numbers."""
    import torch

    return torch.Generator(device).manual_seed(stream_seed(seed, *names))
