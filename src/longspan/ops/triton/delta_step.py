"""One token of the gated delta rule with its gates and the norm after it: a head's memory is read and written once.

For a few rows a program has the whole memory of one head in its registers, since the norm needs all values of a head.
For many, small programs with some values of a head each keep more reads under way, and a second kernel norms.

Shapes: B rows, E channels (q, k, v), H heads, K key dim, V value dim of a head.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from longspan.ops.triton.device import on_its_device
from longspan.ops.triton.softplus import softplus

NUMBERS_A_WARP = 1024
"""Of a memory, to each warp of its program: 32 to a thread."""
MOST_WARPS = 16
MANY_ROWS = 256
TILE, TILE_WARPS = 32, 2
"""Values of a head to a program where there are many rows, and its warps."""


@triton.jit
def _normed(o, z_ptr, weight_ptr, eps, j, V: tl.constexpr):
    """All values of a head, normed and gated."""
    z = tl.load(z_ptr + j, mask=j < V, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + j, mask=j < V, other=0.0).to(tl.float32)
    return o / tl.sqrt(tl.sum(o * o, 0) / V + eps) * weight * z * tl.sigmoid(z)


@triton.jit
def _correct(
    qkv_ptr, z_ptr, b_ptr, a_ptr, dt_bias_ptr, A_log_ptr, weight_ptr, memory_ptr, y_ptr, scale, eps,
    qkv_row: tl.constexpr, z_row: tl.constexpr, b_row: tl.constexpr, a_row: tl.constexpr,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, KEYS: tl.constexpr, VALUES: tl.constexpr,
    STRENGTH: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """WHOLE: VALUES holds all of a head, and y is normed and gated; else y is what the memory says, in fp32."""
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    i, j = tl.arange(0, KEYS), tl.program_id(2) * VALUES + tl.arange(0, VALUES)
    at = ((row * H + head) * K + i[:, None]) * V + j[None, :]
    there = (i < K)[:, None] & (j < V)[None, :]
    memory = tl.load(memory_ptr + at, mask=there, other=0.0)
    qkv_ptr += row * qkv_row + head * K
    q = tl.load(qkv_ptr + i, mask=i < K, other=0.0)
    k = tl.load(qkv_ptr + H * K + i, mask=i < K, other=0.0)
    v = tl.load(qkv_ptr - head * K + 2 * H * K + head * V + j, mask=j < V, other=0.0)
    q *= scale / tl.sqrt(tl.sum(q * q, 0) + 1e-6)
    k /= tl.sqrt(tl.sum(k * k, 0) + 1e-6)
    rate = tl.load(a_ptr + row * a_row + head).to(tl.float32) + tl.load(dt_bias_ptr + head).to(tl.float32)
    dt = softplus(rate)
    decay = tl.exp(-dt * tl.exp(tl.load(A_log_ptr + head).to(tl.float32)))
    beta = STRENGTH * tl.sigmoid(tl.load(b_ptr + row * b_row + head).to(tl.float32))
    memory *= decay
    u = beta * (v - tl.sum(memory * k[:, None], 0))
    memory += k[:, None] * u[None, :]
    tl.store(memory_ptr + at, memory, mask=there)
    o = tl.sum(memory * q[:, None], 0)
    if WHOLE:
        o = _normed(o, z_ptr + row * z_row + head * V, weight_ptr, eps, j, V)
    tl.store(y_ptr + (row * H + head) * V + j, o.to(y_ptr.dtype.element_ty), mask=j < V)


@triton.jit
def _norm(
    o_ptr, z_ptr, weight_ptr, y_ptr, eps, z_row: tl.constexpr, H: tl.constexpr, V: tl.constexpr, VALUES: tl.constexpr
):  # fmt: skip
    row, head, j = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.arange(0, VALUES)
    at = (row * H + head) * V + j
    o = tl.load(o_ptr + at, mask=j < V, other=0.0)
    y = _normed(o, z_ptr + row * z_row + head * V, weight_ptr, eps, j, V)
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=j < V)


@on_its_device
def run_step(
    qkv_BE: Tensor,
    z_BHV: Tensor,
    b_BH: Tensor,
    a_BH: Tensor,
    dt_bias_H: Tensor,
    A_log_H: Tensor,
    norm_weight_V: Tensor,
    memory_BHKV: Tensor,
    *,
    eps: float,
    negative_eigenvalues: bool,
) -> Tensor:
    """See `ops.delta_step.delta_step`; q, k and v (contiguous, fp32) are convolved, the result has the dtype of z."""
    rows, heads, keys, values = memory_BHKV.shape
    y = z_BHV.new_empty(rows, heads, values)
    padded_keys, padded_values = triton.next_power_of_2(keys), triton.next_power_of_2(values)
    whole = rows < MANY_ROWS or padded_values <= TILE
    tile = padded_values if whole else TILE
    warps = min(MOST_WARPS, max(1, padded_keys * tile // NUMBERS_A_WARP)) if whole else TILE_WARPS
    o = y if whole else qkv_BE.new_empty(rows, heads, values)
    _correct[(rows, heads, triton.cdiv(values, tile))](
        qkv_BE, z_BHV, b_BH, a_BH, dt_bias_H, A_log_H, norm_weight_V, memory_BHKV, o, keys**-0.5, eps,
        qkv_row=qkv_BE.shape[1], z_row=z_BHV.stride(0), b_row=b_BH.stride(0), a_row=a_BH.stride(0),
        H=heads, K=keys, V=values, KEYS=padded_keys, VALUES=tile,
        STRENGTH=2.0 if negative_eigenvalues else 1.0, WHOLE=whole, num_warps=warps,
    )  # fmt: skip
    if not whole:
        _norm[(rows, heads)](
            o, z_BHV, norm_weight_V, y, eps,
            z_row=z_BHV.stride(0), H=heads, V=values, VALUES=padded_values, num_warps=1,
        )  # fmt: skip
    return y
