"""RMSNorm, plain or gated: one pass over memory forward and one backward.

A program keeps a whole row in registers; the backward makes the statistics again instead of keeping them. The gradient
of the weight is summed per program and then in one order: the same bits in every run.

Shapes: M rows, D width, J programs.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from longspan.ops.triton.device import on_its_device
from longspan.ops.triton.sums import add_up
from longspan.ops.triton.tiles import has_fast_exp2, sigmoid

# Programs of the backward: as many as the registers of a large chip hold side by side, for rows of over 1,024 numbers.
PROGRAMS = 528
# Rows of the backward in flight, the one that is worked on included: with 3 it runs as fast as memory does. They wait
# in shared memory, where two of the widest fit.
AHEAD, WIDEST_AHEAD = 3, 4096


@triton.jit
def norm_forward(
    x_ptr, gate_ptr, weight_ptr, y_ptr, eps, x_row: tl.constexpr, gate_row: tl.constexpr,
    D: tl.constexpr, BLOCK: tl.constexpr, GATED: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """One row."""
    row, d = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    x = tl.load(x_ptr + row * x_row + d, mask=d < D, other=0.0).to(tl.float32)
    if GATED:
        z = tl.load(gate_ptr + row * gate_row + d, mask=d < D, other=0.0).to(tl.float32)
        x *= z * sigmoid(z, FAST)
    inverse = tl.rsqrt(tl.sum(x * x, 0) / D + eps)
    weight = tl.load(weight_ptr + d, mask=d < D, other=0.0).to(tl.float32)
    tl.store(y_ptr + row * D + d, (x * inverse * weight).to(y_ptr.dtype.element_ty), mask=d < D)


@triton.jit
def norm_backward(
    x_ptr, gate_ptr, weight_ptr, dy_ptr, dx_ptr, dgate_ptr, sums_ptr, rows, eps,
    x_row: tl.constexpr, gate_row: tl.constexpr, dy_row: tl.constexpr, dx_row: tl.constexpr, dgate_row: tl.constexpr,
    D: tl.constexpr, BLOCK: tl.constexpr, GATED: tl.constexpr, FAST: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """Every so many rows, and what they add to the gradient of the weight."""
    d = tl.arange(0, BLOCK)
    weight = tl.load(weight_ptr + d, mask=d < D, other=0.0).to(tl.float32)
    dweight = tl.zeros((BLOCK,), tl.float32)
    for step in tl.range(tl.cdiv(rows, tl.num_programs(0)), num_stages=AHEAD):
        row = (step * tl.num_programs(0) + tl.program_id(0)).to(tl.int64)
        there = (d < D) & (row < rows)
        x = tl.load(x_ptr + row * x_row + d, mask=there, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + row * dy_row + d, mask=there, other=0.0).to(tl.float32)
        silu, gated = x, x
        if GATED:
            z = tl.load(gate_ptr + row * gate_row + d, mask=there, other=0.0).to(tl.float32)
            opening = sigmoid(z, FAST)
            silu = z * opening
            gated = x * silu
        inverse = tl.rsqrt(tl.sum(gated * gated, 0) / D + eps)
        normed = gated * inverse
        dweight += dy * normed
        dnormed = dy * weight
        dgated = (dnormed - normed * (tl.sum(dnormed * normed, 0) / D)) * inverse
        if GATED:
            dz = dgated * x * (opening + silu * (1.0 - opening))
            tl.store(dgate_ptr + row * dgate_row + d, dz.to(dgate_ptr.dtype.element_ty), mask=there)
            dgated = dgated * silu
        tl.store(dx_ptr + row * dx_row + d, dgated.to(dx_ptr.dtype.element_ty), mask=there)
    tl.store(sums_ptr + tl.program_id(0).to(tl.int64) * D + d, dweight, mask=d < D)


def rows_of(x: Tensor) -> Tensor:
    """(M, D) with the values of a row side by side."""
    if x.stride(-1) != 1:
        x = x.contiguous()
    return x.reshape(-1, x.shape[-1])


def row_block(width: int) -> int:
    """Values of a row as a program takes it."""
    return max(16, int(triton.next_power_of_2(width)))


def warps_of(block: int) -> int:
    """Of a program for rows of such a block."""
    return min(16, max(4, block // 512))


def programs_of(rows: int, block: int) -> int:
    """Of a backward."""
    return min(rows, PROGRAMS if block > 1024 else PROGRAMS * 3 // 2)


def in_flight(block: int) -> int:
    """Rows of a backward that are on their way or worked on."""
    return AHEAD if block <= WIDEST_AHEAD else min(AHEAD, 2)


@on_its_device
def run_forward(x: Tensor, gate: Tensor | None, weight_D: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """`x * silu(gate) / rms * weight` in `dtype`, contiguous."""
    rows_MD = rows_of(x)
    gates_MD = rows_MD if gate is None else rows_of(gate)
    width = x.shape[-1]
    y = torch.empty(x.shape, dtype=dtype, device=x.device)
    block = row_block(width)
    norm_forward[(rows_MD.shape[0],)](
        rows_MD, gates_MD, weight_D, y, eps, rows_MD.stride(0), gates_MD.stride(0),
        D=width, BLOCK=block, GATED=gate is not None, FAST=has_fast_exp2(x), num_warps=warps_of(block),
    )  # fmt: skip
    return y


@on_its_device
def run_backward(
    dy: Tensor, x: Tensor, gate: Tensor | None, weight_D: Tensor, eps: float, dx_MD: Tensor, dgate_MD: Tensor | None
) -> Tensor:
    """Fills the gradients of x and gate, rows of any stride; returns that of the weight."""
    rows_MD, dy_MD = rows_of(x), rows_of(dy)
    gates_MD = rows_MD if gate is None else rows_of(gate)
    dgates_MD = dx_MD if dgate_MD is None else dgate_MD
    rows, width = rows_MD.shape
    block = row_block(width)
    programs = programs_of(rows, block)
    sums_1JD = x.new_empty(1, programs, width, dtype=torch.float32)
    norm_backward[(programs,)](
        rows_MD, gates_MD, weight_D, dy_MD, dx_MD, dgates_MD, sums_1JD, rows, eps,
        *(z.stride(0) for z in (rows_MD, gates_MD, dy_MD, dx_MD, dgates_MD)),
        D=width, BLOCK=block, GATED=gate is not None, FAST=has_fast_exp2(x), AHEAD=in_flight(block),
        num_warps=warps_of(block),
    )  # fmt: skip
    return add_up(sums_1JD)[0].to(weight_D.dtype)


@torch.library.custom_op("longspan::rms_norm", mutates_args=())
def rms_norm(x: Tensor, gate: Tensor | None, weight_D: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """`x * silu(gate) / rms * weight` over the last dimension, statistics in fp32, rounded once, to `dtype`."""
    return run_forward(x, gate, weight_D, eps, dtype)


@rms_norm.register_fake
def _(x: Tensor, gate: Tensor | None, weight_D: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    return torch.empty(x.shape, dtype=dtype, device=x.device)


@torch.library.custom_op("longspan::rms_norm_backward", mutates_args=())
def rms_norm_backward(
    dy: Tensor, x: Tensor, gate: Tensor | None, weight_D: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of x, gate (empty where there is none) and weight."""
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    dgate = x.new_empty(0) if gate is None else torch.empty_like(gate, memory_format=torch.contiguous_format)
    flat = None if gate is None else dgate.view(-1, gate.shape[-1])
    return dx, dgate, run_backward(dy, x, gate, weight_D, eps, dx.view(-1, x.shape[-1]), flat)


@rms_norm_backward.register_fake
def _(dy: Tensor, x: Tensor, gate: Tensor | None, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    dgate = x.new_empty(0) if gate is None else torch.empty_like(gate, memory_format=torch.contiguous_format)
    return dx, dgate, torch.empty_like(weight_D)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, gate, weight_D, ctx.eps, _ = inputs
    ctx.save_for_backward(x, gate, weight_D)


def _differentiate(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    x, gate, weight_D = ctx.saved_tensors
    dx, dgate, dweight_D = rms_norm_backward(dy, x, gate, weight_D, ctx.eps)
    return dx, None if gate is None else dgate, dweight_D, None, None


rms_norm.register_autograd(_differentiate, setup_context=_save)
