"""The kernels of the gated delta rule say what the plain loop says in fp64, at any length, with any documents."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from longspan.ops.gated_delta import gated_delta

FP32, BF16 = torch.float32, torch.bfloat16
pytestmark = pytest.mark.usefixtures("small_chunks")


@pytest.fixture
def size(device) -> tuple[int, int, int, int, int]:
    """Rows, tokens, heads, key dim, value dim."""
    return (2, 140, 3, 64, 128) if device.type == "cuda" else (2, 37, 2, 12, 24)


def inputs(normal, rows: int, time: int, heads: int, key_dim: int, value_dim: int) -> list[Tensor]:
    return [
        normal(rows, time, heads, key_dim),
        normal(rows, time, heads, key_dim, seed=1),
        normal(rows, time, heads, value_dim, seed=2),
        -F.softplus(normal(rows, time, heads, seed=3) - 1.0),
        torch.sigmoid(normal(rows, time, heads, seed=4)),
    ]


@pytest.mark.parametrize(
    ("dtype", "chance", "rows", "time"), [(FP32, 0.1, 2, 37), (BF16, 0.1, 1, 33), (BF16, 1.0, 1, 18)]
)
def test_matches_fp64(chance, dtype, rows, time, assert_same, device, documents, normal, served, size):
    """Boundaries on and off the edges of chunks, documents longer than a chunk and of one token."""
    if device.type == "cpu":
        size = (rows, time, *size[2:])
    doc = documents(*size[:2], chance)
    doc[0, 16:] += 100
    assert_same(
        lambda *z: gated_delta(*z, doc_BT=doc.to(device)),
        lambda *z: gated_delta(*z, doc_BT=doc, backend="reference"),
        inputs(normal, *size),
        [dtype, dtype, dtype, FP32, FP32],
        roundings=2,
        # Where every token is a document nothing decays on the way to another.
        zeros=[5] if chance == 1.0 else [],
    )


def test_goes_on_from_a_state_whose_document_may_be_over(assert_same, device, documents, normal, served, size):
    if device.type == "cpu":
        size = (2, 18, *size[2:])
    doc = documents(*size[:2], 0.05)
    before = torch.stack((doc[0, 0], doc[1, 0] + 9))
    rows, _, heads, key_dim, value_dim = size
    assert_same(
        lambda *z: gated_delta(*z[:5], doc_BT=doc.to(device), initial_state_BHKV=z[5], initial_doc_B=before.to(device)),
        lambda *z: gated_delta(*z[:5], doc_BT=doc, initial_state_BHKV=z[5], initial_doc_B=before, backend="reference"),
        [*inputs(normal, *size), normal(rows, heads, key_dim, value_dim, seed=5)],
        [FP32] * 6,
    )


@pytest.mark.parametrize(("dtype", "goes_on"), [(FP32, True), (BF16, False)])
def test_rows_cut_into_segments(dtype, goes_on, assert_same, device, documents, normal, served, size, monkeypatch):
    """Documents end in some segments and go on through others; the last segment is not full."""
    from longspan.ops.triton import gated_delta as kernels

    time = 500 if device.type == "cuda" else 55
    rows, _, heads, key_dim, value_dim = size
    for name, sizes in (("SEGMENT_PROGRAMS", 1000), ("SHORTEST_SEGMENT", 1)):
        monkeypatch.setattr(kernels, name, sizes)
    shape = torch.empty(rows, time, heads, value_dim, dtype=dtype, device=device)
    assert kernels.segments_of(shape)[0] >= 3
    doc = documents(rows, time, 1.0 / time)
    doc[0, time // 2 :] += 100
    past = [normal(rows, heads, key_dim, value_dim, seed=5)] if goes_on else []

    def call(place, backend, *z):
        states = {"initial_state_BHKV": z[5], "initial_doc_B": place(doc[:, 0])} if goes_on else {}
        return gated_delta(*z[:5], doc_BT=place(doc), **states, backend=backend)

    assert_same(
        lambda *z: call(lambda d: d.to(device), "chunked", *z),
        lambda *z: call(lambda d: d, "reference", *z),
        [*inputs(normal, rows, time, heads, key_dim, value_dim), *past],
        [dtype, dtype, dtype, FP32, FP32, *([FP32] * len(past))],
        roundings=2,
    )


def test_keys_that_repeat_are_corrected_exactly(assert_same, device, normal, served, size):
    """One key all the time, never forgotten: powers of the system would reach 1e8, its inverse stays small."""
    if device.type == "cpu":
        # Every tile is full.
        size = (1, 16, 1, 16, 16)
    q, _, v, g, beta = inputs(normal, *size)
    k = normal(size[0], 1, size[2], size[3], seed=1).expand_as(q).contiguous()
    assert_same(
        lambda *z: gated_delta(*z)[:1],
        lambda *z: gated_delta(*z, backend="reference")[:1],
        [q, k, v, g * 1e-3, torch.full_like(beta, 0.9)],
        [FP32] * 5,
    )


def test_nothing_of_one_document_reaches_another(device, documents, normal, served):
    doc = documents(1, 33, 0.1).to(device)
    other = doc == doc[:, 20:21]
    q, k, v, g, beta = (z.float().to(device) for z in inputs(normal, 1, 33, 1, 16, 16))
    results = []
    for scale in (1.0, 1e3):
        scaled = [torch.where(other[..., None, None], scale * z, z).requires_grad_() for z in (q, k, v)]
        o, _ = gated_delta(*scaled, g, beta, doc_BT=doc)
        results.append((o[~other], *(z[~other] for z in torch.autograd.grad(o[~other].sum(), scaled))))
    for one, same in zip(*results, strict=True):
        assert torch.equal(one, same)


def test_the_compiler_sees_through(device, documents, normal, served):
    from longspan.ops.triton.gated_delta import gated_delta as kernel

    doc = documents(1, 17, 0.1).to(device)
    tensors = [z.float().to(device).requires_grad_() for z in inputs(normal, 1, 17, 1, 16, 16)]
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(kernel, (*tensors, doc, None, None), test_utils=tests)
