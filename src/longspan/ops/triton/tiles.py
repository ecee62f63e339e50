"""What the chunked kernels share: tiles in and out of memory, products of one precision, exponentials.

Shapes: tiles are (rows, columns).
"""

import triton
import triton.language as tl


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
