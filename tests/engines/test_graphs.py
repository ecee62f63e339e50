"""Claims about captured steps: when decoding takes them, that old ones go before new ones, that those alike stay."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch

from longspan.engines import graphs
from longspan.engines.graphs import SLOT_STEP, VARIABLE, Graphs
from longspan.models.graphed_decoding import GraphedDecoding
from longspan.models.language_model import LanguageModel, ModelConfig
from longspan.models.mixers.base import state_tensors


@torch.no_grad()
def test_of_the_states_that_fixed_ones_are_made_after_only_one_layer_is_kept_at_a_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = LanguageModel(ModelConfig(pattern="MMM", width=16, heads=2, state=4, mamba_head_dim=8), 32).eval()
    mixer = type(model.blocks[0].mixer)
    made, before = mixer.fixed_state, list[weakref.ref[Any]]()

    def watched(self: Any, layer: Any, slots: int) -> Any:
        assert [each for each in before if each() is not None] == []
        before.extend(weakref.ref(tensor) for tensor in state_tensors(layer))
        return made(self, layer, slots)

    monkeypatch.setattr(mixer, "fixed_state", watched)
    GraphedDecoding(model, 2, 8)
    assert len(before) >= 3


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
