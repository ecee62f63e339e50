"""The kernels of the Mamba-2 scan say what the plain loop says in fp64, at any length, with any documents."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from longspan.ops.ssd import ssd

FP32, BF16 = torch.float32, torch.bfloat16
pytestmark = pytest.mark.usefixtures("small_chunks")


@pytest.fixture
def size(device) -> tuple[int, int, int, int, int]:
    """Rows, tokens, heads, head dim, state."""
    return (2, 40, 4, 64, 128) if device.type == "cuda" else (2, 37, 2, 8, 24)


def inputs(
    normal, rows: int, time: int, heads: int, head_dim: int, groups: int, state: int, rate: float = 4.0
) -> list[Tensor]:
    return [
        normal(rows, time, heads, head_dim),
        F.softplus(normal(rows, time, heads) - 1.0),
        -normal(heads).abs() * rate,
        normal(rows, time, groups, state, seed=1),
        normal(rows, time, groups, state, seed=2),
        normal(heads),
    ]


@pytest.mark.parametrize(
    ("dtype", "chance", "rows", "time"), [(FP32, 0.1, 2, 37), (BF16, 0.1, 1, 33), (BF16, 1.0, 1, 18)]
)
def test_matches_fp64(chance, dtype, rows, time, assert_same, device, documents, normal, served, size):
    """Boundaries on and off the edges of chunks, documents longer than a chunk and of one token."""
    if device.type == "cpu":
        size = (rows, time, *size[2:])
    rows, time, heads, head_dim, state = size
    doc = documents(rows, time, chance)
    doc[0, 16:] += 100
    assert_same(
        lambda *z: ssd(*z, doc_BT=doc.to(device)),
        lambda *z: ssd(*z, doc_BT=doc, backend="reference"),
        inputs(normal, rows, time, heads, head_dim, 1, state),
        [dtype, FP32, FP32, dtype, dtype, FP32],
        # Where every token is a document nothing decays on the way to another.
        zeros=[4] if chance == 1.0 else [],
    )


def test_goes_on_from_a_state_whose_document_may_be_over(assert_same, device, documents, normal, served, size):
    if device.type == "cpu":
        size = (2, 18, *size[2:])
    rows, time, heads, head_dim, state = size
    doc = documents(rows, time, 0.05)
    before = torch.stack((doc[0, 0], doc[1, 0] + 9))
    assert_same(
        lambda *z: ssd(*z[:6], doc_BT=doc.to(device), initial_state_BHPN=z[6], initial_doc_B=before.to(device)),
        lambda *z: ssd(*z[:6], doc_BT=doc, initial_state_BHPN=z[6], initial_doc_B=before, backend="reference"),
        [*inputs(normal, rows, time, heads, head_dim, 1, state), normal(rows, heads, head_dim, state)],
        [BF16, FP32, FP32, BF16, BF16, FP32, FP32],
    )


@pytest.fixture
def cut(device, monkeypatch) -> Callable[[int], tuple[int, int]]:
    """Cuts rows into so many segments; heads that take part, and tokens of a chunk."""
    from longspan.ops.triton import ssd_launches as kernels

    # Of one head the gradient of A is one number, which may happen to be small.
    heads, chunk = (8, kernels.CUTS[FP32].chunk) if device.type == "cuda" else (1, 16)
    monkeypatch.setattr(kernels, "LEAST_CHUNKS", 1)

    def into(segments: int) -> tuple[int, int]:
        monkeypatch.setattr(kernels, "SEGMENT_PROGRAMS", segments * heads)
        return heads, chunk

    return into


@pytest.mark.parametrize(
    ("chance", "segments", "chunks"), [(0.02, 2, 7), (0.02, 7, 7), (1.0, 3, 7), (0.005, 5, 23), (0.0, 5, 23)]
)
def test_rows_cut_into_segments(chance, segments, chunks, assert_same, cut, device, documents, normal, served):
    """The last is shorter, or they are one chunk each; states pass through several of them, or end inside; some begin
    behind a document and others where they happen to fall."""
    heads, chunk = cut(segments)
    time = chunks * chunk - 3
    doc = documents(1, time, chance)
    before = doc[:, 0].to(device)
    assert_same(
        lambda *z: ssd(*z[:6], doc_BT=doc.to(device), initial_state_BHPN=z[6], initial_doc_B=before),
        lambda *z: ssd(*z[:6], doc_BT=doc, initial_state_BHPN=z[6], initial_doc_B=doc[:, 0], backend="reference"),
        # A state lasts for several chunks.
        [*inputs(normal, 1, time, heads, 16, 1, 16, rate=0.02), normal(1, heads, 16, 16)],
        [FP32] * 7,
    )


@pytest.mark.parametrize("places", [(0,), (1, 2), (0, 2, 4), (4,)])
def test_no_bit_changes_where_every_segment_has_a_document_of_its_own(
    places, cut, device, normal, poisoned_memory, served
):
    """Documents begin in the first, the last or other chunks of three segments of five."""
    results = []
    for segments in (1, 3):
        heads, chunk = cut(segments)
        time = 15 * chunk
        begun = [
            (torch.arange(time) >= (5 * segment + place) * chunk + 9).int() for segment in range(3) for place in places
        ]
        doc = torch.stack(begun).sum(0)[None].to(device)
        leaves = [z.float().to(device).requires_grad_() for z in inputs(normal, 1, time, heads, 16, 1, 16, rate=0.02)]
        y, last = ssd(*leaves, doc_BT=doc)
        results.append((y, last, *torch.autograd.grad(y.square().sum() + last.sum(), leaves)))
    for one, same in zip(*results, strict=True):
        assert torch.equal(one, same)


@pytest.mark.parametrize(("enough", "groups"), [(1, 2), (1000, 2), (1, 1)])
def test_groups_of_heads_and_whole_chunks(enough, groups, assert_same, monkeypatch, normal, served):
    """One program for the heads of a group in a chunk, or each head its own, or two heads each."""
    from longspan.ops.triton import ssd_launches as kernels

    monkeypatch.setattr(kernels, "ENOUGH_PROGRAMS", enough)
    monkeypatch.setattr(kernels, "KEEP_STATES", enough == 1)
    cuts = {dtype: cut._replace(part_heads=2) for dtype, cut in kernels.CUTS.items()}
    monkeypatch.setattr(kernels, "CUTS", cuts)
    assert_same(
        lambda *z: ssd(*z)[:1],
        lambda *z: ssd(*z, backend="reference")[:1],
        inputs(normal, 1, 32, 4, 16, groups, 16),
        [BF16, FP32, FP32, BF16, BF16, FP32],
    )


def test_nothing_of_one_document_reaches_another(device, documents, normal, served):
    doc = documents(1, 33, 0.1).to(device)
    other = doc == doc[:, 20:21]
    tensors = [z.float().to(device) for z in inputs(normal, 1, 33, 2, 16, 1, 16)]
    results = []
    for scale in (1.0, 1e3):
        x, dt, A, B, C, D = tensors
        x, B, C = (torch.where(other[..., None, None], scale * z, z).requires_grad_() for z in (x, B, C))
        y, _ = ssd(x, dt, A, B, C, D, doc_BT=doc)
        results.append((y[~other], *(z[~other] for z in torch.autograd.grad(y[~other].sum(), (x, B, C)))))
    for one, same in zip(*results, strict=True):
        assert torch.equal(one, same)


def test_the_compiler_sees_through(device, documents, normal, served):
    from longspan.ops.triton.ssd import ssd as kernel

    doc = documents(1, 17, 0.1).to(device)
    tensors = [z.float().to(device).requires_grad_() for z in inputs(normal, 1, 17, 1, 16, 1, 16)]
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(kernel, (*tensors, doc, None, None), test_utils=tests)
