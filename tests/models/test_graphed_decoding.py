"""Steps on fixed memory, as a graph takes them, give what steps of the model give."""

from __future__ import annotations

import copy

import pytest
import torch

from longspan.foundation.errors import UserError
from longspan.models.graphed_decoding import GraphedDecoding

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("letter", ["M", "m", "G", "L", "D", "C", "[Mm]"])
@torch.no_grad()
def test_steps_and_what_follows_them(letter, device, tiny, tokens):
    model = copy.deepcopy(tiny(letter)).eval().to(device)
    batch = tokens(2, 12).to(device)
    _, start = model.next_logits(batch[:, :5], model.initial_state())
    graphed = GraphedDecoding(model, start)
    for _ in range(2):
        state = start
        for t in range(5, 9):
            logits, state = model.next_logits(batch[:, t : t + 1], state)
            torch.testing.assert_close(graphed.step(batch[:, t : t + 1]), logits)
        after = graphed.state()
        assert after.length == state.length == 9
        ends = [model.next_logits(batch[:, 9:], each)[0] for each in (after, state)]
        torch.testing.assert_close(*ends)
        graphed.rewind()


@torch.no_grad()
def test_a_growing_state_or_none_at_all_is_refused(tiny, tokens):
    model = tiny("AM").eval()
    _, state = model.next_logits(tokens(1, 3), model.initial_state())
    with pytest.raises(UserError, match="layers A"):
        GraphedDecoding(model, state)
    model = tiny("M").eval()
    with pytest.raises(UserError, match="prefill"):
        GraphedDecoding(model, model.initial_state())
