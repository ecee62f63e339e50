"""The chunked selective scan says what the recurrence says, in values and gradients, for any documents."""

from __future__ import annotations

import pytest
import torch

from longspan.foundation.errors import UserError
from longspan.ops import selective_scan_chunked
from longspan.ops.selective_scan import selective_scan

from .scans import SELECTIVE_SCAN, assert_same

NAMES = SELECTIVE_SCAN.names
PER_TOKEN = ("x", "dt", "B", "C")
inputs, run = SELECTIVE_SCAN.inputs, SELECTIVE_SCAN.run


@pytest.fixture(params=[1, 30, 180])
def tile(request, monkeypatch) -> None:
    """Tiles of one chunk, of a chunk of two rows, of two chunks of three rows; else there is one of everything."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    monkeypatch.setitem(selective_scan_chunked.STEP_ELEMENTS, "cpu", request.param)


@pytest.mark.usefixtures("tile")
@pytest.mark.parametrize("with_state", [False, True])
@pytest.mark.parametrize("chance", [None, 0.05, 0.4, 1.0])
@pytest.mark.parametrize("time", [1, 2, 7, 8, 9, 24, 37])
def test_tiles_of_any_shape_change_nothing(time, chance, with_state, documents):
    given_inputs = inputs(3, time)
    doc = initial_doc = None
    if chance is not None:
        doc = documents(3, time, chance, time)
        initial_doc = doc[:, 0].clone()
        initial_doc[0] = 77
    reference = run(given_inputs, doc, initial_doc, backend="reference", with_state=with_state)
    assert_same(run(given_inputs, doc, initial_doc, with_state=with_state), reference)


def test_the_recurrence_is_the_published_one():
    """`selective_scan_ref` of mamba_ssm, written out for one channel and one state."""
    x, dt, B, C = (
        torch.tensor([[[v] for v in values]]) for values in ([1.0, 2.0], [0.5, 0.25], [3.0, 4.0], [5.0, 6.0])
    )
    y, final = selective_scan(x, dt, torch.tensor([[-2.0]]), B, C, torch.tensor([7.0]))
    first = 0.5 * 1.0 * 3.0
    second = torch.exp(torch.tensor(-0.5)) * first + 0.25 * 2.0 * 4.0
    assert torch.allclose(y[0, :, 0], torch.stack([torch.tensor(first * 5.0 + 7.0), second * 6.0 + 14.0]))
    assert torch.allclose(final[0, 0, 0], second)


@pytest.mark.usefixtures("tile")
def test_gradients_pass_gradcheck(documents):
    leaves = [value.requires_grad_() for value in inputs(2, 9, channels=2, state=2).values()]
    doc = documents(2, 9, 0.3, 1)

    def scan(*values):
        return selective_scan(*values[:6], doc_BT=doc, initial_state_BNE=values[6], chunk=4)

    assert torch.autograd.gradcheck(scan, leaves, fast_mode=True)


@pytest.mark.usefixtures("tile")
@pytest.mark.parametrize("rate", [0.0, 1e3])
def test_no_decay_and_extreme_decays_are_exact_and_finite(rate, documents):
    given_inputs = inputs(2, 40, dtype=torch.float32)
    given_inputs["A"] = given_inputs["A"] * rate
    doc = documents(2, 40, 0.1, 3)
    got = run(given_inputs, doc)
    assert all(bool(z.isfinite().all()) for z in got)
    assert_same(got, run(given_inputs, doc, backend="reference"), 1e-5)


@pytest.mark.usefixtures("poisoned_memory", "tile")
@pytest.mark.parametrize("with_state", [False, True])
def test_nothing_reads_memory_that_was_never_written(with_state, documents):
    given_inputs = inputs(2, 27, dtype=torch.float32)
    got = run(given_inputs, documents(2, 27, 0.2, 4), with_state=with_state)
    assert all(bool(z.isfinite().all()) for z in got)
    with torch.no_grad():
        y, _ = selective_scan(*[given_inputs[n] for n in NAMES[:6]], chunk=8)
    assert bool(y.isfinite().all())


@pytest.mark.usefixtures("tile")
def test_changing_one_document_leaves_every_other_bitwise_untouched():
    doc = torch.tensor([[0] * 13 + [1] * 24 + [2] * 1 + [3] * 32])
    before = inputs(1, 70, dtype=torch.float32)
    other = inputs(1, 70, seed=1, dtype=torch.float32)
    inside = doc[0] == 1
    after = dict(before)
    for name in PER_TOKEN:
        after[name] = torch.where(inside[None, :, None], 100.0 * other[name].abs(), before[name])
    results = [dict(zip(("y", "final", *NAMES), run(z, doc, chunk=16), strict=True)) for z in (before, after)]
    for name in ("y", *PER_TOKEN):
        assert torch.equal(results[0][name][:, ~inside], results[1][name][:, ~inside]), name
        assert not torch.equal(results[0][name][:, inside], results[1][name][:, inside]), name
    for name in ("final", "state"):
        assert torch.equal(results[0][name], results[1][name]), name


def test_a_later_token_changes_no_earlier_one():
    before = inputs(1, 70, dtype=torch.float32)
    after = {name: z.clone() for name, z in before.items()}
    for name in PER_TOKEN:
        after[name][:, 41:] += 1.0
    first, second = (run(z, chunk=16)[0] for z in (before, after))
    assert torch.equal(first[:, :41], second[:, :41])


def test_a_state_that_was_passed_in_stays_as_it_was():
    given_inputs = inputs(2, 21)
    held = given_inputs["state"].clone()
    with torch.no_grad():
        selective_scan(*[given_inputs[n] for n in NAMES[:6]], initial_state_BNE=given_inputs["state"], chunk=8)
    assert torch.equal(given_inputs["state"], held)


def test_the_backward_keeps_nothing_of_the_size_of_all_states():
    """The inputs, the step sizes with their document starts, and one state per chunk."""
    kept = []
    leaves = {name: value.requires_grad_() for name, value in inputs(1, 256, channels=64, state=16).items()}
    with torch.autograd.graph.saved_tensors_hooks(lambda z: kept.append(z.numel()) or z, lambda z: z):
        selective_scan(*[leaves[n] for n in NAMES[:6]], chunk=32)
    assert sum(kept) <= sum(leaves[n].numel() for n in (*NAMES[:6], "dt")) + 256 // 32 * 64 * 16


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"backend": "triton"}, "selective scan backend 'triton'"),
        ({"chunk": 0}, "chunks of 0"),
    ],
)
def test_what_cannot_be_honoured_is_refused(change, words):
    given_inputs = inputs(1, 4)
    with pytest.raises(UserError, match=words):
        selective_scan(*[given_inputs[n] for n in NAMES[:6]], **change)


@pytest.mark.parametrize("name", ["x", "dt", "A", "B", "C"])
def test_shapes_that_do_not_fit_are_refused(name):
    given_inputs = inputs(1, 4)
    given_inputs[name] = given_inputs[name][..., :-1]
    with pytest.raises(UserError, match="of shapes"):
        selective_scan(*[given_inputs[n] for n in NAMES[:6]])


def test_growing_states_are_refused():
    given_inputs = inputs(1, 4)
    with pytest.raises(UserError, match="A of"):
        selective_scan(*[given_inputs[n] if n != "A" else -given_inputs[n] for n in NAMES[:6]])
