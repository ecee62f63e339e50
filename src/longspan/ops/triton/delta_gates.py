"""The gates of Gated DeltaNet: what share is corrected, `beta = s sigmoid(b)`, and the log decay
`g = A softplus(a + bias)`.

Shapes: M tokens, H heads, J programs.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from longspan.ops.triton.device import on_its_device
from longspan.ops.triton.softplus import softplus
from longspan.ops.triton.sums import add_up

NUMBERS, PROGRAMS = 1024, 528
"""Of a tile; of the backward at most."""


@triton.jit
def _tile(step, heads_ptr, tokens, H: tl.constexpr, HEADS: tl.constexpr, TOKENS: tl.constexpr):
    """Tokens, heads, which of them there are, and a number of every head."""
    m, h = step.to(tl.int64) * TOKENS + tl.arange(0, TOKENS)[:, None], tl.arange(0, HEADS)[None, :]
    return m, h, (m < tokens) & (h < H), tl.load(heads_ptr + h, mask=h < H, other=0.0).to(tl.float32)


@triton.jit
def gates_forward(
    b_ptr, a_ptr, bias_ptr, A_ptr, beta_ptr, g_ptr, tokens, token: tl.constexpr,
    STRENGTH: tl.constexpr, H: tl.constexpr, HEADS: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """Of some tokens."""
    m, h, there, bias = _tile(tl.program_id(0), bias_ptr, tokens, H, HEADS, TOKENS)
    b = tl.load(b_ptr + m * token + h, mask=there, other=0.0).to(tl.float32)
    a = tl.load(a_ptr + m * token + h, mask=there, other=0.0).to(tl.float32)
    tl.store(beta_ptr + m * H + h, STRENGTH * tl.sigmoid(b), mask=there)
    A = tl.load(A_ptr + h, mask=h < H, other=0.0).to(tl.float32)
    tl.store(g_ptr + m * H + h, A * softplus(a + bias), mask=there)


@triton.jit
def gates_backward(
    a_ptr, bias_ptr, A_ptr, beta_ptr, dbeta_ptr, dg_ptr, db_ptr, da_ptr, rest_ptr, sums_ptr, tokens,
    token: tl.constexpr, d_token: tl.constexpr, STRENGTH: tl.constexpr, REST: tl.constexpr, REST_BLOCK: tl.constexpr,
    H: tl.constexpr, HEADS: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """Of every so many tokens, and what they add to the gradients of A and bias; zeros for the REST of their rows."""
    dA, dbias = tl.zeros((TOKENS, HEADS), tl.float32), tl.zeros((TOKENS, HEADS), tl.float32)
    for turn in range(tl.cdiv(tokens, TOKENS * tl.num_programs(0))):
        step = turn * tl.num_programs(0) + tl.program_id(0)
        m, h, there, bias = _tile(step, bias_ptr, tokens, H, HEADS, TOKENS)
        beta = tl.load(beta_ptr + m * H + h, mask=there, other=0.0)
        dbeta = tl.load(dbeta_ptr + m * H + h, mask=there, other=0.0)
        db = dbeta * beta * (1.0 - beta / STRENGTH)
        tl.store(db_ptr + m * d_token + h, db.to(db_ptr.dtype.element_ty), mask=there)
        a = tl.load(a_ptr + m * token + h, mask=there, other=0.0).to(tl.float32) + bias
        dg = tl.load(dg_ptr + m * H + h, mask=there, other=0.0)
        da = dg * tl.load(A_ptr + h, mask=h < H, other=0.0).to(tl.float32) * tl.sigmoid(a)
        tl.store(da_ptr + m * d_token + h, da.to(da_ptr.dtype.element_ty), mask=there)
        dA += dg * softplus(a)
        dbias += da
        if REST > 0:
            c = tl.arange(0, REST_BLOCK)[None, :]
            zeros = tl.zeros((TOKENS, REST_BLOCK), rest_ptr.dtype.element_ty)
            tl.store(rest_ptr + m * d_token + c, zeros, mask=(m < tokens) & (c < REST))
    h = tl.arange(0, HEADS)
    sums = sums_ptr + tl.program_id(0) * 2 * H + h
    tl.store(sums, tl.sum(dA, 0), mask=h < H)
    tl.store(sums + H, tl.sum(dbias, 0), mask=h < H)


def _sizes(heads: int) -> dict[str, int]:
    block = int(triton.next_power_of_2(heads))
    return {"H": heads, "HEADS": block, "TOKENS": max(1, NUMBERS // block)}


@on_its_device
def run_forward(b_MH: Tensor, a_MH: Tensor, bias_H: Tensor, A_H: Tensor, strength: float) -> tuple[Tensor, Tensor]:
    """beta and g (M, H), fp32; tokens of b and a lie equally far apart."""
    tokens, heads = b_MH.shape
    sizes = _sizes(heads)
    beta_MH, g_MH = (b_MH.new_empty(tokens, heads, dtype=torch.float32) for _ in range(2))
    gates_forward[(triton.cdiv(tokens, sizes["TOKENS"]),)](
        b_MH, a_MH, bias_H, A_H, beta_MH, g_MH, tokens, b_MH.stride(0), STRENGTH=strength, **sizes, num_warps=4
    )
    return beta_MH, g_MH


@on_its_device
def run_backward(
    a_MH: Tensor,
    bias_H: Tensor,
    A_H: Tensor,
    beta_MH: Tensor,
    dbeta_MH: Tensor,
    dg_MH: Tensor,
    strength: float,
    db_MH: Tensor,
    da_MH: Tensor,
    rest_MR: Tensor,
) -> Tensor:
    """Fills the gradients of b and a, rows of one tensor, and what follows them there with zeros.

    Returns:
        The gradients of A and bias, (2, H) in fp32.
    """
    tokens, heads = a_MH.shape
    sizes, rest = _sizes(heads), rest_MR.shape[1]
    rest_block = int(triton.next_power_of_2(max(rest, 1)))
    programs = min(triton.cdiv(tokens, sizes["TOKENS"]), PROGRAMS)
    sums = a_MH.new_empty(1, programs, 2 * heads, dtype=torch.float32)
    gates_backward[(programs,)](
        a_MH, bias_H, A_H, beta_MH, dbeta_MH, dg_MH, db_MH, da_MH, rest_MR, sums, tokens,
        a_MH.stride(0), db_MH.stride(0), STRENGTH=strength, REST=rest, REST_BLOCK=rest_block, **sizes, num_warps=4,
    )  # fmt: skip
    return add_up(sums).view(2, heads)
