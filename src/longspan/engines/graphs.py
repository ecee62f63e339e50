"""Which steps of decoding replay a CUDA graph: one setting, and one captured step that is kept for requests alike."""

from __future__ import annotations

import os
import weakref

import torch

from longspan.foundation.errors import UserError
from longspan.models.graphed_decoding import GraphedDecoding
from longspan.models.language_model import LanguageModel

VARIABLE = "LONGSPAN_GRAPHS"
CHOICES = ("auto", "on", "off")
FEWEST_STEPS = 8
"""Of `auto`: capturing costs as much as some steps without a graph."""
SLOT_STEP = 1_024
"""Room for tokens, all rows together, is taken in steps of so many: prompts of almost one length share a graph."""


def choice() -> str:
    """`auto` (graphs on CUDA, for requests of several tokens), `on` (fixed memory everywhere; on a CPU the same steps
    run as they are), or `off`.

    Raises:
        UserError: LONGSPAN_GRAPHS names something else.
    """
    chosen = os.environ.get(VARIABLE, "auto")
    if chosen not in CHOICES:
        raise UserError(f"{VARIABLE} = {chosen!r}", ", ".join(CHOICES), f"set {VARIABLE} to one of these")
    return chosen


def described(device: torch.device) -> str:
    """What the setting comes to on `device`, for people."""
    used = choice() == "on" or (choice() == "auto" and device.type == "cuda")
    return f"{'CUDA graphs' if device.type == 'cuda' else 'fixed memory'} ({choice()})" if used else f"no ({choice()})"


class Graphs:
    """The captured step of one model for the last shape that was asked for: each holds memory for all its tokens.

    Args:
        model: in evaluation mode, on its device and in its dtype.
    """

    def __init__(self, model: LanguageModel) -> None:
        self._model = model
        self._kept: GraphedDecoding | None = None
        self._borrower: weakref.ref[object] | None = None

    def borrow(self, borrower: object, rows: int, prompt: int, new: int) -> GraphedDecoding | None:
        """Steps for so many rows, with room for the prompts and new tokens; None where each step is to run by itself:
        where the setting says so, or another borrower still lives and has not given them back.

        Args:
            borrower: who calls `give_back` with itself.
            rows: that go on together.
            prompt: tokens of the longest prompt.
            new: most tokens that follow it.
        """
        device = self._model.head_weight.device
        setting = choice()
        wanted = setting == "on" or (setting == "auto" and device.type == "cuda")
        room = prompt + new
        handover = self._model.handover
        # Steps on fixed memory never round.
        wanted = wanted and (handover is None or prompt >= handover.at)
        if not wanted or new < 2 or (self._borrower is not None and self._borrower() is not None):
            return None
        step = max(1, SLOT_STEP // rows)
        if self._kept is not None and self._kept.rows == rows and room <= self._kept.slots < room + 2 * step:
            self._borrower = weakref.ref(borrower)
            return self._kept
        if setting == "auto" and new < FEWEST_STEPS:
            return None
        # Nothing here may hold the steps of before, or both have their memory at once.
        self.drop()
        slots = -(-room // step) * step
        limit = self._model.config.max_positions if self._model.position_embedding is not None else None
        self._kept = GraphedDecoding(self._model, rows, slots if limit is None else min(slots, limit))
        self._borrower = weakref.ref(borrower)
        return self._kept

    def give_back(self, borrower: object) -> None:
        """Another may use the steps now."""
        if self._borrower is not None and self._borrower() is borrower:
            self._borrower = None

    def drop(self) -> None:
        """Gives the memory back."""
        self._kept = None
