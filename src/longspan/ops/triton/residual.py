"""The residual stream of layers that compute in bf16, two such numbers a value: the nearest one, and the rest of it.

Together they hold 16 bits; what a layer adds has 8. A sum and the norm that reads it are one pass over memory, and so
are their gradients. These come and go in two as well: the nearest one of a value is also the gradient of the branch,
which the products before it take as it is, and of the sum the backward reads the nearest number alone. A layer moves 24
bytes a value that way, with an fp32 stream 28, and keeps 2 for its backward instead of 4.

Only the ops here may read a stream: for any other the gradients of both numbers would be that of their sum.

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

BF16 = torch.bfloat16


@triton.jit
def _keep(near_ptr, rest_ptr, values, mask):
    """Stores values as two numbers and gives back what these come to."""
    near = values.to(near_ptr.dtype.element_ty)
    rest = (values - near.to(tl.float32)).to(rest_ptr.dtype.element_ty)
    tl.store(near_ptr, near, mask=mask)
    tl.store(rest_ptr, rest, mask=mask)
    return near.to(tl.float32) + rest.to(tl.float32)


@triton.jit
def stream_forward(
    x_ptr, rest_ptr, branch_ptr, weight_ptr, near_out_ptr, rest_out_ptr, y_ptr, eps,
    x_row: tl.constexpr, branch_row: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, BEGINS: tl.constexpr,
):  # fmt: skip
    """One row; BEGINS: x is all there is."""
    row, d = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    x = tl.load(x_ptr + row * x_row + d, mask=d < D, other=0.0).to(tl.float32)
    if not BEGINS:
        x += tl.load(rest_ptr + row * D + d, mask=d < D, other=0.0).to(tl.float32)
        x += tl.load(branch_ptr + row * branch_row + d, mask=d < D, other=0.0).to(tl.float32)
    x = _keep(near_out_ptr + row * D + d, rest_out_ptr + row * D + d, x, d < D)
    inverse = tl.rsqrt(tl.sum(x * x, 0) / D + eps)
    weight = tl.load(weight_ptr + d, mask=d < D, other=0.0).to(tl.float32)
    tl.store(y_ptr + row * D + d, (x * inverse * weight).to(y_ptr.dtype.element_ty), mask=d < D)


@triton.jit
def stream_backward(
    near_ptr, weight_ptr, dy_ptr, dnear_ptr, drest_ptr, dx_ptr, drest_out_ptr, sums_ptr, rows, eps,
    dy_row: tl.constexpr, dnear_row: tl.constexpr, drest_row: tl.constexpr,
    D: tl.constexpr, BLOCK: tl.constexpr, BEGINS: tl.constexpr, AHEAD: tl.constexpr,
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
        dx += tl.load(drest_ptr + row * drest_row + d, mask=there, other=0.0).to(tl.float32)
        inverse = tl.rsqrt(tl.sum(x * x, 0) / D + eps)
        normed = x * inverse
        dweight += dy * normed
        dnormed = dy * weight
        dx += (dnormed - normed * (tl.sum(dnormed * normed, 0) / D)) * inverse
        if BEGINS:
            tl.store(dx_ptr + row * D + d, dx.to(dx_ptr.dtype.element_ty), mask=there)
        else:
            _keep(dx_ptr + row * D + d, drest_out_ptr + row * D + d, dx, there)
    tl.store(sums_ptr + tl.program_id(0).to(tl.int64) * D + d, dweight, mask=d < D)


@on_its_device
def _forward(
    x: Tensor, rest: Tensor | None, branch: Tensor | None, weight_D: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    rows_MD, width = rows_of(x), x.shape[-1]
    rest_MD, branch_MD = (rows_MD if z is None else rows_of(z) for z in (rest, branch))
    near_out, rest_out, y = (torch.empty(x.shape, dtype=BF16, device=x.device) for _ in range(3))
    block = row_block(width)
    stream_forward[(rows_MD.shape[0],)](
        rows_MD, rest_MD, branch_MD, weight_D, near_out, rest_out, y, eps, rows_MD.stride(0), branch_MD.stride(0),
        D=width, BLOCK=block, BEGINS=rest is None, num_warps=warps_of(block),
    )  # fmt: skip
    return near_out, rest_out, y


@on_its_device
def _backward(
    near: Tensor, dnear: Tensor, drest: Tensor, dy: Tensor, weight_D: Tensor, eps: float, dtypes: list[torch.dtype]
) -> tuple[list[Tensor], Tensor]:
    """The gradient in as many numbers as there are dtypes, and that of the weight."""
    inputs = [rows_of(z) for z in (dy, dnear, drest)]
    rows, width = inputs[0].shape
    out = [torch.empty(near.shape, dtype=dtype, device=near.device) for dtype in dtypes]
    block = row_block(width)
    programs = programs_of(rows, block)
    sums_1JD = near.new_empty(1, programs, width, dtype=torch.float32)
    stream_backward[(programs,)](
        near, weight_D, *inputs, out[0], out[-1], sums_1JD, rows, eps, *(z.stride(0) for z in inputs),
        D=width, BLOCK=block, BEGINS=len(out) == 1, AHEAD=in_flight(block), num_warps=warps_of(block),
    )  # fmt: skip
    return out, add_up(sums_1JD)[0].to(weight_D.dtype)


@torch.library.custom_op("longspan::begin_stream", mutates_args=())
def begin_stream(x: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """The stream that begins with `x`, in two, and its norm in bf16."""
    return _forward(x, None, None, weight_D, eps)


@torch.library.custom_op("longspan::begin_stream_backward", mutates_args=())
def begin_stream_backward(
    dnear: Tensor, drest: Tensor, dy: Tensor, near: Tensor, weight_D: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """The gradients of x, in its dtype, and of the weight."""
    (dx,), dweight_D = _backward(near, dnear, drest, dy, weight_D, eps, [dtype])
    return dx, dweight_D


@torch.library.custom_op("longspan::add_to_stream", mutates_args=())
def add_to_stream(
    near: Tensor, rest: Tensor, branch: Tensor, weight_D: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The stream and a branch added up, in two, and the norm of that in bf16."""
    return _forward(near, rest, branch, weight_D, eps)


