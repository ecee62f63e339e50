"""The chunked loss equals the loss over all logits, in values and gradients, whatever the chunk."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from longspan.foundation.errors import UserError
from longspan.ops.linear_cross_entropy import linear_cross_entropy


def case(tokens, vocab=11, width=6, seed=0, dtype=torch.float64, ignored=0.2):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(tokens, width, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    weight = torch.randn(vocab, width, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    targets = torch.randint(0, vocab, (tokens,), generator=generator)
    targets[torch.rand(tokens, generator=generator) < ignored] = -100
    return hidden, weight, targets


@settings(max_examples=30, deadline=None)
@given(
    tokens=st.integers(1, 25),
    chunk=st.none() | st.integers(1, 30),
    reduction=st.sampled_from(["sum", "none"]),
    ignored=st.sampled_from([0.0, 0.3, 1.0]),
)
def test_values_and_gradients_equal_the_eager_loss(tokens, chunk, reduction, ignored):
    hidden, weight, targets = case(tokens, seed=tokens, ignored=ignored)
    loss = linear_cross_entropy(hidden, weight, targets, chunk=chunk, reduction=reduction)
    expected = F.cross_entropy(hidden @ weight.T, targets, ignore_index=-100, reduction=reduction)
    assert torch.allclose(loss, expected, atol=1e-12)
    slope = torch.randn(loss.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for one, other in zip(
        torch.autograd.grad(loss, (hidden, weight), slope),
        torch.autograd.grad(expected, (hidden, weight), slope),
        strict=True,
    ):
        assert torch.allclose(one, other, atol=1e-12)


@pytest.mark.parametrize("wanted", [0, 1])
def test_a_frozen_side_gets_no_gradient(wanted):
    hidden, weight, targets = case(9)
    pair = [hidden, weight]
    pair[1 - wanted] = pair[1 - wanted].detach()
    linear_cross_entropy(*pair, targets).backward()
    assert pair[wanted].grad is not None
    assert pair[1 - wanted].grad is None


def test_bf16_inputs_give_an_fp32_loss():
    hidden, weight, targets = case(40, dtype=torch.bfloat16)
    loss = linear_cross_entropy(hidden, weight, targets, reduction="none", chunk=16)
    assert loss.dtype == torch.float32
    exact = F.cross_entropy(hidden.double() @ weight.double().T, targets, ignore_index=-100, reduction="none")
    assert torch.allclose(loss.double(), exact, atol=0.1)
    gradients = torch.autograd.grad(loss.sum(), (hidden, weight))
    assert [z.dtype for z in gradients] == [torch.bfloat16] * 2
    for one, other in zip(gradients, torch.autograd.grad(exact.sum(), (hidden, weight)), strict=True):
        assert torch.allclose(one.double(), other.double(), atol=0.1)


def test_huge_logits_stay_finite():
    hidden, weight, targets = case(12, dtype=torch.float32)
    loss = linear_cross_entropy(hidden * 1e4, weight, targets)
    assert bool(loss.isfinite())
    assert bool(torch.autograd.grad(loss, hidden)[0].isfinite().all())


@pytest.mark.usefixtures("poisoned_memory")
def test_nothing_reads_memory_that_was_never_written():
    hidden, weight, targets = case(13, dtype=torch.float32)
    loss = linear_cross_entropy(hidden, weight, targets, chunk=5)
    for gradient in (loss, *torch.autograd.grad(loss, (hidden, weight))):
        assert bool(gradient.isfinite().all())


def test_evaluation_keeps_no_graph():
    hidden, weight, targets = case(8)
    with torch.no_grad():
        assert not linear_cross_entropy(hidden, weight, targets, reduction="none").requires_grad


def test_what_cannot_be_honoured_is_refused():
    hidden, weight, targets = case(8, ignored=0.0)
    with pytest.raises(UserError, match="target 11"):
        linear_cross_entropy(hidden, weight, torch.full((8,), 11))
    with pytest.raises(UserError, match="'mean'"):
        linear_cross_entropy(hidden, weight, targets, reduction="mean")
    with pytest.raises(UserError, match="flatten"):
        linear_cross_entropy(hidden[None], weight, targets)
    with pytest.raises(UserError, match="chunk 0"):
        linear_cross_entropy(hidden, weight, targets, chunk=0)
