"""The chunked delta rule says what the token-by-token recurrence says, in values and gradients, for any documents."""

from __future__ import annotations

import pytest
import torch

from longspan.foundation.errors import UserError
from longspan.ops import gated_delta_chunked, ssd_tiles
from longspan.ops.gated_delta import gated_delta

from .scans import GATED_DELTA, assert_same

INPUTS = GATED_DELTA.names[:-1]
inputs, run = GATED_DELTA.inputs, GATED_DELTA.run


@pytest.mark.parametrize("on_gpu", [False, True])
@pytest.mark.parametrize("chance", [None, 0.1])
def test_tiles_of_any_shape_change_nothing(chance, on_gpu, documents, monkeypatch):
    """Smaller than a row with one head each, as on a CPU; everything with all heads at once, as on a GPU."""
    monkeypatch.setattr(ssd_tiles, "TILE_TOKENS", 10**6 if on_gpu else 16)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 0)
    if on_gpu:
        monkeypatch.setattr(gated_delta_chunked, "_tiles", lambda z: list(ssd_tiles.tiles(z.v, 1)))
    given_inputs = inputs(3, 61)
    doc = None if chance is None else documents(3, 61, chance, 5)
    assert_same(run(given_inputs, doc), run(given_inputs, doc, backend="reference"))


@pytest.mark.parametrize("chunk", [1, 4])
def test_gradients_pass_gradcheck(chunk, documents):
    leaves = [value.requires_grad_() for value in inputs(2, 9, heads=2, key_dim=2, value_dim=3).values()]
    doc = documents(2, 9, 0.3, 1)

    def scan(*values):
        return gated_delta(*values[:5], doc_BT=doc, initial_state_BHKV=values[5], chunk=chunk)

    assert torch.autograd.gradcheck(scan, leaves)


@pytest.mark.parametrize("beta", [0.5, 1.0, 1.9])
def test_repeated_keys_without_decay_stay_precise(beta):
    """The worst case of the triangular system: every key the same, nothing forgotten, full correction."""
    given_inputs = inputs(1, 128, dtype=torch.float32)
    given_inputs["k"] = given_inputs["k"][:, :1].expand(-1, 128, -1, -1).contiguous()
    given_inputs["g"] = torch.zeros_like(given_inputs["g"])
    given_inputs["beta"] = torch.full_like(given_inputs["beta"], beta)
    expected = run({name: value.double() for name, value in given_inputs.items()}, backend="reference")
    assert_same(run(given_inputs, chunk=64), expected, 1e-4)


def test_zero_beta_corrects_nothing_and_keeps_its_gradient():
    given_inputs = inputs(2, 20)
    given_inputs["beta"][:, 3:11] = 0.0
    assert_same(run(given_inputs), run(given_inputs, backend="reference"))


def test_extreme_decays_stay_finite(documents):
    given_inputs = inputs(2, 40, dtype=torch.float32)
    given_inputs["g"] = given_inputs["g"] * 300.0
    doc = documents(2, 40, 0.1, 3)
    got = run(given_inputs, doc)
    assert all(bool(z.isfinite().all()) for z in got)
    assert_same(got, run(given_inputs, doc, backend="reference"), 1e-4)


@pytest.mark.usefixtures("poisoned_memory")
def test_nothing_reads_memory_that_was_never_written(documents):
    given_inputs = inputs(2, 27, dtype=torch.float32)
    assert all(bool(z.isfinite().all()) for z in run(given_inputs, documents(2, 27, 0.2, 4)))


@pytest.mark.parametrize(("key_dim", "value_dim", "chunk"), [(4, 5, 16), (64, 128, 64), (12, 24, 8)])
@pytest.mark.parametrize("changed", [0, 1, 2, 3])
def test_changing_one_document_leaves_every_other_bitwise_untouched(changed, key_dim, value_dim, chunk):
    """Documents that begin and end inside chunks: the triangular systems hold several of them."""
    doc = torch.tensor([[0] * 13 + [1] * 50 + [2] * 1 + [3] * 70])
    sizes = {"heads": 2, "key_dim": key_dim, "value_dim": value_dim}
    before, other = (inputs(1, 134, seed=seed, dtype=torch.float32, **sizes) for seed in (0, 1))
    inside = doc[0] == changed
    after = dict(before)
    for name in INPUTS:
        after[name] = torch.where(inside.view(1, -1, *[1] * (before[name].dim() - 2)), other[name], before[name])
    results = [
        dict(zip(("o", "final", *INPUTS), run(z, doc, chunk=chunk, with_state=False), strict=True))
        for z in (before, after)
    ]
    for name in ("o", *INPUTS):
        assert torch.equal(results[0][name][:, ~inside], results[1][name][:, ~inside]), name
    assert torch.equal(results[0]["final"], results[1]["final"]) == (changed != 3)


@pytest.mark.parametrize(
    ("change", "words"),
    [({"backend": "triton"}, "gated_delta backend 'triton'"), ({"chunk": 0}, "chunks of 0")],
)
def test_what_cannot_be_honoured_is_refused(change, words):
    given_inputs = inputs(1, 4)
    with pytest.raises(UserError, match=words):
        gated_delta(*[given_inputs[n] for n in INPUTS], **change)


@pytest.mark.parametrize(("name", "words"), [("g", "log decay g of"), ("beta", "of shapes")])
def test_growing_states_and_misfits_are_refused(name, words):
    given_inputs = inputs(1, 4)
    given_inputs[name] = -given_inputs[name] if name == "g" else given_inputs[name][:, :2]
    with pytest.raises(UserError, match=words):
        gated_delta(*[given_inputs[n] for n in INPUTS])
