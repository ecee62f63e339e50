"""The fused convolution says what a loop over tokens and taps says, and never mixes documents."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from longspan.foundation.errors import UserError
from longspan.ops import causal_conv as module
from longspan.ops.causal_conv import causal_conv


def loop(x, weight, bias, doc, tail, tail_doc, activation):
    """The definition, token by token."""
    batch, time, _ = x.shape
    taps = weight.shape[1]
    padded = torch.cat((tail, x), 1)
    docs = None
    if doc is not None:
        before = doc[:, :1].expand(-1, taps - 1) if tail_doc is None else tail_doc
        docs = torch.cat((before, doc), 1)
    rows = []
    for b in range(batch):
        for t in range(time):
            z = bias
            for k in range(taps):
                at = t + taps - 1
                if docs is None or docs[b, at - k] == docs[b, at]:
                    z = z + weight[:, taps - 1 - k] * padded[b, at - k]
            rows.append(F.silu(z) if activation else z)
    return torch.stack(rows).view_as(x)


def leaves(batch, time, channels=5, taps=4, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    shapes = ((batch, time, channels), (channels, taps), (channels,), (batch, taps - 1, channels))
    return [torch.randn(*s, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for s in shapes]


@pytest.mark.parametrize("tile", [3, 512])
@pytest.mark.parametrize("activation", ["silu", None])
@pytest.mark.parametrize("taps", [2, 4])
@pytest.mark.parametrize("chance", [None, 0.3, 1.0])
@pytest.mark.parametrize("time", [1, 2, 3, 4, 11])
def test_values_and_gradients_equal_the_loop(time, chance, taps, activation, tile, documents, monkeypatch):
    monkeypatch.setattr(module, "TILE_TOKENS", tile)
    x, weight, bias, tail = leaves(3, time, taps=taps)
    doc = tail_doc = None
    if chance is not None:
        doc = documents(3, time, chance, time) + 1
        tail_doc = torch.tensor([[0] * (taps - 2) + [1]] * 3, dtype=torch.int32)
    expected = loop(x, weight, bias, doc, tail, tail_doc, activation)
    y, new_tail, new_doc = causal_conv(
        x, weight, bias, doc_BT=doc, tail_BKD=tail, tail_doc_BK=tail_doc, activation=activation
    )
    assert torch.allclose(y, expected, atol=1e-12)
    assert torch.equal(new_tail, torch.cat((tail, x), 1)[:, time:])
    if doc is not None:
        assert torch.equal(new_doc, torch.cat((tail_doc, doc), 1)[:, time:])
    slope = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=y.dtype)
    for one, other in zip(
        torch.autograd.grad(y, (x, weight, bias, tail), slope),
        torch.autograd.grad(expected, (x, weight, bias, tail), slope, allow_unused=True),
        strict=True,
    ):
        assert torch.allclose(one, torch.zeros_like(one) if other is None else other, atol=1e-12)


def test_one_document_equals_torch_conv1d():
    x, weight, bias, _ = leaves(2, 13, dtype=torch.float32)
    expected = F.silu(F.conv1d(x.transpose(1, 2), weight[:, None], bias, padding=3, groups=5)[..., :13].transpose(1, 2))
    assert torch.allclose(causal_conv(x, weight, bias)[0], expected, atol=1e-6)
    assert torch.allclose(
        causal_conv(x, weight, None, activation=None)[0],
        F.conv1d(x.transpose(1, 2), weight[:, None], None, padding=3, groups=5)[..., :13].transpose(1, 2),
        atol=1e-6,
    )


@settings(max_examples=30, deadline=None)
@given(time=st.integers(2, 14), cut=st.floats(0, 1), boundaries=st.none() | st.sets(st.integers(1, 13)))
def test_two_calls_at_any_split_equal_one(time, cut, boundaries):
    x, weight, bias, _ = (z.detach() for z in leaves(2, time, seed=time))
    split = 1 + int(cut * (time - 2))
    doc = None
    if boundaries is not None:
        doc = torch.tensor([[sum(b <= t for b in boundaries) for t in range(time)]] * 2)
    whole = causal_conv(x, weight, bias, doc_BT=doc)
    tail = tail_doc = None
    pieces = []
    for span in (slice(0, split), slice(split, time)):
        doc_part = None if doc is None else doc[:, span]
        y, tail, tail_doc = causal_conv(x[:, span], weight, bias, doc_BT=doc_part, tail_BKD=tail, tail_doc_BK=tail_doc)
        pieces.append(y)
    assert torch.allclose(torch.cat(pieces, 1), whole[0], atol=1e-12)
    assert torch.equal(tail, whole[1])


@pytest.mark.usefixtures("poisoned_memory")
def test_nothing_reads_memory_that_was_never_written(documents, monkeypatch):
    monkeypatch.setattr(module, "TILE_TOKENS", 4)
    x, weight, bias, tail = leaves(2, 11, dtype=torch.float32)
    y, _, _ = causal_conv(x, weight, bias, doc_BT=documents(2, 11, 0.3, 0), tail_BKD=tail)
    for gradient in torch.autograd.grad(y.sum(), (x, weight, bias, tail)):
        assert bool(gradient.isfinite().all())


def test_changing_one_document_leaves_every_other_bitwise_untouched():
    doc = torch.tensor([[0] * 5 + [1] * 6 + [2] * 1 + [3] * 9])
    inside = doc[0] == 1
    results = []
    for seed in (0, 1):
        x, weight, bias, _ = leaves(1, 21, dtype=torch.float32)
        other = leaves(1, 21, seed=seed, dtype=torch.float32)[0]
        x = torch.where(inside[:, None], other, x).detach().requires_grad_()
        y, _, _ = causal_conv(x, weight, bias, doc_BT=doc)
        results.append((y, torch.autograd.grad(y, x, torch.ones_like(y))[0]))
    for one, other in zip(*results, strict=True):
        assert torch.equal(one[:, ~inside], other[:, ~inside])
        assert not torch.equal(one[:, inside], other[:, inside])


def test_what_cannot_be_honoured_is_refused():
    x, weight, bias, tail = leaves(2, 5)
    with pytest.raises(UserError, match="'gelu'"):
        causal_conv(x, weight, bias, activation="gelu")
    with pytest.raises(UserError, match="tail"):
        causal_conv(x, weight, bias, tail_BKD=tail[:, 1:])
    with pytest.raises(UserError, match="1 taps"):
        causal_conv(x, weight[:, :1], bias)
