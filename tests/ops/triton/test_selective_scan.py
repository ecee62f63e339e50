"""The kernel of Mamba-1's scan says what the plain loop says in fp64, at any length, with any documents."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from longspan.ops.selective_scan import selective_scan

FP32, BF16 = torch.float32, torch.bfloat16


@pytest.fixture(autouse=True)
def small_blocks(device, monkeypatch):
    """Several chunks and blocks of channels even at small shapes; on a GPU the sizes that are used."""
    from longspan.ops.triton import selective_scan as kernels

    if device.type == "cpu":
        monkeypatch.setattr(kernels, "CHUNK", 4)
        monkeypatch.setattr(kernels, "SEGMENT", 1)
        monkeypatch.setattr(kernels, "CHANNELS", 8)


def inputs(normal, rows: int, time: int, channels: int, state: int) -> list[Tensor]:
    return [
        normal(rows, time, channels),
        F.softplus(normal(rows, time, channels) - 1.0),
        -normal(channels, state).abs() * 4.0,
        normal(rows, time, state, seed=1),
        normal(rows, time, state, seed=2),
        normal(channels),
    ]


@pytest.mark.parametrize(("dtype", "chance"), [(FP32, 0.2), (BF16, 1.0)])
def test_matches_fp64(chance, dtype, assert_same, device, documents, normal, served):
    doc = documents(2, 10, chance)
    assert_same(
        lambda *z: selective_scan(*z, doc_BT=doc.to(device)),
        lambda *z: selective_scan(*z, doc_BT=doc, backend="reference"),
        inputs(normal, 2, 10, 12, 6),
        [dtype, FP32, FP32, dtype, dtype, FP32],
        # Where every token is a document nothing decays on the way to another.
        zeros=[4] if chance == 1.0 else [],
    )


def test_goes_on_from_a_state_whose_document_may_be_over(assert_same, device, documents, normal, served):
    doc = documents(2, 6, 0.1)
    before = torch.stack((doc[0, 0], doc[1, 0] + 9))
    assert_same(
        lambda *z: selective_scan(
            *z[:6], doc_BT=doc.to(device), initial_state_BNE=z[6], initial_doc_B=before.to(device)
        ),
        lambda *z: selective_scan(
            *z[:6], doc_BT=doc, initial_state_BNE=z[6], initial_doc_B=before, backend="reference"
        ),
        [*inputs(normal, 2, 6, 8, 16), normal(2, 16, 8)],
        [FP32] * 7,
    )


def test_the_compiler_sees_through(device, documents, normal, served):
    from longspan.ops.triton.selective_scan import selective_scan as kernel

    tensors = [z.float().to(device).requires_grad_() for z in inputs(normal, 1, 5, 8, 4)]
    starts = torch.tensor([[False, False, True, False, False]], device=device)
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(kernel, (*tensors, starts, None), test_utils=tests)
