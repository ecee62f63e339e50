"""RMSNorm over each head and the gate SiLU(z) after it (Gated DeltaNet's output): one pass over memory each way.

A head has so few values that a program takes many heads at a time, each of them across a few threads. The backward
makes statistics again instead of keeping them; the gradient of the weight is summed per program and then in one order:
the same bits in every run.

Shapes: M tokens, H heads, V values of a head, J programs; a row is one head of one token.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from longspan.ops.triton.device import on_its_device
from longspan.ops.triton.sums import add_up
from longspan.ops.triton.tiles import has_fast_exp2, sigmoid

# Numbers of a tile, tiles of the backward in flight, the one that is worked on included, and its programs: as many as
# the registers of a large chip hold side by side.
FORWARD, BACKWARD, AHEAD, PROGRAMS = 4096, 2048, 3, 528


@triton.jit
def _at(row, v, token: tl.constexpr, H: tl.constexpr, V: tl.constexpr):
    """Where the values of rows lie whose tokens lie so far apart."""
    return ((row // H).to(tl.int64) * token + (row % H) * V)[:, None] + v[None, :]


@triton.jit
def head_norm_forward(
    o_ptr, z_ptr, weight_ptr, y_ptr, rows, eps, z_token: tl.constexpr,
    H: tl.constexpr, V: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """Some rows."""
    row, v = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, BLOCK)
    there = (row < rows)[:, None] & (v < V)[None, :]
    o = tl.load(o_ptr + _at(row, v, H * V, H, V), mask=there, other=0.0).to(tl.float32)
    z = tl.load(z_ptr + _at(row, v, z_token, H, V), mask=there, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + v, mask=v < V, other=0.0).to(tl.float32)
    normed = o * tl.rsqrt(tl.sum(o * o, 1) / V + eps)[:, None]
    y = normed * weight[None, :] * (z * sigmoid(z, FAST))
    tl.store(y_ptr + _at(row, v, H * V, H, V), y.to(y_ptr.dtype.element_ty), mask=there)


@triton.jit
def head_norm_backward(
    o_ptr, z_ptr, weight_ptr, dy_ptr, do_ptr, dz_ptr, sums_ptr, rows, eps,
    z_token: tl.constexpr, dy_token: tl.constexpr, dz_token: tl.constexpr,
    H: tl.constexpr, V: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, FAST: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """Every so many rows, and what they add to the gradient of the weight."""
    v = tl.arange(0, BLOCK)
    weight = tl.load(weight_ptr + v, mask=v < V, other=0.0).to(tl.float32)[None, :]
    dweight = tl.zeros((ROWS, BLOCK), tl.float32)
    for step in tl.range(tl.cdiv(rows, ROWS * tl.num_programs(0)), num_stages=AHEAD):
        row = (step * tl.num_programs(0) + tl.program_id(0)) * ROWS + tl.arange(0, ROWS)
        there = (row < rows)[:, None] & (v < V)[None, :]
        o = tl.load(o_ptr + _at(row, v, H * V, H, V), mask=there, other=0.0).to(tl.float32)
        z = tl.load(z_ptr + _at(row, v, z_token, H, V), mask=there, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + _at(row, v, dy_token, H, V), mask=there, other=0.0).to(tl.float32)
        opening = sigmoid(z, FAST)
        silu = z * opening
        inverse = tl.rsqrt(tl.sum(o * o, 1) / V + eps)[:, None]
        normed = o * inverse
        dz = dy * normed * weight * (opening + silu * (1.0 - opening))
        tl.store(dz_ptr + _at(row, v, dz_token, H, V), dz.to(dz_ptr.dtype.element_ty), mask=there)
        dscaled = dy * silu
        dweight += dscaled * normed
        dnormed = dscaled * weight
        do = (dnormed - normed * (tl.sum(dnormed * normed, 1) / V)[:, None]) * inverse
        tl.store(do_ptr + _at(row, v, H * V, H, V), do.to(do_ptr.dtype.element_ty), mask=there)
    tl.store(sums_ptr + tl.program_id(0) * V + v, tl.sum(dweight, 0), mask=v < V)


def _tile(numbers: int, values: int) -> dict[str, int]:
    """Values of a row and rows as a program takes them."""
    block = int(triton.next_power_of_2(values))
    return {"V": values, "BLOCK": block, "ROWS": max(1, numbers // block)}


@on_its_device
def run_forward(o_MHV: Tensor, z_MHV: Tensor, weight_V: Tensor, eps: float) -> Tensor:
    """`o / rms(o) * weight * silu(z)` of contiguous o, in its dtype; tokens of z may lie apart."""
    tokens, heads, values = o_MHV.shape
    y_MHV = torch.empty_like(o_MHV)
    tile = _tile(FORWARD, values)
    head_norm_forward[(triton.cdiv(tokens * heads, tile["ROWS"]),)](
        o_MHV, z_MHV, weight_V, y_MHV, tokens * heads, eps, z_MHV.stride(0),
        H=heads, **tile, FAST=has_fast_exp2(o_MHV), num_warps=4,
    )  # fmt: skip
    return y_MHV


@on_its_device
def run_backward(
    dy_MHV: Tensor, o_MHV: Tensor, z_MHV: Tensor, weight_V: Tensor, eps: float, do_MHV: Tensor, dz_MHV: Tensor
) -> Tensor:
    """Fills the gradients of o, contiguous, and of z, whose tokens may lie apart; returns that of the weight."""
    tokens, heads, values = o_MHV.shape
    rows, tile = tokens * heads, _tile(BACKWARD, values)
    programs = min(triton.cdiv(rows, tile["ROWS"]), PROGRAMS)
    sums_1JV = o_MHV.new_empty(1, programs, values, dtype=torch.float32)
    head_norm_backward[(programs,)](
        o_MHV, z_MHV, weight_V, dy_MHV, do_MHV, dz_MHV, sums_1JV, rows, eps,
        z_MHV.stride(0), dy_MHV.stride(0), dz_MHV.stride(0),
        H=heads, **tile, FAST=has_fast_exp2(o_MHV), AHEAD=AHEAD, num_warps=4,
    )  # fmt: skip
    return add_up(sums_1JV)[0].to(weight_V.dtype)
