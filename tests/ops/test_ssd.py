"""The chunked scan says what the token-by-token recurrence says, in values and gradients, for any documents."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import softplus

from longspan.foundation.errors import UserError
from longspan.ops import ssd_tiles
from longspan.ops.ssd import ssd

from .scans import assert_same, values_and_gradients

NAMES = ("x", "dt", "A", "B", "C", "D", "state")


def inputs(batch, time, heads=4, head_dim=3, groups=1, state=5, seed=0, dtype=torch.float64) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    values = (
        normal(batch, time, heads, head_dim),
        softplus(normal(batch, time, heads) - 1.0),
        -torch.rand(heads, generator=generator, dtype=torch.float64) * 8.0 - 0.1,
        normal(batch, time, groups, state),
        normal(batch, time, groups, state),
        normal(heads),
        normal(batch, heads, head_dim, state),
    )
    return {name: value.to(dtype) for name, value in zip(NAMES, values, strict=True)}


def run(given_inputs, doc=None, initial_doc=None, chunk=8, backend="chunked", with_state=True):
    state = "initial_state_BHPN" if with_state else None
    settings = {"doc_BT": doc, "initial_doc_B": initial_doc, "chunk": chunk, "backend": backend}
    return values_and_gradients(ssd, given_inputs, state, **settings)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("with_state", [False, True])
@pytest.mark.parametrize("chance", [None, 0.05, 0.4, 1.0])
@pytest.mark.parametrize("time", [1, 2, 7, 8, 9, 24, 37])
def test_chunked_equals_the_recurrence_in_values_and_gradients(time, chance, with_state, groups, documents):
    given_inputs = inputs(3, time, groups=groups)
    doc = initial_doc = None
    if chance is not None:
        doc = documents(3, time, chance, time)
        initial_doc = doc[:, 0].clone()
        initial_doc[0] = 77
    reference = run(given_inputs, doc, initial_doc, backend="reference", with_state=with_state)
    assert_same(run(given_inputs, doc, initial_doc, with_state=with_state), reference)


@pytest.mark.parametrize("chance", [None, 0.1])
def test_tiles_smaller_than_a_row_change_nothing(chance, documents, monkeypatch):
    monkeypatch.setattr(ssd_tiles, "TILE_TOKENS", 16)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 0)
    given_inputs = inputs(3, 61, groups=2)
    doc = None if chance is None else documents(3, 61, chance, 5)
    assert_same(run(given_inputs, doc), run(given_inputs, doc, backend="reference"))


@pytest.mark.parametrize("boundary", [7, 8, 9, 15, 16, 17])
def test_boundaries_on_and_off_chunk_edges(boundary):
    doc = (torch.arange(24) >= boundary).int().expand(2, -1)
    given_inputs = inputs(2, 24)
    assert_same(run(given_inputs, doc), run(given_inputs, doc, backend="reference"))


def test_a_document_is_a_run_of_equal_ids():
    doc = torch.tensor([[0, 0, 1, 1, 0, 0, 0, 2, 0, 0]])
    given_inputs = inputs(1, 10)
    assert_same(run(given_inputs, doc, chunk=4), run(given_inputs, doc, chunk=4, backend="reference"))


def test_gradients_pass_gradcheck(documents):
    leaves = [value.requires_grad_() for value in inputs(2, 9, heads=2, head_dim=2, state=2).values()]
    doc = documents(2, 9, 0.3, 1)

    def scan(*values):
        return ssd(*values[:6], doc_BT=doc, initial_state_BHPN=values[6], chunk=4)

    assert torch.autograd.gradcheck(scan, leaves, fast_mode=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision_inputs_keep_statistics_in_fp32(dtype, documents):
    exact = inputs(2, 150)
    doc = documents(2, 150, 0.03, 2)
    rounded = {name: value.to(dtype if name in ("x", "B", "C") else torch.float32) for name, value in exact.items()}
    expected = run({name: value.double() for name, value in rounded.items()}, doc, backend="reference")
    got = run(rounded, doc, chunk=64)
    assert got[0].dtype == dtype
    assert got[1].dtype == torch.float32
    assert_same(got, expected, 2e-5 if dtype == torch.float32 else 2e-2)


def test_extreme_decays_stay_finite(documents):
    given_inputs = inputs(2, 40, dtype=torch.float32)
    given_inputs["dt"] = given_inputs["dt"] * 100.0
    doc = documents(2, 40, 0.1, 3)
    got = run(given_inputs, doc)
    assert all(bool(z.isfinite().all()) for z in got)
    expected = run(given_inputs, doc, backend="reference")
    without_A = [z for name, z in zip(("y", "final", *NAMES), got, strict=True) if name != "A"]
    assert_same(without_A, [z for name, z in zip(("y", "final", *NAMES), expected, strict=True) if name != "A"], 1e-4)


@pytest.mark.usefixtures("poisoned_memory")
def test_nothing_reads_memory_that_was_never_written(documents):
    given_inputs = inputs(2, 27, dtype=torch.float32)
    assert all(bool(z.isfinite().all()) for z in run(given_inputs, documents(2, 27, 0.2, 4)))


def test_changing_one_document_leaves_every_other_bitwise_untouched():
    doc = torch.tensor([[0] * 13 + [1] * 24 + [2] * 1 + [3] * 32])
    before = inputs(1, 70, dtype=torch.float32)
    other = inputs(1, 70, seed=1, dtype=torch.float32)
    inside = doc[0] == 1
    after = dict(before)
    for name in ("x", "dt", "B", "C"):
        after[name] = torch.where(inside.view(1, -1, *[1] * (before[name].dim() - 2)), other[name], before[name])
    results = [dict(zip(("y", "final", *NAMES), run(z, doc, chunk=16), strict=True)) for z in (before, after)]
    for name in ("y", "x", "dt", "B", "C"):
        assert torch.equal(results[0][name][:, ~inside], results[1][name][:, ~inside]), name
    assert torch.equal(results[0]["final"], results[1]["final"])


@settings(max_examples=40, deadline=None)
@given(
    time=st.integers(2, 40),
    cut=st.floats(0.0, 1.0),
    chunk=st.integers(1, 12),
    boundaries=st.none() | st.sets(st.integers(1, 39)),
)
def test_two_calls_at_any_split_equal_one(time, cut, chunk, boundaries):
    given_inputs = inputs(2, time, seed=time)
    split = 1 + int(cut * (time - 2))
    doc = None
    if boundaries is not None:
        doc = torch.tensor([[sum(b <= t for b in boundaries) for t in range(time)]] * 2)
    whole, final = ssd(*[given_inputs[n] for n in NAMES[:6]], doc_BT=doc, chunk=chunk)
    state = last_doc = None
    pieces = []
    for span in (slice(0, split), slice(split, time)):
        part = [given_inputs[n] if n in "AD" else given_inputs[n][:, span] for n in NAMES[:6]]
        doc_part = None if doc is None else doc[:, span]
        y, state = ssd(*part, doc_BT=doc_part, initial_state_BHPN=state, initial_doc_B=last_doc, chunk=chunk)
        last_doc = None if doc_part is None else doc_part[:, -1]
        pieces.append(y)
    assert_same((torch.cat(pieces, 1), state), (whole, final))


def test_decoding_token_by_token_equals_one_pass(documents):
    given_inputs = inputs(2, 21)
    doc = documents(2, 21, 0.2, 6)
    whole, final = ssd(*[given_inputs[n] for n in NAMES[:6]], doc_BT=doc, chunk=8)
    state = last_doc = None
    for t in range(21):
        part = [given_inputs[n] if n in "AD" else given_inputs[n][:, t : t + 1] for n in NAMES[:6]]
        y, state = ssd(*part, doc_BT=doc[:, t : t + 1], initial_state_BHPN=state, initial_doc_B=last_doc)
        last_doc = doc[:, t]
        assert_same((y,), (whole[:, t : t + 1],))
    assert_same((state,), (final,))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"backend": "triton"}, "ssd backend 'triton'"),
        ({"chunk": 0}, "chunks of 0"),
    ],
)
def test_what_cannot_be_honoured_is_refused(change, words):
    given_inputs = inputs(1, 4)
    with pytest.raises(UserError, match=words):
        ssd(*[given_inputs[n] for n in NAMES[:6]], **change)


def test_growing_states_are_refused():
    given_inputs = inputs(1, 4)
    with pytest.raises(UserError, match="A of"):
        ssd(*[given_inputs[n] if n != "A" else -given_inputs[n] for n in NAMES[:6]])
