"""Claims about captured steps: those of before are gone when others are made, and those alike are kept."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable

import pytest

from longspan.engines import graphs
from longspan.engines.graphs import SLOT_STEP, VARIABLE, Graphs
from longspan.models.graphed_decoding import GraphedDecoding
from longspan.models.language_model import LanguageModel


class Borrower:
    """Whoever decodes."""


def test_the_memory_of_other_steps_is_free_before_that_of_new_ones_is_taken(
    tiny_model: Callable[..., LanguageModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VARIABLE, "on")
    alive: list[weakref.ref[GraphedDecoding]] = []

    class Watched(GraphedDecoding):
        def __init__(self, model: LanguageModel, rows: int, slots: int) -> None:
            assert [each for each in alive if each() is not None] == []
            super().__init__(model, rows, slots)
            alive.append(weakref.ref(self))

    monkeypatch.setattr(graphs, "GraphedDecoding", Watched)
    kept, one = Graphs(tiny_model("AM").eval()), Borrower()
    gc.disable()
    try:
        for prompt in (10, 3 * SLOT_STEP, 10):
            assert kept.borrow(one, 1, prompt, 4) is not None
            kept.give_back(one)
    finally:
        gc.enable()
    assert len(alive) == 3


def test_requests_of_almost_one_length_share_their_steps(
    tiny_model: Callable[..., LanguageModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VARIABLE, "on")
    kept, one, other = Graphs(tiny_model("AM").eval()), Borrower(), Borrower()
    first = kept.borrow(one, 1, 10, 4)
    assert kept.borrow(other, 1, 12, 4) is None
    kept.give_back(one)
    assert kept.borrow(other, 1, 12, 4) is first is not None
