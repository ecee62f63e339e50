"""Claims about captured steps: when decoding takes them, that old ones go before new ones, that those alike stay."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from longspan.engines import graphs
from longspan.engines.graphs import SLOT_STEP, VARIABLE, Graphs
from longspan.models.graphed_decoding import GraphedDecoding
from longspan.models.language_model import LanguageModel, ModelConfig
from longspan.models.mixers.base import state_tensors


@pytest.mark.parametrize(("copied", "wanted"), [(0, True), (graphs.MOST_COPIED + 1, False)])
def test_large_states_that_a_graph_would_copy_every_step_are_decoded_without_one(
    monkeypatch: pytest.MonkeyPatch, copied: int, wanted: bool
) -> None:
    made: list[int] = []

    def decoding(model: Any, rows: int, slots: int) -> Any:
        made.append(rows)
        # As with recurrent states, twice the rows copy twice as much.
        return SimpleNamespace(rows=rows, slots=slots, copied_bytes=copied * rows // 64)

    monkeypatch.setattr(graphs, "GraphedDecoding", decoding)
    monkeypatch.delenv(graphs.VARIABLE, raising=False)
    on_gpu: Any = SimpleNamespace(
        head_weight=SimpleNamespace(device=torch.device("cuda")),
        position_embedding=None,
        config=SimpleNamespace(max_positions=None),
    )
    held, borrower = Graphs(on_gpu), SimpleNamespace
    assert (held.borrow(borrower, 64, 10, 100) is not None) == wanted
    held.give_back(borrower)
    assert (held.borrow(borrower, 128, 10, 100) is not None) == wanted
    # What is known to copy too much is not made again.
    assert made == ([64, 128] if wanted else [64])
    held.give_back(borrower)
    assert held.borrow(borrower, 1, 10, 100) is not None


@pytest.mark.parametrize(("pattern", "copies"), [("AM", False), ("m", True)])
@torch.no_grad()
def test_a_mixer_that_makes_new_states_is_seen_to_copy_them(pattern: str, copies: bool) -> None:
    model = LanguageModel(ModelConfig(pattern=pattern, width=16, heads=2, state=4, mamba_head_dim=8), 32).eval()
    decoding = GraphedDecoding(model, 2, 8)
    tokens = torch.zeros(2, 3, dtype=torch.long)
    decoding.load(model.next_logits(tokens, model.initial_state())[1])
    decoding.step(tokens[:, :1])
    assert (decoding.copied_bytes > 0) == copies


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


@torch.no_grad()
def test_the_memory_of_gated_deltanet_is_overwritten_in_place() -> None:
    model = LanguageModel(ModelConfig(pattern="D", width=32, heads=2, delta_head_dim=8), 32).eval()
    decoding = GraphedDecoding(model, 2, 8)
    tokens = torch.randint(32, (2, 4), generator=torch.Generator().manual_seed(0))
    decoding.load(model.next_logits(tokens[:, :3], model.initial_state())[1])
    found = decoding.step(tokens[:, 3:])
    # What is copied is the last three inputs of the convolution: 2 rows of 24 + 24 + 48 channels.
    assert decoding.copied_bytes == 2 * 3 * 96 * 4
    expected, _ = model.next_logits(tokens, model.initial_state())
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
