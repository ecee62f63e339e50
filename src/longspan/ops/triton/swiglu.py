"""SwiGLU's product and its gradients: one pass over memory each. A program takes a row.

Shapes: M rows, F hidden width.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from longspan.ops.triton.device import on_its_device
from longspan.ops.triton.rms_norm import row_block, rows_of, warps_of
from longspan.ops.triton.tiles import has_fast_exp2, sigmoid


@triton.jit
def swiglu_forward(
    hidden_ptr, y_ptr, hidden_row: tl.constexpr, F: tl.constexpr, BLOCK: tl.constexpr, FAST: tl.constexpr
):  # fmt: skip
    """One row."""
    row, f = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    hidden = hidden_ptr + row * hidden_row
    gate = tl.load(hidden + f, mask=f < F, other=0.0).to(tl.float32)
    up = tl.load(hidden + F + f, mask=f < F, other=0.0).to(tl.float32)
    y = gate * sigmoid(gate, FAST) * up
    tl.store(y_ptr + row * F + f, y.to(y_ptr.dtype.element_ty), mask=f < F)


@triton.jit
def swiglu_gradients(
    dy_ptr, hidden_ptr, dhidden_ptr, dy_row: tl.constexpr, hidden_row: tl.constexpr,
    F: tl.constexpr, BLOCK: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """One row."""
    row, f = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    hidden, dhidden = hidden_ptr + row * hidden_row, dhidden_ptr + row * 2 * F
    dy = tl.load(dy_ptr + row * dy_row + f, mask=f < F, other=0.0).to(tl.float32)
    gate = tl.load(hidden + f, mask=f < F, other=0.0).to(tl.float32)
    up = tl.load(hidden + F + f, mask=f < F, other=0.0).to(tl.float32)
    opening = sigmoid(gate, FAST)
    silu = gate * opening
    dgate = dy * up * (opening + silu * (1.0 - opening))
    tl.store(dhidden + f, dgate.to(dhidden_ptr.dtype.element_ty), mask=f < F)
    tl.store(dhidden + F + f, (dy * silu).to(dhidden_ptr.dtype.element_ty), mask=f < F)


@on_its_device
def _forward(hidden: Tensor) -> Tensor:
    hidden_MF, width = rows_of(hidden), hidden.shape[-1] // 2
    y = hidden.new_empty(*hidden.shape[:-1], width)
    block = row_block(width)
    swiglu_forward[(hidden_MF.shape[0],)](
        hidden_MF, y, hidden_MF.stride(0), F=width, BLOCK=block, FAST=has_fast_exp2(hidden), num_warps=warps_of(block)
    )
    return y


@on_its_device
def _backward(dy: Tensor, hidden: Tensor) -> Tensor:
    dy_MF, hidden_MF, width = rows_of(dy), rows_of(hidden), dy.shape[-1]
    dhidden = torch.empty(hidden.shape, dtype=hidden.dtype, device=hidden.device)
    block = row_block(width)
    swiglu_gradients[(dy_MF.shape[0],)](
        dy_MF, hidden_MF, dhidden, dy_MF.stride(0), hidden_MF.stride(0),
        F=width, BLOCK=block, FAST=has_fast_exp2(hidden), num_warps=warps_of(block),
    )  # fmt: skip
    return dhidden


@torch.library.custom_op("longspan::swiglu", mutates_args=())
def swiglu(hidden: Tensor) -> Tensor:
    """`ops.swiglu.swiglu`."""
    return _forward(hidden)


@swiglu.register_fake
def _(hidden: Tensor) -> Tensor:
    return hidden.new_empty(*hidden.shape[:-1], hidden.shape[-1] // 2)


@torch.library.custom_op("longspan::swiglu_backward", mutates_args=())
def swiglu_backward(dy: Tensor, hidden: Tensor) -> Tensor:
    """The gradient of both halves."""
    return _backward(dy, hidden)


@swiglu_backward.register_fake
def _(dy: Tensor, hidden: Tensor) -> Tensor:
    return torch.empty(hidden.shape, dtype=hidden.dtype, device=hidden.device)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate(ctx: Any, dy: Tensor) -> Tensor:
    gradient: Tensor = swiglu_backward(dy, *ctx.saved_tensors)
    return gradient


swiglu.register_autograd(_differentiate, setup_context=_save)
