"""Sums of log decays inside chunks, for every scan whose decay is one number per head and token.

Documents enter here, once: a token sees another where both lie in the same run of equal ids, and all that is
exponentiated is masked before.

Shapes: B rows, T tokens, J chunks of a row, Q tokens of a chunk, H heads.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from longspan.ops.triton.softplus import softplus

# Planes of the decays: step sizes, sums of log decays since the token's document or chunk began, decay from the token
# to the end of its chunk, decay from the end of the chunk before to the token; the last two are 0 across a boundary.
DT, SUM, TO_END, FROM_BEFORE = (tl.constexpr(plane) for plane in range(4))
LARGEST_HEADS = 32


@triton.jit
def _runs(doc_ptr, before_ptr, row, t, time, DOCS: tl.constexpr, BEFORE: tl.constexpr):
    """Which run of equal ids each token is of, counted in its chunk; 0 is the run that comes from the chunk before."""
    starts = tl.zeros_like(t)
    if DOCS:
        now = tl.load(doc_ptr + row * time + t, mask=t < time, other=0)
        last = tl.load(doc_ptr + row * time + t - 1, mask=(t < time) & (t > 0), other=0)
        differs = now != last
        if BEFORE:
            differs = tl.where(t > 0, differs, now != tl.load(before_ptr + row))
        else:
            differs = differs & (t > 0)
        starts = (differs & (t < time)).to(tl.int32)
    return tl.cumsum(starts, 0)


@triton.jit
def sum_decays(
    dt_ptr, bias_ptr, A_ptr, doc_ptr, before_ptr, planes_ptr, carry_ptr, run_ptr, time, dt_row, dt_token, plane,
    H: tl.constexpr, Q: tl.constexpr, HEADS: tl.constexpr, SOFTPLUS: tl.constexpr, RATES: tl.constexpr,
    DOCS: tl.constexpr, BEFORE: tl.constexpr,
):  # fmt: skip
    """The planes of one chunk, what a state keeps over it, and its runs."""
    chunk, row, chunks = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.num_programs(0)
    i = tl.arange(0, Q)
    t = chunk * Q + i
    run = _runs(doc_ptr, before_ptr, row, t, time, DOCS, BEFORE)
    tl.store(run_ptr + row * chunks * Q + t, run)
    last_run = tl.max(run, 0)
    seen = ((i[:, None] <= i[None, :]) & (run[:, None] == run[None, :])).to(tl.float32)
    for start in range(0, H, HEADS):
        h = start + tl.arange(0, HEADS)
        there = (t < time)[:, None] & (h < H)[None, :]
        dt = tl.load(dt_ptr + row * dt_row + t[:, None] * dt_token + h[None, :], mask=there, other=0.0).to(tl.float32)
        if SOFTPLUS:
            bias = tl.load(bias_ptr + h, mask=h < H, other=0.0).to(tl.float32)
            dt = tl.where(there, softplus(dt + bias[None, :]), 0.0)
        # Heads first from here on: tokens lie side by side in the planes.
        dt = tl.trans(dt)
        log_decay = dt
        if RATES:
            log_decay = dt * tl.load(A_ptr + h, mask=h < H, other=0.0).to(tl.float32)[:, None]
        # A sum over exactly the tokens seen: nothing of another document enters, not even as rounding. Ones and zeros
        # are exact in tf32, so three products are fp32.
        sums = tl.dot(log_decay, seen, input_precision="tf32x3")
        end = tl.sum(tl.where((i == Q - 1)[None, :], sums, 0.0), 1)
        to_end = tl.exp(tl.where((run == last_run)[None, :], tl.minimum(end[:, None] - sums, 0.0), float("-inf")))
        from_before = tl.exp(tl.where((run == 0)[None, :], tl.minimum(sums, 0.0), float("-inf")))
        at = planes_ptr + (row * H + h[:, None]) * chunks * Q + t[None, :]
        heads = (h < H)[:, None] & (i >= 0)[None, :]
        tl.store(at + DT * plane, dt, mask=heads)
        tl.store(at + SUM * plane, sums, mask=heads)
        tl.store(at + TO_END * plane, to_end, mask=heads)
        tl.store(at + FROM_BEFORE * plane, from_before, mask=heads)
        carry = tl.exp(tl.where(last_run == 0, tl.minimum(end, 0.0), float("-inf")))
        tl.store(carry_ptr + (row * H + h) * chunks + chunk, carry, mask=h < H)


class Decays(NamedTuple):
    """The planes (4, B, H, J * Q), what a state keeps over a chunk (B, H, J), runs of equal ids (B, J * Q)."""

    planes: Tensor
    carry: Tensor
    run: Tensor

    @staticmethod
    def of(
        dt_BTH: Tensor,
        A_H: Tensor | None,
        bias_H: Tensor | None,
        doc_BT: Tensor | None,
        initial_doc_B: Tensor | None,
        chunk: int,
        options: Mapping[str, int] | None = None,
    ) -> Decays:
        """Of log decays dt * A, or dt alone; with a bias, dt is what comes before bias and softplus.

        `options`: how the kernel is compiled.
        """
        rows, time, heads = dt_BTH.shape
        chunks = triton.cdiv(time, chunk)
        planes = dt_BTH.new_empty(4, rows, heads, chunks * chunk, dtype=torch.float32)
        carry = dt_BTH.new_empty(rows, heads, chunks, dtype=torch.float32)
        run = dt_BTH.new_empty(rows, chunks * chunk, dtype=torch.int32)
        sum_decays[(chunks, rows)](
            dt_BTH, pointer(bias_H, dt_BTH), pointer(A_H, dt_BTH), pointer(doc_BT, dt_BTH),
            pointer(initial_doc_B, dt_BTH), planes, carry, run, time, *dt_BTH.stride()[:2], planes.stride(0),
            H=heads, Q=chunk, HEADS=heads_of_program(heads), SOFTPLUS=bias_H is not None, RATES=A_H is not None,
            DOCS=doc_BT is not None, BEFORE=doc_BT is not None and initial_doc_B is not None,
            **(options or {"num_warps": square_warps(chunk), "num_stages": 1}),
        )  # fmt: skip
        return Decays(planes, carry, run)


def square_warps(chunk: int) -> int:
    """Of a program that holds a square of a chunk in registers."""
    return max(4, chunk // 16)


def heads_of_program(heads: int) -> int:
    """How many heads a program takes at a time: a power of two that a product can take."""
    return min(max(16, int(triton.next_power_of_2(heads))), LARGEST_HEADS)


def pointer(tensor: Tensor | None, stand_in: Tensor) -> Tensor:
    """A kernel takes some pointer, also where it never reads it."""
    return stand_in if tensor is None else tensor
