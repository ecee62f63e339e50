"""`silu(gate) * up` in one pass: plain torch writes the SiLU and reads it again.

Shapes: M rows, F hidden width.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from longspan.ops.triton.device import on_its_device

COLUMNS = 1024
"""Of a row, to a program."""


@triton.jit
def _gate(hidden_ptr, y_ptr, F: tl.constexpr, BLOCK: tl.constexpr):
    row, f = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    there = f < F
    gate = tl.load(hidden_ptr + row * 2 * F + f, mask=there, other=0.0).to(tl.float32)
    up = tl.load(hidden_ptr + row * 2 * F + F + f, mask=there, other=0.0).to(tl.float32)
    y = gate * tl.sigmoid(gate) * up
    tl.store(y_ptr + row * F + f, y.to(y_ptr.dtype.element_ty), mask=there)


@on_its_device
def run_swiglu(hidden_2F: Tensor) -> Tensor:
    """See `ops.swiglu.swiglu`."""
    hidden_2F = hidden_2F.contiguous()
    width = hidden_2F.shape[-1] // 2
    y = hidden_2F.new_empty(*hidden_2F.shape[:-1], width)
    _gate[(y.numel() // width, triton.cdiv(width, COLUMNS))](
        hidden_2F, y, F=width, BLOCK=COLUMNS, num_warps=4
    )  # fmt: skip
    return y
