"""When decoding takes a graph, and when it does without."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from longspan.engines import graphs
from longspan.engines.graphs import Graphs
from longspan.models.graphed_decoding import GraphedDecoding
from longspan.models.language_model import LanguageModel, ModelConfig


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
