"""The fused GRU over packed documents says what the loop over time says."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from longspan.foundation.errors import UserError
from longspan.ops.gru import gru


def leaves(batch, time, width=3, hidden=4, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    shapes = ((batch, time, width), (3 * hidden, width), (3 * hidden, hidden), (3 * hidden,), (3 * hidden,))
    shapes += ((batch, hidden),)
    return [torch.randn(*s, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for s in shapes]


def test_the_cell_is_that_of_torch():
    x, weight_input, weight_hidden, bias_input, bias_hidden, _ = leaves(2, 5)
    module = torch.nn.GRU(3, 4, batch_first=True).double()
    with torch.no_grad():
        for parameter, value in zip(
            module.parameters(), (weight_input, weight_hidden, bias_input, bias_hidden), strict=True
        ):
            parameter.copy_(value)
    for backend in ("fused", "reference"):
        y, state = gru(x, weight_input, weight_hidden, bias_input, bias_hidden, backend=backend)
        assert torch.allclose(y, module(x)[0], atol=1e-12)
        assert torch.allclose(state, y[:, -1])


@pytest.mark.parametrize("biases", [False, True])
@pytest.mark.parametrize("with_state", [False, True])
@pytest.mark.parametrize("chance", [None, 0.0, 0.2, 1.0])
@pytest.mark.parametrize("time", [1, 2, 19])
def test_fused_equals_the_loop_in_values_and_gradients(time, chance, with_state, biases, documents):
    tensors = leaves(3, time)
    doc = initial_doc = None
    if chance is not None:
        doc = documents(3, time, chance, time)
        initial_doc = doc[:, 0].clone()
        initial_doc[1] = 55

    def run(backend):
        x, weight_input, weight_hidden, bias_input, bias_hidden, state = tensors
        return gru(
            x,
            weight_input,
            weight_hidden,
            bias_input if biases else None,
            bias_hidden if biases else None,
            doc_BT=doc,
            initial_state_BH=state if with_state else None,
            initial_doc_B=initial_doc,
            backend=backend,
        )

    results = []
    for backend in ("fused", "reference"):
        y, state = run(backend)
        slope = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=y.dtype)
        gradients = torch.autograd.grad((y * slope).sum() + state.sum(), tensors, allow_unused=True)
        results.append([y, state, *(torch.zeros(1) if g is None else g for g in gradients)])
    for one, other in zip(*results, strict=True):
        assert torch.allclose(one, other, atol=1e-12)


@settings(max_examples=30, deadline=None)
@given(time=st.integers(2, 12), cut=st.floats(0, 1), boundaries=st.none() | st.sets(st.integers(1, 11)))
def test_two_calls_at_any_split_equal_one(time, cut, boundaries):
    x, *parameters, _ = (z.detach() for z in leaves(2, time, seed=time))
    split = 1 + int(cut * (time - 2))
    doc = None
    if boundaries is not None:
        doc = torch.tensor([[sum(b <= t for b in boundaries) for t in range(time)]] * 2)
    whole, final = gru(x, *parameters, doc_BT=doc)
    state = last_doc = None
    pieces = []
    for span in (slice(0, split), slice(split, time)):
        doc_part = None if doc is None else doc[:, span]
        y, state = gru(x[:, span], *parameters, doc_BT=doc_part, initial_state_BH=state, initial_doc_B=last_doc)
        last_doc = None if doc_part is None else doc_part[:, -1]
        pieces.append(y)
    assert torch.allclose(torch.cat(pieces, 1), whole, atol=1e-12)
    assert torch.allclose(state, final, atol=1e-12)


def test_changing_one_document_leaves_every_other_bitwise_untouched():
    doc = torch.tensor([[0] * 9 + [1] * 20 + [2] * 1 + [3] * 14])
    inside = doc[0] == 1
    results = []
    for seed in (0, 1):
        x, *parameters, _ = leaves(1, 44, dtype=torch.float32)
        other = leaves(1, 44, seed=seed, dtype=torch.float32)[0]
        x = torch.where(inside[:, None], other, x).detach().requires_grad_()
        y, _ = gru(x, *parameters, doc_BT=doc)
        results.append((y, torch.autograd.grad(y, x, torch.ones_like(y))[0]))
    for one, other in zip(*results, strict=True):
        assert torch.equal(one[:, ~inside], other[:, ~inside])
        assert not torch.equal(one[:, inside], other[:, inside])


def test_what_cannot_be_honoured_is_refused():
    x, weight_input, weight_hidden, bias_input, _, _ = leaves(1, 3)
    with pytest.raises(UserError, match="'scan'"):
        gru(x, weight_input, weight_hidden, backend="scan")
    with pytest.raises(UserError, match="without the other"):
        gru(x, weight_input, weight_hidden, bias_input)
