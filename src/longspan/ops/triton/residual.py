"""The residual stream between compiled layers, in one pass over memory with the norm that reads it.

Beside fp32 products it is fp32. Beside bf16 ones it is two bf16 numbers a value, the nearest one and the rest of it:
together they hold 16 bits; what a layer adds has 8. Gradients come and go in two as well: the nearest one is also the
gradient of the branch, which the products before it take as it is, and of the sum the backward reads the nearest number
alone. A layer moves 24 bytes a value that way, with an fp32 stream 28, and keeps 2 for its backward instead of 4.

Only the ops here may read such a stream: for any other the gradients of both numbers would be that of their sum.

Shapes: M rows, D width, J programs.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from longspan.ops.triton.device import on_its_device
from longspan.ops.triton.rms_norm import in_flight, programs_of, row_block, rows_of, warps_of
from longspan.ops.triton.sums import add_up


@triton.jit
def _keep(near_ptr, rest_ptr, values, mask, IN_TWO: tl.constexpr):
    """Stores values as one or two numbers and gives back what these come to."""
    near = values.to(near_ptr.dtype.element_ty)
    tl.store(near_ptr, near, mask=mask)
    kept = near.to(tl.float32)
    if IN_TWO:
        rest = (values - kept).to(rest_ptr.dtype.element_ty)
        tl.store(rest_ptr, rest, mask=mask)
        kept += rest.to(tl.float32)
    return kept


@triton.jit
def stream_forward(
    x_ptr, rest_ptr, branch_ptr, weight_ptr, near_out_ptr, rest_out_ptr, y_ptr, eps,
    x_row: tl.constexpr, branch_row: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, BEGINS: tl.constexpr,
    IN_TWO: tl.constexpr,
):  # fmt: skip
    """One row; BEGINS: x is all there is."""
    row, d = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    x = tl.load(x_ptr + row * x_row + d, mask=d < D, other=0.0).to(tl.float32)
    if not BEGINS:
        if IN_TWO:
            x += tl.load(rest_ptr + row * D + d, mask=d < D, other=0.0).to(tl.float32)
        x += tl.load(branch_ptr + row * branch_row + d, mask=d < D, other=0.0).to(tl.float32)
    x = _keep(near_out_ptr + row * D + d, rest_out_ptr + row * D + d, x, d < D, IN_TWO)
    inverse = tl.rsqrt(tl.sum(x * x, 0) / D + eps)
    weight = tl.load(weight_ptr + d, mask=d < D, other=0.0).to(tl.float32)
    tl.store(y_ptr + row * D + d, (x * inverse * weight).to(y_ptr.dtype.element_ty), mask=d < D)


@triton.jit
def stream_backward(
    near_ptr, weight_ptr, dy_ptr, dnear_ptr, drest_ptr, dx_ptr, drest_out_ptr, sums_ptr, rows, eps,
    dy_row: tl.constexpr, dnear_row: tl.constexpr, drest_row: tl.constexpr,
    D: tl.constexpr, BLOCK: tl.constexpr, BEGINS: tl.constexpr, IN_TWO: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """Every so many rows, and what they add to the gradient of the weight."""
    d = tl.arange(0, BLOCK)
    weight = tl.load(weight_ptr + d, mask=d < D, other=0.0).to(tl.float32)
    dweight = tl.zeros((BLOCK,), tl.float32)
    for step in tl.range(tl.cdiv(rows, tl.num_programs(0)), num_stages=AHEAD):
        row = (step * tl.num_programs(0) + tl.program_id(0)).to(tl.int64)
        there = (d < D) & (row < rows)
        x = tl.load(near_ptr + row * D + d, mask=there, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + row * dy_row + d, mask=there, other=0.0).to(tl.float32)
        dx = tl.load(dnear_ptr + row * dnear_row + d, mask=there, other=0.0).to(tl.float32)
        if IN_TWO:
            dx += tl.load(drest_ptr + row * drest_row + d, mask=there, other=0.0).to(tl.float32)
        inverse = tl.rsqrt(tl.sum(x * x, 0) / D + eps)
        normed = x * inverse
        dweight += dy * normed
        dnormed = dy * weight
        dx += (dnormed - normed * (tl.sum(dnormed * normed, 0) / D)) * inverse
        if BEGINS:
            tl.store(dx_ptr + row * D + d, dx.to(dx_ptr.dtype.element_ty), mask=there)
        else:
            _keep(dx_ptr + row * D + d, drest_out_ptr + row * D + d, dx, there, IN_TWO)
    tl.store(sums_ptr + tl.program_id(0).to(tl.int64) * D + d, dweight, mask=d < D)


def _like(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Uninitialized numbers of a stream beside products of that dtype; the second ones are none where it has one."""
    near = torch.empty(x.shape, dtype=dtype, device=x.device)
    return near, torch.empty_like(near) if dtype == torch.bfloat16 else near.new_empty(0)


