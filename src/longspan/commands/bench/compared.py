"""How many times as fast one side is as the other, with what its repeats leave open; nothing where they are too few."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

FEWEST = 3
"""Repeats of each side below which a ratio says nothing."""
QUANTILE = 1.96
"""Of the normal distribution, for 95 %."""


@dataclass(frozen=True)
class Ratio:
    """A ratio of medians with its 95 % interval over the repeats of this run; another run may differ by more."""

    value: float
    low: float
    high: float


def times_as_fast(ours: Sequence[float], theirs: Sequence[float]) -> Ratio | None:
    """The median of one side over that of the other; None with fewer than `FEWEST` repeats of either.

    The interval is that of Mann and Whitney's test, from the ratios of all pairs of repeats (Hodges and Lehmann 1963):
    it supposes no distribution, and a few slow repeats hardly move it. With three repeats a side it is all that they
    span, which covers 90 %.

    Args:
        ours, theirs: rates, above 0.
    """
    if min(len(ours), len(theirs)) < FEWEST:
        return None
    pairs = np.sort(np.divide.outer(np.asarray(ours, np.float64), np.asarray(theirs, np.float64)).ravel())
    spread = math.sqrt(len(pairs) * (len(ours) + len(theirs) + 1) / 12)
    left_out = max(0, math.floor(len(pairs) / 2 - QUANTILE * spread - 0.5))
    low, high = float(pairs[left_out]), float(pairs[len(pairs) - 1 - left_out])
    value = statistics.median(ours) / statistics.median(theirs)
    return Ratio(value, min(low, value), max(high, value))
