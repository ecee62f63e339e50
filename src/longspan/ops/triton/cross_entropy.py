"""Logits to negative log-likelihoods and, in their place, gradients: memory is read once and written once.

A program takes a token: it finds maximum and sum of its row while they come in, and reads the row again, by then in the
cache, to write softmax minus one-hot over it. The next parts of a row are on their way while one is worked on.

Shapes: c tokens, V vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from longspan.ops.triton.device import on_its_device
from longspan.ops.triton.tiles import LOG2_E, exp2, has_fast_exp2


class Cut(NamedTuple):
    """How a row is read: words at a time, warps of the program, and parts of the row in flight."""

    block: int
    warps: int
    stages: int


# Few tokens at a time on a multiprocessor: what all of them hold has to fit the cache until it is read again.
WIDE = 40_000
CUTS = {False: Cut(4096, 8, 4), True: Cut(8192, 8, 3)}
"""Of vocabularies up to `WIDE`, and beyond."""


@triton.jit
def _errors(
    logits_ptr, chosen_ptr, counted_ptr, scale_ptr, nll_ptr, V, row_stride,
    BLOCK: tl.constexpr, STAGES: tl.constexpr, SCALED: tl.constexpr, WHOLE: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """Exponents are to the base of 2."""
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + row * row_stride
    counted = tl.load(counted_ptr + row).to(tl.int1)
    chosen = tl.load(chosen_ptr + row).to(tl.int32)
    picked = tl.load(row_ptr + chosen).to(tl.float32) * LOG2_E
    v = tl.arange(0, BLOCK)
    largest = float("-inf")
    sums = tl.zeros((BLOCK,), tl.float32)
    for start in tl.range(0, V, BLOCK, num_stages=STAGES):
        if WHOLE:
            x = tl.load(row_ptr + start + v).to(tl.float32) * LOG2_E
        else:
            x = tl.load(row_ptr + start + v, mask=start + v < V, other=float("-inf")).to(tl.float32) * LOG2_E
        new = tl.maximum(largest, tl.max(x, 0))
        sums = sums * tl.exp2(largest - new) + exp2(x - new, FAST)
        largest = new
    log_sum = largest + tl.log2(tl.sum(sums, 0))
    tl.store(nll_ptr + row, tl.where(counted, (log_sum - picked) / LOG2_E, 0.0))
    scale = 1.0
    if SCALED:
        scale = tl.load(scale_ptr + row).to(tl.float32)
    scale = tl.where(counted, scale, 0.0)
    # Backwards: what was read last is the surest to be in the cache. What is done with leaves it first.
    for back in tl.range(0, V, BLOCK, num_stages=STAGES):
        start = (V - 1) // BLOCK * BLOCK - back
        there = start + v < V
        if WHOLE:
            x = tl.load(row_ptr + start + v, eviction_policy="evict_first").to(tl.float32)
        else:
            x = tl.load(row_ptr + start + v, mask=there, other=float("-inf"), eviction_policy="evict_first")
            x = x.to(tl.float32)
        error = exp2(x * LOG2_E - log_sum, FAST) - tl.where(start + v == chosen, 1.0, 0.0)
        error = tl.where(counted, error * scale, 0.0).to(logits_ptr.dtype.element_ty)
        if WHOLE:
            tl.store(row_ptr + start + v, error, eviction_policy="evict_first")
        else:
            tl.store(row_ptr + start + v, error, mask=there, eviction_policy="evict_first")


@on_its_device
def softmax_errors(logits_cV: Tensor, chosen_c: Tensor, counted_c: Tensor, scale_c: Tensor | None) -> Tensor:
    """Turns logits into `(softmax - onehot(chosen)) * scale` in place, 0 where not counted.

    Args:
        logits_cV: rows of values side by side, written over.
        chosen_c: int64, the target of every token, inside the vocabulary also where it is not counted.
        counted_c: bool.
        scale_c: the gradient of each token's loss; None: 1.

    Returns:
        (c,) fp32 negative log-likelihoods, 0 where not counted.
    """
    tokens, vocab = logits_cV.shape
    nll_c = torch.empty(tokens, dtype=torch.float32, device=logits_cV.device)
    cut = CUTS[vocab > WIDE]
    block = min(cut.block, max(16, triton.next_power_of_2(vocab)))
    _errors[(tokens,)](
        logits_cV, chosen_c, counted_c, nll_c if scale_c is None else scale_c, nll_c, vocab, logits_cV.stride(0),
        BLOCK=block, STAGES=cut.stages, SCALED=scale_c is not None, WHOLE=vocab % block == 0,
        FAST=has_fast_exp2(logits_cV), num_warps=min(cut.warps, max(1, block // 256)),
    )  # fmt: skip
    return nll_c


@triton.jit
def _times(values_ptr, factor_ptr, out_ptr, count, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    product = tl.load(values_ptr + i, mask=i < count, other=0.0).to(tl.float32) * tl.load(factor_ptr).to(tl.float32)
    tl.store(out_ptr + i, product.to(out_ptr.dtype.element_ty), mask=i < count)


@on_its_device
def times(values: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """Contiguous `values` times a number on the device, rounded once, to `dtype`; torch's own is slow for two."""
    out = torch.empty_like(values, dtype=dtype)
    _times[(triton.cdiv(values.numel(), 2048),)](values, factor, out, values.numel(), BLOCK=2048, num_warps=8)
    return out