@on_its_device
def run_forward(
    x: Tensor, rest: Tensor | None, branch: Tensor | None, weight_D: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """The stream after `x`, and after a branch where there is one; its norm."""
    rows_MD, width = rows_of(x), x.shape[-1]
    branch_MD = rows_MD if branch is None else rows_of(branch)
    near_out, rest_out = _like(x, dtype)
    y, block = torch.empty_like(near_out), row_block(width)
    stream_forward[(rows_MD.shape[0],)](
        rows_MD, rows_MD if rest is None else rest, branch_MD, weight_D, near_out, rest_out, y, eps,
        rows_MD.stride(0), branch_MD.stride(0),
        D=width, BLOCK=block, BEGINS=branch is None, IN_TWO=rest_out.numel() > 0, num_warps=warps_of(block),
    )  # fmt: skip
    return near_out, rest_out, y


@on_its_device
def run_backward(
    near: Tensor, dnear: Tensor, drest: Tensor, dy: Tensor, weight_D: Tensor, eps: float, out: tuple[Tensor, Tensor]
) -> Tensor:
    """Fills `out`, the second only where a stream in two was before; returns the gradient of the weight."""
    in_two = near.dtype == torch.bfloat16
    dy_MD, dnear_MD = rows_of(dy), rows_of(dnear)
    drest_MD = rows_of(drest) if in_two else dnear_MD
    rows, width = dy_MD.shape
    block = row_block(width)
    programs = programs_of(rows, block)
    sums_1JD = near.new_empty(1, programs, width, dtype=torch.float32)
    stream_backward[(programs,)](
        near, weight_D, dy_MD, dnear_MD, drest_MD, *out, sums_1JD, rows, eps,
        dy_MD.stride(0), dnear_MD.stride(0), drest_MD.stride(0),
        D=width, BLOCK=block, BEGINS=out[0] is out[1], IN_TWO=in_two, AHEAD=in_flight(block), num_warps=warps_of(block),
    )  # fmt: skip
    return add_up(sums_1JD)[0].to(weight_D.dtype)


@torch.library.custom_op("longspan::begin_stream", mutates_args=())
def begin_stream(x: Tensor, weight_D: Tensor, eps: float, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """The stream that begins with `x` beside products of `dtype`, fp32 or bf16, and its norm in that dtype."""
    return run_forward(x, None, None, weight_D, eps, dtype)


@begin_stream.register_fake
def _(x: Tensor, weight_D: Tensor, eps: float, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    near, rest = _like(x, dtype)
    return near, rest, torch.empty_like(near)


@torch.library.custom_op("longspan::begin_stream_backward", mutates_args=())
def begin_stream_backward(
    dnear: Tensor, drest: Tensor, dy: Tensor, near: Tensor, weight_D: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """The gradients of x, in its dtype, and of the weight."""
    dx = torch.empty(near.shape, dtype=dtype, device=near.device)
    return dx, run_backward(near, dnear, drest, dy, weight_D, eps, (dx, dx))


@begin_stream_backward.register_fake
def _(
    dnear: Tensor, drest: Tensor, dy: Tensor, near: Tensor, weight_D: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    return torch.empty(near.shape, dtype=dtype, device=near.device), torch.empty_like(weight_D)


@torch.library.custom_op("longspan::add_to_stream", mutates_args=())
def add_to_stream(
    near: Tensor, rest: Tensor, branch: Tensor, weight_D: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The stream and a branch, in its dtype, added up, and the norm of that."""
    return run_forward(near, rest, branch, weight_D, eps, near.dtype)


@add_to_stream.register_fake
def _(near: Tensor, rest: Tensor, branch: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    one, other = _like(near, near.dtype)
    return one, other, torch.empty_like(one)


@torch.library.custom_op("longspan::add_to_stream_backward", mutates_args=())
def add_to_stream_backward(
    dnear: Tensor, drest: Tensor, dy: Tensor, near: Tensor, weight_D: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of the stream before, the first of which is that of the branch too, and of the weight."""
    out = _like(near, near.dtype)
    return *out, run_backward(near, dnear, drest, dy, weight_D, eps, out)


@add_to_stream_backward.register_fake
def _(
    dnear: Tensor, drest: Tensor, dy: Tensor, near: Tensor, weight_D: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    return *_like(near, near.dtype), torch.empty_like(weight_D)


def _save_begin(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, weight_D, ctx.eps, _ = inputs
    ctx.dtype = x.dtype
    ctx.save_for_backward(output[0], weight_D)


def _save_add(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    *_, weight_D, ctx.eps = inputs
    ctx.save_for_backward(output[0], weight_D)


def _differentiate_begin(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
    return *begin_stream_backward(*gradients, *ctx.saved_tensors, ctx.eps, ctx.dtype), None, None


def _differentiate_add(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
    dnear, drest, dweight_D = add_to_stream_backward(*gradients, *ctx.saved_tensors, ctx.eps)
    return dnear, drest, dnear, dweight_D, None


begin_stream.register_autograd(_differentiate_begin, setup_context=_save_begin)
add_to_stream.register_autograd(_differentiate_add, setup_context=_save_add)
