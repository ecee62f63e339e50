"""What a long-running stage says while it works; the command line decides how to show it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol


@dataclass(frozen=True, slots=True)
class Progress:
    """One state of one stage.

    Attributes:
        stage: what is being done, e.g. `tokenize` or `train`.
        done: units finished.
        total: units in all, None where unknown.
        unit: what is counted, e.g. `tok`, `documents`, `B`, `items`.
        numbers: the numbers that matter now, e.g. `{"loss": 3.21, "tok/s": 12_300.0}`.
        message: a line worth keeping (shown once, not overwritten), e.g. a warning; empty for a plain update.
        warming: what was done so far took longer than the rest will, e.g. to compile; rates count from here.
    """

    stage: str
    done: float = 0.0
    total: float | None = None
    unit: str = ""
    numbers: Mapping[str, float] = field(default_factory=dict)
    message: str = ""
    warming: bool = False


class Report(Protocol):
    """Takes progress. It may raise `Stopped`, which the stage lets through after leaving its files whole."""

    def __call__(self, progress: Progress, /) -> None:
        """Show or store one progress state."""


def silent(progress: Progress, /) -> None:
    """A `Report` that shows nothing."""
