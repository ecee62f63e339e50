"""Adding up what each program of a kernel leaves: fp32, in one order, the same bits in every run.

Shapes: B sums, J programs, D columns.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from longspan.ops.triton.device import on_its_device

# Narrow columns make many programs of few lines of memory each; rows are on their way while others are added.
ROWS, COLUMNS, STAGES = 64, 32, 4


@triton.jit
def add_up_rows(
    rows_ptr, sums_ptr, rows, D: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, STAGES: tl.constexpr
):  # fmt: skip
    """Some columns of one sum."""
    d = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    values = rows_ptr + tl.program_id(1).to(tl.int64) * rows * D
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for step in tl.range(tl.cdiv(rows, ROWS), num_stages=STAGES):
        j = step * ROWS + tl.arange(0, ROWS)
        there = (j < rows)[:, None] & (d < D)[None, :]
        total += tl.load(values + j[:, None] * D + d[None, :], mask=there, other=0.0)
    tl.store(sums_ptr + tl.program_id(1) * D + d, tl.sum(total, 0), mask=d < D)


@on_its_device
def add_up(values_BJD: Tensor) -> Tensor:
    """(B, D) of contiguous fp32."""
    batch, rows, columns = values_BJD.shape
    sums_BD = torch.empty(batch, columns, dtype=torch.float32, device=values_BJD.device)
    add_up_rows[(triton.cdiv(columns, COLUMNS), batch)](
        values_BJD, sums_BD, rows, D=columns, ROWS=ROWS, COLUMNS=COLUMNS, STAGES=STAGES, num_warps=4
    )
    return sums_BD
