"""One new token per row against a ring of keys: every program takes a share of the places there are, read once.

The number of places is read from the device, so that one launch serves every length; a second kernel joins the shares
in a fixed order. Rows of one key-value head go through together: their keys are read once for all its query heads.

Shapes: B rows, C slots, H query heads, G key-value heads, P head dim, J shares.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from longspan.ops.rotary import Rotation
from longspan.ops.triton.device import on_its_device

LOG2_E = tl.constexpr(math.log2(math.e))
# Programs for every multiprocessor, so that enough reads are under way.
PROGRAMS_EACH = 4
MOST_SHARES = 64


class Cut(NamedTuple):
    """How the work is cut; changes speed, not results beyond rounding.

    Attributes:
        block: keys read at a time.
        warps, stages: of a program.
    """

    block: int
    warps: int
    stages: int


CUT = Cut(64, 4, 2)
"""Products on the tensor cores, padded to 16 query heads: also for one, where sums in registers take twice as long."""


@triton.jit
def _place(
    qkv_ptr, cos_ptr, sin_ptr, q_ptr, k_ptr, v_ptr, newest_ptr, slots,
    qkv_row: tl.constexpr, angle_row: tl.constexpr, cache_row, cache_slot: tl.constexpr,
    H: tl.constexpr, G: tl.constexpr, P: tl.constexpr, R: tl.constexpr, BLOCK: tl.constexpr,
    ROTATES: tl.constexpr, UNROTATED: tl.constexpr,
):  # fmt: skip
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    p = tl.arange(0, BLOCK)
    there = p < P
    x = tl.load(qkv_ptr + row * qkv_row + head * P + p, mask=there, other=0.0)
    is_query = head < H
    place_in_kind = tl.where(is_query, head, head - H)
    turns = (head < H + G) & (place_in_kind >= UNROTATED)
    if ROTATES:
        low = p < R
        pair = tl.where(low, p, p - R)
        other = tl.load(qkv_ptr + row * qkv_row + head * P + tl.where(low, p + R, p - R), mask=there & turns, other=0.0)
        cos = tl.load(cos_ptr + row * angle_row + pair, mask=there & turns, other=0.0)
        sin = tl.load(sin_ptr + row * angle_row + pair, mask=there & turns, other=0.0)
        turned = x.to(tl.float32) * cos + other.to(tl.float32) * tl.where(low, -sin, sin)
        x = tl.where(turns, turned.to(x.dtype), x)
    slot = tl.load(newest_ptr) % slots
    if is_query:
        tl.store(q_ptr + (row * H + head) * P + p, x, mask=there)
    elif head < H + G:
        tl.store(k_ptr + row * cache_row + slot * cache_slot + (head - H) * P + p, x, mask=there)
    else:
        tl.store(v_ptr + row * cache_row + slot * cache_slot + (head - H - G) * P + p, x, mask=there)


@triton.jit
def _share(
    q_ptr, k_ptr, v_ptr, newest_ptr, first_ptr, slopes_ptr, windows_ptr, y_ptr, part_ptr, most_ptr, sum_ptr,
    scale, slots, window, cache_row, cache_slot: tl.constexpr,
    H: tl.constexpr, G: tl.constexpr, P: tl.constexpr, PADDED: tl.constexpr, HEADS: tl.constexpr,
    BLOCK: tl.constexpr, SHARES: tl.constexpr, OPERAND: tl.constexpr, STAGES: tl.constexpr,
    SLOPES: tl.constexpr, WINDOW: tl.constexpr, HEAD_WINDOWS: tl.constexpr,
):  # fmt: skip
    """One share of the places of one row and key-value head: (HEADS, P) sums that are not yet divided.

    OPERAND is another dtype than that of the keys only for the interpreter, which multiplies no bf16.
    """
    row, group, share = tl.program_id(0).to(tl.int64) // G, tl.program_id(0) % G, tl.program_id(1)
    each: tl.constexpr = H // G
    newest = tl.load(newest_ptr)
    first = tl.load(first_ptr + row)
    slot = newest % slots
    base = newest - slot
    seen = tl.minimum(newest + 1, slots).to(tl.int32)
    blocks = tl.cdiv(tl.cdiv(seen, BLOCK), SHARES)
    low = share * blocks * BLOCK
    high = tl.minimum(seen, low + blocks * BLOCK)

    h, p = tl.arange(0, HEADS), tl.arange(0, PADDED)
    head = group * each + h
    mine = h < each
    q = tl.load(q_ptr + (row * H + head[:, None]) * P + p[None, :], mask=mine[:, None] & (p < P)[None, :], other=0.0)
    most = tl.full((HEADS,), float("-inf"), tl.float32)
    total = tl.zeros((HEADS,), tl.float32)
    sums = tl.zeros((HEADS, PADDED), tl.float32)
    if SLOPES:
        slopes = tl.load(slopes_ptr + head, mask=mine, other=0.0).to(tl.float32)
    if HEAD_WINDOWS:
        windows = tl.load(windows_ptr + head, mask=mine, other=0)
    k_ptr += row * cache_row + group * P
    v_ptr += row * cache_row + group * P
    for start in tl.range(low, high, BLOCK, num_stages=STAGES):
        s = start + tl.arange(0, BLOCK)
        there = s < high
        at = s.to(tl.int64)[:, None] * cache_slot + p[None, :]
        read = there[:, None] & (p < P)[None, :]
        k = tl.load(k_ptr + at, mask=read, other=0.0)
        v = tl.load(v_ptr + at, mask=read, other=0.0)
        scores = tl.dot(q.to(OPERAND), tl.trans(k).to(OPERAND), input_precision="ieee") * scale
        place = base + s - tl.where(s > slot, slots, 0)
        visible = (there & (place >= first))[None, :]
        distance = newest - place
        if WINDOW:
            visible = visible & (distance < window)[None, :]
        if HEAD_WINDOWS:
            visible = visible & ((distance[None, :] < windows[:, None]) | (windows == 0)[:, None])
        if SLOPES:
            scores -= slopes[:, None] * distance.to(tl.float32)[None, :]
        scores = tl.where(visible, scores * LOG2_E, float("-inf"))
        # Where nothing has been seen yet, minus infinity from itself would be no number.
        higher = tl.maximum(most, tl.max(scores, 1))
        level = tl.where(higher == float("-inf"), 0.0, higher)
        shares = tl.exp2(scores - level[:, None])
        fade = tl.exp2(most - level)
        total = total * fade + tl.sum(shares, 1)
        sums = sums * fade[:, None] + tl.dot(shares.to(v.dtype).to(OPERAND), v.to(OPERAND), input_precision="ieee")
        most = higher
    out = (row * H + head) * SHARES + share
    if SHARES == 1:
        y = sums / total[:, None]
        tl.store(
            y_ptr + out[:, None] * P + p[None, :], y.to(y_ptr.dtype.element_ty), mask=mine[:, None] & (p < P)[None, :]
        )
    else:
        tl.store(part_ptr + out[:, None] * P + p[None, :], sums, mask=mine[:, None] & (p < P)[None, :])
        tl.store(most_ptr + out, most, mask=mine)
        tl.store(sum_ptr + out, total, mask=mine)


@triton.jit
def _join(
    part_ptr, most_ptr, sum_ptr, y_ptr, P: tl.constexpr, PADDED: tl.constexpr, SHARES: tl.constexpr
):  # fmt: skip
    out = tl.program_id(0).to(tl.int64)
    j, p = tl.arange(0, SHARES), tl.arange(0, PADDED)
    most = tl.load(most_ptr + out * SHARES + j)
    weight = tl.exp2(most - tl.max(most, 0))
    total = tl.sum(weight * tl.load(sum_ptr + out * SHARES + j), 0)
    at = (out * SHARES + j)[:, None] * P + p[None, :]
    parts = tl.load(part_ptr + at, mask=(p < P)[None, :], other=0.0)
    y = tl.sum(parts * weight[:, None], 0) / total
    tl.store(y_ptr + out * P + p, y.to(y_ptr.dtype.element_ty), mask=p < P)


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def num_shares(programs: int, blocks: int, device: torch.device) -> int:
    """A power of two that fills the chip, with at least one block of keys to a share."""
    wanted = PROGRAMS_EACH * _multiprocessors(device)
    shares = 1
    while shares < MOST_SHARES and programs * shares < wanted and 2 * shares <= blocks:
        shares *= 2
    return shares


@on_its_device
def run_place(
    qkv_BKP: Tensor, rotation: Rotation | None, unrotated: int, k_BCGP: Tensor, v_BCGP: Tensor, newest_1: Tensor
) -> Tensor:
    """See `ops.decode_attention.place_token`."""
    rows, kinds, head_dim = qkv_BKP.shape
    slots, groups = k_BCGP.shape[1:3]
    qkv_BKP = qkv_BKP.contiguous()
    heads = kinds - 2 * groups
    q = qkv_BKP.new_empty(rows, heads, head_dim)
    cos, sin = (qkv_BKP, qkv_BKP) if rotation is None else (each.contiguous() for each in rotation)
    angle_row = 0 if rotation is None or cos.shape[0] == 1 else head_dim // 2
    _place[(rows, kinds)](
        qkv_BKP, cos, sin, q, k_BCGP, v_BCGP, newest_1, slots,
        qkv_row=kinds * head_dim, angle_row=angle_row, cache_row=k_BCGP.stride(0), cache_slot=k_BCGP.stride(1),
        H=heads, G=groups, P=head_dim, R=head_dim // 2, BLOCK=triton.next_power_of_2(head_dim),
        ROTATES=rotation is not None, UNROTATED=unrotated, num_warps=1,
    )  # fmt: skip
    return q


@on_its_device
def run_attention(
    q_BHP: Tensor,
    k_BCGP: Tensor,
    v_BCGP: Tensor,
    newest_1: Tensor,
    first_B: Tensor,
    alibi_slopes_H: Tensor | None,
    window: int | None,
    head_windows_H: Tensor | None,
    cut: Cut | None = None,
    shares: int | None = None,
) -> Tensor:
    """See `ops.decode_attention.decode_attention`; `cut`, `shares` for measuring others than usual."""
    rows, heads, head_dim = q_BHP.shape
    slots, groups = k_BCGP.shape[1:3]
    q_BHP = q_BHP.contiguous()
    each = heads // groups
    cut = cut or CUT
    padded = max(16, triton.next_power_of_2(head_dim))
    tiles = max(16, triton.next_power_of_2(each))
    blocks = -(-slots // cut.block)
    shares = shares or num_shares(rows * groups, blocks, q_BHP.device)
    y = torch.empty_like(q_BHP)
    part: Any = y
    most: Any = y
    total: Any = y
    if shares > 1:
        part = q_BHP.new_empty(rows, heads, shares, head_dim, dtype=torch.float32)
        most, total = (q_BHP.new_empty(rows, heads, shares, dtype=torch.float32) for _ in range(2))
    _share[(rows * groups, shares)](
        q_BHP, k_BCGP, v_BCGP, newest_1, first_B,
        q_BHP if alibi_slopes_H is None else alibi_slopes_H, first_B if head_windows_H is None else head_windows_H,
        y, part, most, total, 1.0 / math.sqrt(head_dim), slots, window or 0,
        k_BCGP.stride(0), cache_slot=k_BCGP.stride(1),
        H=heads, G=groups, P=head_dim, PADDED=padded, HEADS=tiles, BLOCK=cut.block, SHARES=shares,
        OPERAND=tl.bfloat16 if q_BHP.is_cuda and q_BHP.dtype == torch.bfloat16 else tl.float32, STAGES=cut.stages,
        SLOPES=alibi_slopes_H is not None, WINDOW=window is not None, HEAD_WINDOWS=head_windows_H is not None,
        num_warps=cut.warps, num_stages=cut.stages,
    )  # fmt: skip
    if shares > 1:
        _join[(rows * heads,)](
            part, most, total, y, P=head_dim, PADDED=padded, SHARES=shares, num_warps=4,
        )  # fmt: skip
    return y
