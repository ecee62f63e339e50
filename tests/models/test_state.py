"""One state serves many continuations."""

from __future__ import annotations

import pytest
import torch

from longspan.models.mixers import registered

PATTERNS = [*sorted(registered()), "AMG", "[AM]G"]


@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_prefix_is_shared_among_continuations(pattern, tiny, tokens):
    model, prefix, continuations = tiny(pattern), tokens(1, 13), tokens(3, 6, name="continuations")
    with torch.no_grad():
        _, state = model(prefix, None, model.initial_state())
        shared, _ = model(continuations, None, state.expand(3))
        whole, _ = model(torch.cat([prefix.expand(3, -1), continuations], 1))
    assert (shared - whole[:, 13:]).abs().max() <= 1e-5


@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_state_stays_valid_after_use(pattern, tiny, tokens):
    """Two continuations of one state, token by token and interleaved, do not see each other."""
    model, prefix, continuations = tiny(pattern), tokens(1, 13), tokens(2, 6, name="continuations")
    with torch.no_grad():
        _, start = model(prefix, None, model.initial_state())
        _, start = model(prefix[:, :1], None, start)  # leaves spare room in the cache
        alone = [model(row[None], None, start.clone())[0] for row in continuations]
        states, outputs = [start, start], ([], [])
        for t in range(6):
            for i in range(2):
                hidden, states[i] = model(continuations[i : i + 1, t : t + 1], None, states[i])
                outputs[i].append(hidden)
    for together, expected in zip(outputs, alone, strict=True):
        assert (torch.cat(together, 1) - expected).abs().max() <= 1e-5


@pytest.mark.parametrize("pattern", PATTERNS)
def test_rows_can_be_selected_with_their_documents(pattern, tiny, tokens):
    model, batch, more = tiny(pattern), tokens(2, 12), tokens(2, 5, name="more")
    doc = torch.tensor([[0] * 12, [3] * 7 + [4] * 5])
    with torch.no_grad():
        _, state = model(batch, doc, model.initial_state())
        expected, _ = model(more, None, state)
        index = torch.tensor([1, 0, 1])
        selected, _ = model(more[index], None, state.select(index))
    assert (selected - expected[index]).abs().max() <= 1e-5


@pytest.mark.parametrize("pattern", PATTERNS)
def test_gradients_flow_through_a_state_until_it_is_detached(pattern, tiny, tokens):
    model, batch = tiny(pattern), tokens(1, 12)
    _, state = model(batch[:, :6], None, model.initial_state())
    whole = torch.autograd.grad(model(batch)[0][:, 6:].sum(), model.embedding.weight)[0]
    carried, _ = model(batch[:, 6:], None, state)
    gradient = torch.autograd.grad(carried.sum(), model.embedding.weight, retain_graph=True)[0]
    assert (gradient - whole).abs().max() <= 1e-5 * whole.abs().max()
    cut, _ = model(batch[:, 6:], None, state.detach())
    gradient = torch.autograd.grad(cut.sum(), model.embedding.weight)[0]
    unseen = [t for t in batch[0, :6].tolist() if t not in batch[0, 6:].tolist()]
    assert not gradient[unseen].any()


def test_a_stream_of_documents_does_not_grow_the_cache(tiny, tokens):
    model = tiny("AM")
    with torch.no_grad():
        state = model.initial_state()
        for i in range(5):
            _, state = model(tokens(1, 10), torch.full((1, 10), i), state)
            assert state.past.num_keys == 10
            assert state.layers[0].live()[0].shape[1] == 10
    assert state.length == 50
