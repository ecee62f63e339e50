"""On a GPU the ops say what the plain references say on the CPU in fp64, in fp32 and in bf16."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from longspan.ops.attention import attention
from longspan.ops.causal_conv import causal_conv
from longspan.ops.decay_mixture import decay_mixture
from longspan.ops.flex_attention import flex_block_mask
from longspan.ops.gated_delta import gated_delta
from longspan.ops.gru import gru
from longspan.ops.linear_cross_entropy import linear_cross_entropy
from longspan.ops.lstm import lstm
from longspan.ops.selective_scan import selective_scan
from longspan.ops.ssd import ssd

pytestmark = pytest.mark.gpu
BATCH, TIME = 3, 200
TOLERANCE = {torch.float32: 5e-3, torch.bfloat16: 5e-2}


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def documents() -> Tensor:
    return (torch.rand(BATCH, TIME, generator=torch.Generator().manual_seed(0)) < 0.02).cumsum(1).int()


def compare(run: Callable[..., Tensor], plain: Callable[..., Tensor], tensors: list[Tensor], dtypes: list[torch.dtype]):
    """Values and gradients on CUDA against fp64 on the CPU, over the same rounded inputs."""
    rounded = [z.to(dtype) for z, dtype in zip(tensors, dtypes, strict=True)]
    results = []
    for function, place in ((run, lambda z: z.cuda()), (plain, lambda z: z.double())):
        leaves = [place(z).detach().requires_grad_() for z in rounded]
        y = function(*leaves)
        slope = normal(*y.shape, seed=9).to(y.device, y.dtype)
        results.append([y, *torch.autograd.grad(y, leaves, slope)])
    tolerance = TOLERANCE[min(dtypes, key=lambda dtype: torch.finfo(dtype).bits)]
    for one, other in zip(*results, strict=True):
        error = (one.cpu().double() - other).norm() / other.norm()
        assert error < tolerance


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("isolated", [False, True])
def test_ssd(dtype, isolated):
    heads, head_dim, state = 4, 16, 8
    doc = documents() if isolated else None
    tensors = [
        normal(BATCH, TIME, heads, head_dim),
        F.softplus(normal(BATCH, TIME, heads) - 3.0),
        -normal(heads).abs() * 4.0,
        normal(BATCH, TIME, 1, state),
        normal(BATCH, TIME, 1, state, seed=1),
        normal(heads),
    ]
    dtypes = [dtype, torch.float32, torch.float32, dtype, dtype, torch.float32]
    cuda_doc = None if doc is None else doc.cuda()
    compare(
        lambda *z: ssd(*z, doc_BT=cuda_doc)[0], lambda *z: ssd(*z, doc_BT=doc, backend="reference")[0], tensors, dtypes
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("isolated", [False, True])
def test_selective_scan(dtype, isolated):
    channels, state = 24, 8
    doc = documents() if isolated else None
    tensors = [
        normal(BATCH, TIME, channels),
        F.softplus(normal(BATCH, TIME, channels) - 3.0),
        -normal(channels, state).abs() * 4.0,
        normal(BATCH, TIME, state),
        normal(BATCH, TIME, state, seed=1),
        normal(channels),
    ]
    dtypes = [dtype, torch.float32, torch.float32, dtype, dtype, torch.float32]
    cuda_doc = None if doc is None else doc.cuda()
    compare(
        lambda *z: selective_scan(*z, doc_BT=cuda_doc)[0],
        lambda *z: selective_scan(*z, doc_BT=doc, backend="reference")[0],
        tensors,
        dtypes,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("isolated", [False, True])
def test_gated_delta(dtype, isolated):
    heads, key_dim, value_dim = 4, 16, 32
    doc = documents() if isolated else None
    tensors = [
        normal(BATCH, TIME, heads, key_dim),
        normal(BATCH, TIME, heads, key_dim, seed=1),
        normal(BATCH, TIME, heads, value_dim, seed=2),
        -F.softplus(normal(BATCH, TIME, heads) - 3.0),
        normal(BATCH, TIME, heads, seed=3).sigmoid(),
    ]
    cuda_doc = None if doc is None else doc.cuda()
    compare(
        lambda *z: gated_delta(*z, doc_BT=cuda_doc)[0],
        lambda *z: gated_delta(*z, doc_BT=doc, backend="reference")[0],
        tensors,
        [dtype, dtype, dtype, torch.float32, torch.float32],
    )


def test_decay_mixture():
    tensors = [normal(BATCH, TIME, 8), normal(BATCH, TIME).abs() * 5, -normal(24, 8).abs() * 5]
    compare(decay_mixture, decay_mixture, tensors, [torch.float32] * 3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_causal_conv(dtype):
    doc = documents()
    tensors = [normal(BATCH, TIME, 24), normal(24, 4), normal(24)]
    compare(
        lambda *z: causal_conv(*z, doc_BT=doc.cuda())[0],
        lambda *z: causal_conv(*z, doc_BT=doc)[0],
        tensors,
        [dtype, torch.float32, torch.float32],
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_linear_cross_entropy(dtype, reduction):
    targets = torch.randint(0, 512, (300,), generator=torch.Generator().manual_seed(0))
    targets[::7] = -100
    tensors = [normal(300, 64), normal(512, 64, seed=1)]
    compare(
        lambda *z: linear_cross_entropy(*z, targets.cuda(), chunk=128, reduction=reduction),
        lambda *z: F.cross_entropy(z[0] @ z[1].T, targets, reduction=reduction),
        tensors,
        [dtype, dtype],
    )


@pytest.mark.parametrize("backend", ["sdpa", "flex"])
@pytest.mark.parametrize("alibi", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention(dtype, alibi, backend):
    doc = documents()
    slopes = torch.tensor([0.5, 0.25, 0.125, 0.0625]) if alibi else None
    mask = flex_block_mask(doc.cuda(), window=50) if backend == "flex" else None
    tensors = [normal(BATCH, TIME, 4, 32), normal(BATCH, TIME, 2, 32, seed=1), normal(BATCH, TIME, 2, 32, seed=2)]

    def on_cuda(*z: Tensor) -> Tensor:
        bias = None if slopes is None else slopes.cuda()
        rules = {"alibi_slopes_H": bias, "window": 50, "backend": backend, "block_mask": mask}
        return attention(*z, q_doc_BT=doc.cuda(), **rules)

    def plain(*z: Tensor) -> Tensor:
        return attention(*z, q_doc_BT=doc, alibi_slopes_H=slopes, window=50, backend="reference")

    compare(on_cuda, plain, tensors, [dtype] * 3)


def test_gru():
    doc = documents()
    tensors = [normal(BATCH, TIME, 8), normal(48, 8, seed=1), normal(48, 16, seed=2) * 0.3, normal(48), normal(48)]
    compare(
        lambda *z: gru(*z, doc_BT=doc.cuda())[0],
        lambda *z: gru(*z, doc_BT=doc, backend="reference")[0],
        tensors,
        [torch.float32] * 5,
    )


def test_lstm():
    doc = documents()
    tensors = [normal(BATCH, TIME, 8), normal(64, 8, seed=1), normal(64, 16, seed=2) * 0.3, normal(64), normal(64)]
    compare(
        lambda *z: lstm(*z, doc_BT=doc.cuda())[0],
        lambda *z: lstm(*z, doc_BT=doc, backend="reference")[0],
        tensors,
        [torch.float32] * 5,
    )
