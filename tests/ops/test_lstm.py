"""The fused LSTM over documents side by side says what the loop over time says."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from longspan.foundation.errors import UserError
from longspan.ops.lstm import lstm


def leaves(batch, time, width=3, hidden=4, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    shapes = ((batch, time, width), (4 * hidden, width), (4 * hidden, hidden), (4 * hidden,), (4 * hidden,))
    shapes += ((batch, hidden), (batch, hidden))
    return [torch.randn(*s, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for s in shapes]


@pytest.mark.parametrize("backend", ["fused", "reference"])
def test_values_and_gradients_are_those_of_torch(backend):
    x, *parameters, hidden, cell = leaves(2, 5)
    module = torch.nn.LSTM(3, 4, batch_first=True).double()
    with torch.no_grad():
        for parameter, value in zip(module.parameters(), parameters, strict=True):
            parameter.copy_(value)
    theirs, (their_hidden, their_cell) = module(x, (hidden[None], cell[None]))
    ours = lstm(x, *parameters, initial_hidden_BH=hidden, initial_cell_BH=cell, backend=backend)
    for one, other in zip(ours, (theirs, their_hidden[0], their_cell[0]), strict=True):
        assert torch.allclose(one, other, atol=1e-12)
    slope = torch.randn(theirs.shape, generator=torch.Generator().manual_seed(1), dtype=theirs.dtype)
    gradients = torch.autograd.grad((ours[0] * slope).sum() + ours[2].sum(), [*parameters, x, hidden, cell])
    expected = torch.autograd.grad((theirs * slope).sum() + their_cell.sum(), [*module.parameters(), x, hidden, cell])
    for one, other in zip(gradients, expected, strict=True):
        assert torch.allclose(one, other, atol=1e-12)


@pytest.mark.parametrize("biases", [False, True])
@pytest.mark.parametrize("with_state", [False, True])
@pytest.mark.parametrize("chance", [None, 0.0, 0.2, 1.0])
@pytest.mark.parametrize("time", [1, 2, 19])
@pytest.mark.usefixtures("poisoned_memory")
def test_fused_equals_the_loop_in_values_and_gradients(time, chance, with_state, biases, documents):
    tensors = leaves(3, time)
    doc = initial_doc = None
    if chance is not None:
        doc = documents(3, time, chance, time)
        initial_doc = doc[:, 0].clone()
        initial_doc[1] = 55

    def run(backend):
        x, weight_input, weight_hidden, bias_input, bias_hidden, hidden, cell = tensors
        return lstm(
            x,
            weight_input,
            weight_hidden,
            bias_input if biases else None,
            bias_hidden if biases else None,
            doc_BT=doc,
            initial_hidden_BH=hidden if with_state else None,
            initial_cell_BH=cell if with_state else None,
            initial_doc_B=initial_doc,
            backend=backend,
        )

    results = []
    for backend in ("fused", "reference"):
        y, hidden, cell = run(backend)
        slope = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=y.dtype)
        value = (y * slope).sum() + hidden.sum() + 2 * cell.sum()
        gradients = torch.autograd.grad(value, tensors, allow_unused=True)
        results.append([y, hidden, cell, *(torch.zeros(1) if g is None else g for g in gradients)])
    for one, other in zip(*results, strict=True):
        assert torch.allclose(one, other, atol=1e-12)


@settings(max_examples=30, deadline=None)
@given(time=st.integers(2, 12), cut=st.floats(0, 1), boundaries=st.none() | st.sets(st.integers(1, 11)))
def test_two_calls_at_any_split_equal_one(time, cut, boundaries):
    x, *parameters, _, _ = (z.detach() for z in leaves(2, time, seed=time))
    split = 1 + int(cut * (time - 2))
    doc = None
    if boundaries is not None:
        doc = torch.tensor([[sum(b <= t for b in boundaries) for t in range(time)]] * 2)
    whole = lstm(x, *parameters, doc_BT=doc)
    hidden = cell = last_doc = None
    pieces = []
    for span in (slice(0, split), slice(split, time)):
        y, hidden, cell = lstm(
            x[:, span],
            *parameters,
            doc_BT=None if doc is None else doc[:, span],
            initial_hidden_BH=hidden,
            initial_cell_BH=cell,
            initial_doc_B=last_doc,
        )
        last_doc = None if doc is None else doc[:, span][:, -1]
        pieces.append(y)
    for one, other in zip((torch.cat(pieces, 1), hidden, cell), whole, strict=True):
        assert torch.allclose(one, other, atol=1e-12)


def test_changing_one_document_leaves_every_other_bitwise_untouched():
    doc = torch.tensor([[0] * 9 + [1] * 20 + [2] * 1 + [3] * 14])
    inside = doc[0] == 1
    results = []
    for seed in (0, 1):
        x, *parameters, _, _ = leaves(1, 44, dtype=torch.float32)
        other = leaves(1, 44, seed=seed, dtype=torch.float32)[0]
        x = torch.where(inside[:, None], other, x).detach().requires_grad_()
        y, _, _ = lstm(x, *parameters, doc_BT=doc)
        results.append((y, torch.autograd.grad(y, x, torch.ones_like(y))[0]))
    for one, other in zip(*results, strict=True):
        assert torch.equal(one[:, ~inside], other[:, ~inside])
        assert not torch.equal(one[:, inside], other[:, inside])


def test_what_cannot_be_honoured_is_refused():
    x, weight_input, weight_hidden, bias_input, _, hidden, _ = leaves(1, 3)
    with pytest.raises(UserError, match="'scan'"):
        lstm(x, weight_input, weight_hidden, backend="scan")
    with pytest.raises(UserError, match="without the other"):
        lstm(x, weight_input, weight_hidden, bias_input)
    with pytest.raises(UserError, match="half of an LSTM state"):
        lstm(x, weight_input, weight_hidden, initial_hidden_BH=hidden)
