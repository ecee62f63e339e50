"""The chunked scan says what the token-by-token recurrence says, in values and gradients, for any documents."""

from __future__ import annotations

import pytest
import torch

from longspan.foundation.errors import UserError
from longspan.ops import ssd_tiles
from longspan.ops.ssd import ssd

from .scans import SSD, assert_same

NAMES = SSD.names
inputs, run = SSD.inputs, SSD.run


@pytest.mark.parametrize("chance", [None, 0.1])
def test_tiles_smaller_than_a_row_change_nothing(chance, documents, monkeypatch):
    monkeypatch.setattr(ssd_tiles, "TILE_TOKENS", 16)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 0)
    given_inputs = inputs(3, 61, groups=2)
    doc = None if chance is None else documents(3, 61, chance, 5)
    assert_same(run(given_inputs, doc), run(given_inputs, doc, backend="reference"))


def test_gradients_pass_gradcheck(documents):
    leaves = [value.requires_grad_() for value in inputs(2, 9, heads=2, head_dim=2, state=2).values()]
    doc = documents(2, 9, 0.3, 1)

    def scan(*values):
        return ssd(*values[:6], doc_BT=doc, initial_state_BHPN=values[6], chunk=4)

    assert torch.autograd.gradcheck(scan, leaves, fast_mode=True)


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
