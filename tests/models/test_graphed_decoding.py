"""Steps on fixed memory, as a graph takes them, give what steps of the model give."""

from __future__ import annotations

import copy

import pytest
import torch

from longspan.foundation.errors import UserError
from longspan.models.graphed_decoding import GraphedDecoding
from longspan.models.mixers.base import state_tensors
from longspan.models.segments import Segments, Step
from longspan.models.state import ModelState

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
PATTERNS = ["M", "m", "G", "L", "D", "C", "[Mm]", "A", "S", "[AM]", "ASMG"]
SETTINGS = [("A", {"positions": positions}) for positions in ("nope", "alibi", "hard_alibi", "hard_alibi_rope")]
SETTINGS += [("A", {"positions": "learned", "max_positions": 20}), ("AS", {"kv_heads": 1})]
SETTINGS += [("S", {"window": 1}), ("S", {"window": 50}), ("S", {"positions": "alibi"})]


def plain(model, tokens, state, isolation="full"):
    hidden, state = model(tokens, None, state, isolation=isolation)
    return model.logits(hidden[:, -1]), state


def follow(graphed, model, batch, start, first, last, isolation="full"):
    """Steps first..last-1 of both, which must agree; the state of the plain ones."""
    graphed.load(start)
    state = start
    for t in range(first, last):
        logits, state = plain(model, batch[:, t : t + 1], state, isolation)
        torch.testing.assert_close(graphed.step(batch[:, t : t + 1]), logits)
    return state


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("pattern", "settings"), [*((each, {}) for each in PATTERNS), *SETTINGS])
@torch.no_grad()
def test_steps_and_what_follows_them(pattern, settings, device, tiny, tokens):
    model = copy.deepcopy(tiny(pattern, **settings)).eval().to(device)
    batch = tokens(2, 16).to(device)
    graphed = GraphedDecoding(model, rows=2, slots=15)
    _, start = model.next_logits(batch[:, :5], model.initial_state())
    for _ in range(2):
        state = follow(graphed, model, batch, start, 5, 13)
        after = graphed.state()
        assert after.length == state.length == 13
        assert after.bytes() == graphed.bytes() == state.bytes()
        ends = [model.next_logits(batch[:, 13:], each)[0] for each in (after, state)]
        torch.testing.assert_close(*ends)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("pattern", ["A", "S", "[AM]", "MAS"])
@torch.no_grad()
def test_a_prompt_read_in_parts_into_the_memory_of_the_steps(pattern, device, tiny, tokens):
    model = copy.deepcopy(tiny(pattern)).eval().to(device)
    graphed = GraphedDecoding(model, rows=2, slots=20)
    for name in range(2):
        batch = tokens(2, 20, name=name).to(device)
        starts = []
        for state in (graphed.initial_state(), model.initial_state()):
            for part in torch.split(batch[:, :12], 5, dim=1):
                _, state = model.next_logits(part, state)
            starts.append(state)
        graphed.load(starts[0])
        state = starts[1]
        for t in range(12, 20):
            logits, state = model.next_logits(batch[:, t : t + 1], state)
            torch.testing.assert_close(graphed.step(batch[:, t : t + 1]), logits)
        # The prompt's state still is what it was.
        ends = [model.next_logits(batch[:, 12:], each)[0] for each in starts]
        torch.testing.assert_close(*ends)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("isolation", ["full", "attention", "state", "none"])
@pytest.mark.parametrize("pattern", ["A", "S", "M", "C", "G", "mAD[SM]"])
@torch.no_grad()
def test_rows_whose_open_documents_began_at_different_places(pattern, isolation, device, tiny, tokens):
    model = copy.deepcopy(tiny(pattern)).eval().to(device)
    batch = tokens(3, 14).to(device)
    doc = torch.zeros(3, 6, dtype=torch.int32)
    doc[1, :5], doc[2, :2] = -1, -1
    graphed = GraphedDecoding(model, rows=3, slots=14)
    _, start = model(batch[:, :6], doc, model.initial_state(), isolation=isolation)
    state = follow(graphed, model, batch, start, 6, 12, isolation)
    ends = [plain(model, batch[:, 12:], each, isolation)[0] for each in (graphed.state(), state)]
    torch.testing.assert_close(*ends)


@pytest.mark.parametrize("pattern", ["M", "m", "D", "C", "[Mm]"])
@torch.no_grad()
def test_large_recurrent_states_are_overwritten_where_they_lie(pattern, tiny, tokens):
    """New ones would be copied to their place: with thousands of rows gigabytes a step."""
    model = tiny(pattern).eval()
    _, state = model.next_logits(tokens(2, 5), model.initial_state())
    held = ModelState(
        tuple(block.mixer.fixed_state(each, 8) for block, each in zip(model.blocks, state.layers, strict=True))
    )
    before = [tensor.clone() for layer in held.layers for tensor in state_tensors(layer)]
    places = torch.full((2, 1), 5)
    step = Segments.one_step(places, Step(places[0], torch.zeros(2, dtype=torch.int32)))
    _, after = model.next_logits(tokens(2, 1), held, step)
    pairs = zip(held.layers, after.layers, strict=True)
    kept = [
        (one, other)
        for layer, new in pairs
        for one, other in zip(state_tensors(layer), state_tensors(new), strict=True)
    ]
    assert len(kept) == len(before) > 0
    assert all(one is other for one, other in kept)
    assert not any(torch.equal(one, old) for (one, _), old in zip(kept, before, strict=True))


@torch.no_grad()
def test_what_has_no_room_or_no_beginning_is_refused(tiny, tokens):
    model = tiny("AM").eval()
    graphed = GraphedDecoding(model, rows=1, slots=4)
    with pytest.raises(UserError, match="without a state"):
        graphed.step(tokens(1, 1))
    with pytest.raises(UserError, match="prefill"):
        graphed.load(model.initial_state())
    _, state = model.next_logits(tokens(1, 3), model.initial_state())
    with pytest.raises(UserError, match="2 rows after 3 tokens for decoding 3 rows"):
        GraphedDecoding(model, rows=3, slots=4).load(state.expand(2))
    graphed.load(state)
    graphed.step(tokens(1, 1))
    with pytest.raises(UserError, match="room for 4"):
        graphed.step(tokens(1, 1))
    with pytest.raises(UserError, match="learned positions"):
        GraphedDecoding(tiny("A", positions="learned", max_positions=20), rows=1, slots=21)
