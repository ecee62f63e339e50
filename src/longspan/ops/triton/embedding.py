"""The gradient of an embedding: what came to the places of a token, added up in one order, the same bits in every run.

Places are sorted by token first. A program walks through some of them in that order: a token that begins and ends there
goes to its row at once, of one that also lies in another program's places a part is kept, and a second kernel adds up
the parts of such tokens. However often a token comes, no program has more than its share of places.

Shapes: N places, V vocabulary, D width, J programs along the places.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from longspan.ops.triton.device import on_its_device

# Places and columns of a program.
PLACES, COLUMNS, WARPS = 32, 256, 2


@triton.jit
def _token(tokens_ptr, place, places):
    """Of a place in order, -1 where there is none."""
    return tl.load(tokens_ptr + place, mask=(place >= 0) & (place < places), other=-1)


@triton.jit
def add_places(
    rows_ptr, tokens_ptr, order_ptr, sums_ptr, parts_ptr, places, rows_stride,
    D: tl.constexpr, PLACES: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Tokens that lie in this program's places alone, and parts of the first and the last where they do not."""
    program, d = tl.program_id(0), tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    first = program * PLACES
    last = min(first + PLACES, places)
    parts = parts_ptr + program.to(tl.int64) * 2 * D + d
    token = _token(tokens_ptr, first, places)
    begun = token != _token(tokens_ptr, first - 1, places)
    total = tl.zeros((COLUMNS,), tl.float32)
    coming = tl.load(rows_ptr + tl.load(order_ptr + first) * rows_stride + d, mask=d < D, other=0.0)
    for place in range(first, last):
        total += coming.to(tl.float32)
        after = min(place + 1, last - 1)
        coming = tl.load(rows_ptr + tl.load(order_ptr + after) * rows_stride + d, mask=d < D, other=0.0)
        following = _token(tokens_ptr, place + 1, places)
        ended = following != token
        if ended | (place + 1 == last):
            whole = begun & ended
            sums = sums_ptr + token.to(tl.int64) * D + d
            tl.store(sums, total.to(sums_ptr.dtype.element_ty), mask=(d < D) & whole)
            tl.store(parts + begun.to(tl.int32) * D, total, mask=(d < D) & (whole == 0))
            total = tl.zeros((COLUMNS,), tl.float32)
            begun = begun | ended
        token = following


@triton.jit
def add_parts(
    tokens_ptr, sums_ptr, parts_ptr, places, D: tl.constexpr, PLACES: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    """The token that begins in the places of one program and goes on in those of the next, where there is one."""
    program, d = tl.program_id(0), tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    first, end = program * PLACES, (program + 1) * PLACES
    token = _token(tokens_ptr, end - 1, places)
    begun = token != _token(tokens_ptr, first - 1, places)
    more = 0
    # Triton 3.6 cannot compile a loop of this kind that hands on more than numbers.
    while begun & (token >= 0) & (token == _token(tokens_ptr, end + more * PLACES, places)):
        more += 1
    if more > 0:
        parts = parts_ptr + program.to(tl.int64) * 2 * D + d
        total = tl.load(parts + D, mask=d < D, other=0.0)
        for after in range(1, more + 1):
            total += tl.load(parts + after * 2 * D, mask=d < D, other=0.0)
        tl.store(sums_ptr + token.to(tl.int64) * D + d, total.to(sums_ptr.dtype.element_ty), mask=d < D)


@on_its_device
def _sums(dy: Tensor, tokens: Tensor, vocab_size: int) -> Tensor:
    """(V, D) in the dtype of `dy`, summed in fp32."""
    width = dy.shape[-1]
    rows_ND = dy.reshape(-1, width)
    rows_ND = rows_ND if rows_ND.stride(1) == 1 else rows_ND.contiguous()
    places = rows_ND.shape[0]
    sorted_N, order_N = torch.sort(tokens.flatten().to(torch.int32), stable=True)
    sums_VD = dy.new_zeros(vocab_size, width)
    programs = triton.cdiv(places, PLACES)
    parts = dy.new_empty(programs, 2, width, dtype=torch.float32)
    grid, sizes = (programs, triton.cdiv(width, COLUMNS)), {"D": width, "PLACES": PLACES, "COLUMNS": COLUMNS}
    add_places[grid](rows_ND, sorted_N, order_N, sums_VD, parts, places, rows_ND.stride(0), **sizes, num_warps=WARPS)
    add_parts[grid](sorted_N, sums_VD, parts, places, **sizes, num_warps=WARPS)
    return sums_VD


@torch.library.custom_op("longspan::embedding", mutates_args=())
def embedding(tokens: Tensor, weight_VD: Tensor) -> Tensor:
    """`weight[tokens]`."""
    return torch.nn.functional.embedding(tokens, weight_VD)


@embedding.register_fake
def _(tokens: Tensor, weight_VD: Tensor) -> Tensor:
    return weight_VD.new_empty(*tokens.shape, weight_VD.shape[1])


@torch.library.custom_op("longspan::embedding_backward", mutates_args=())
def embedding_backward(dy: Tensor, tokens: Tensor, vocab_size: int) -> Tensor:
    """The gradient of the weight."""
    return _sums(dy, tokens, vocab_size)


@embedding_backward.register_fake
def _(dy: Tensor, tokens: Tensor, vocab_size: int) -> Tensor:
    return dy.new_empty(vocab_size, dy.shape[-1])


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    tokens, weight_VD = inputs
    ctx.vocab_size = weight_VD.shape[0]
    ctx.save_for_backward(tokens)


def _differentiate(ctx: Any, dy: Tensor) -> tuple[None, Tensor]:
    (tokens,) = ctx.saved_tensors
    return None, embedding_backward(dy, tokens, ctx.vocab_size)


embedding.register_autograd(_differentiate, setup_context=_save)
