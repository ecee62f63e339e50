"""What the chunked kernels share: tiles in and out of memory, products of one precision, exponentials.

Shapes: tiles are (rows, columns).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2_E = tl.constexpr(1.4426950408889634)
# With narrower tiles of bf16 Triton 3.6 reads past their end in shared memory on Hopper: wrong sums, or a crash.
NARROWEST = {torch.bfloat16: 64, torch.float32: 16}
LINE_BYTES = 128


def block(size: int, like: Tensor) -> int:
    """The width of a tile that holds `size` columns of a product in the dtype of `like`."""
    narrowest = NARROWEST[like.dtype] if like.is_cuda else 16
    return max(narrowest, int(triton.next_power_of_2(size)))


def dense(x: Tensor) -> Tensor:
    """Itself where the numbers of the last dimension lie side by side, a copy otherwise."""
    return x if x.stride(-1) == 1 else x.contiguous()


def spread(like: Tensor) -> Tensor:
    """Uninitialized, of the shape (M, K) of `like`, and every row begins a line of memory."""
    rows, width = like.shape
    line = LINE_BYTES // like.element_size()
    return like.new_empty_strided((rows, width), (-(-width // line) * line, 1))


@triton.jit
def load(start, rows, stride, columns, num_rows, NUM_COLUMNS: tl.constexpr, WHOLE: tl.constexpr):
    """(rows, columns), 0 where there is nothing; WHOLE: all of it exists."""
    at = start + rows[:, None] * stride + columns[None, :]
    if WHOLE:
        return tl.load(at)
    return tl.load(at, mask=(rows < num_rows)[:, None] & (columns < NUM_COLUMNS)[None, :], other=0.0)


@triton.jit
def store(start, rows, stride, columns, num_rows, NUM_COLUMNS: tl.constexpr, WHOLE: tl.constexpr, values):
    """Writes a tile in the dtype that lies there."""
    at = start + rows[:, None] * stride + columns[None, :]
    values = values.to(start.dtype.element_ty)
    if WHOLE:
        tl.store(at, values)
    else:
        tl.store(at, values, mask=(rows < num_rows)[:, None] & (columns < NUM_COLUMNS)[None, :])


@triton.jit
def dot(a, b, DTYPE: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr):
    """a @ b in fp32 with both rounded to DTYPE; OPERAND is another only for the interpreter, which knows no bf16."""
    return tl.dot(a.to(DTYPE).to(OPERAND), b.to(DTYPE).to(OPERAND), input_precision=PRECISION)


@triton.jit
def widened(x, FAST: tl.constexpr):
    """bf16 as fp32; FAST: two numbers in two instructions, where Triton needs three."""
    if FAST and x.dtype == tl.bfloat16:
        return tl.inline_asm_elementwise(
            "{ .reg .b32 t; shl.b32 t, $2, 16; mov.b32 $0, t; and.b32 t, $2, 0xffff0000; mov.b32 $1, t; }",
            "=f,=f,r",
            [x],
            dtype=tl.float32,
            is_pure=True,
            pack=2,
        )
    return x.to(tl.float32)


@triton.jit
def exp2(x, FAST: tl.constexpr):
    """2^x; FAST: one instruction, 0 below 2^-126."""
    if FAST:
        return tl.inline_asm_elementwise(
            "ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    return tl.exp2(x)


@triton.jit
def sigmoid(x, FAST: tl.constexpr):
    """FAST: in four instructions, right to a few units in the last place of fp32."""
    if FAST:
        return tl.inline_asm_elementwise(
            "{ .reg .f32 t; mul.f32 t, $1, 0fBFB8AA3B; ex2.approx.ftz.f32 t, t; add.f32 t, t, 0f3F800000; "
            "rcp.approx.ftz.f32 $0, t; }",
            "=f,f",
            [x],
            dtype=tl.float32,
            is_pure=True,
            pack=1,
        )
    return tl.sigmoid(x)


def has_fast_exp2(x: Tensor) -> bool:
    """Whether kernels on the device of `x` may use it: NVIDIA's instruction, which the interpreter does not know."""
    return x.is_cuda and torch.version.hip is None