@torch.library.custom_op("longspan::add_to_stream_backward", mutates_args=())
def add_to_stream_backward(
    dnear: Tensor, drest: Tensor, dy: Tensor, near: Tensor, weight_D: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of the stream before, in two, the first of which is that of the branch too, and of the weight."""
    (dnear, drest), dweight_D = _backward(near, dnear, drest, dy, weight_D, eps, [BF16, BF16])
    return dnear, drest, dweight_D


def _three_like(x: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    near, rest, y = (torch.empty(x.shape, dtype=BF16, device=x.device) for _ in range(3))
    return near, rest, y


begin_stream.register_fake(_three_like)
add_to_stream.register_fake(_three_like)


@begin_stream_backward.register_fake
def _(
    dnear: Tensor, drest: Tensor, dy: Tensor, near: Tensor, weight_D: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    return torch.empty(near.shape, dtype=dtype, device=near.device), torch.empty_like(weight_D)


@add_to_stream_backward.register_fake
def _(
    dnear: Tensor, drest: Tensor, dy: Tensor, near: Tensor, weight_D: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    one, other = (torch.empty(near.shape, dtype=BF16, device=near.device) for _ in range(2))
    return one, other, torch.empty_like(weight_D)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    *tensors, weight_D, ctx.eps = inputs
    ctx.dtype = tensors[0].dtype
    ctx.save_for_backward(output[0], weight_D)


def _differentiate_begin(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
    return *begin_stream_backward(*gradients, *ctx.saved_tensors, ctx.eps, ctx.dtype), None


def _differentiate_add(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
    dnear, drest, dweight_D = add_to_stream_backward(*gradients, *ctx.saved_tensors, ctx.eps)
    return dnear, drest, dnear, dweight_D, None


begin_stream.register_autograd(_differentiate_begin, setup_context=_save)
add_to_stream.register_autograd(_differentiate_add, setup_context=_save)
