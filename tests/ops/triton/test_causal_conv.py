"""The convolution's kernel says what the plain one says in fp64, at any length, with any documents."""

from __future__ import annotations

import pytest
import torch

from longspan.ops import causal_conv as op

FP32, BF16 = torch.float32, torch.bfloat16


@pytest.fixture(autouse=True)
def small_tiles(device, monkeypatch):
    """Several spans and channel blocks even at small shapes."""
    from longspan.ops.triton import causal_conv as kernels

    monkeypatch.setattr(kernels, "FORWARD", kernels.Tile(4, 16, 1))
    monkeypatch.setattr(kernels, "BACKWARD", kernels.Tile(4, 16, 1))


@pytest.mark.parametrize(
    ("dtype", "chance", "stages", "time", "channels"),
    [(FP32, 0.2, 3, 7, 21), (BF16, 1.0, 2, 7, 32), (BF16, None, 4, 7, 21), (FP32, 0.1, 3, 12, 32)],
)
def test_matches_fp64(
    stages, chance, time, channels, dtype, assert_same, device, documents, monkeypatch, normal, served
):
    from longspan.ops.triton import causal_conv as kernels

    for name in ("FORWARD", "BACKWARD"):
        monkeypatch.setattr(kernels, name, kernels.Tile(4, 16, 1, stages))
    batch = 2
    doc = None if chance is None else documents(batch, time, chance)
    on_device = None if doc is None else doc.to(device)
    assert_same(
        lambda *z: op.causal_conv(*z, doc_BT=on_device)[:2],
        lambda *z: op.causal_conv(*z, doc_BT=doc)[:2],
        [normal(batch, time, channels), normal(channels, 4, seed=1), normal(channels, seed=2)],
        [dtype, FP32, FP32],
    )


@pytest.mark.parametrize(("taps", "time"), [(2, 2), (3, 8), (4, 3)])
def test_shorter_filters_rows_and_no_activation(taps, time, assert_same, normal, served):
    assert_same(
        lambda *z: op.causal_conv(*z, None, activation=None)[:2],
        lambda *z: op.causal_conv(*z, None, activation=None)[:2],
        [normal(2, time, 8), normal(8, taps, seed=1)],
        [FP32, FP32],
    )


def test_a_slice_of_wider_rows_needs_no_copy(device, normal, served):
    wide = normal(2, 5, 40).float().to(device)
    weight = normal(16, 4).float().to(device)
    y, tail, _ = op.causal_conv(wide[..., 8:24], weight, None)
    assert torch.equal(y, op.causal_conv(wide[..., 8:24].contiguous(), weight, None)[0])
    assert tail.untyped_storage().data_ptr() == wide.untyped_storage().data_ptr()


def test_nothing_of_one_document_reaches_another(device, documents, normal, served):
    doc = documents(2, 9, 0.3).to(device)
    x, weight, bias = (z.float().to(device) for z in (normal(2, 9, 8), normal(8, 4), normal(8)))
    other = doc == doc[:, 4:5]
    poisoned = x.masked_fill(other[..., None], torch.nan).requires_grad_()
    clean = x.clone().requires_grad_()
    results = []
    for z in (clean, poisoned):
        y, _, _ = op.causal_conv(z, weight, bias, doc_BT=doc)
        results.append((y[~other], torch.autograd.grad(y[~other].sum(), z)[0][~other]))
    for one, same in zip(*results, strict=True):
        assert torch.equal(one, same)


def test_the_compiler_sees_through(device, normal, served):
    tensors = [z.float().to(device) for z in (normal(2, 5, 8), normal(8, 4), normal(8))]
    from longspan.ops.triton.causal_conv import causal_conv

    doc = torch.zeros(2, 5, dtype=torch.int32, device=device)
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(causal_conv, (*(z.requires_grad_() for z in tensors), doc, True), test_utils=tests)
