"""One token of the gated delta rule with its gates and the norm after it: a head's memory is read and written once.

A program has the whole memory of one head in its registers, since the norm needs all values of a head.

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


@triton.jit
def _correct(
    qkv_ptr, z_ptr, b_ptr, a_ptr, dt_bias_ptr, A_log_ptr, weight_ptr, memory_ptr, y_ptr, scale, eps,
    qkv_row: tl.constexpr, z_row: tl.constexpr, b_row: tl.constexpr, a_row: tl.constexpr,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, KEYS: tl.constexpr, VALUES: tl.constexpr,
    STRENGTH: tl.constexpr,
):  # fmt: skip
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    i, j = tl.arange(0, KEYS), tl.arange(0, VALUES)
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
    o *= 1.0 / tl.sqrt(tl.sum(o * o, 0) / V + eps)
    z = tl.load(z_ptr + row * z_row + head * V + j, mask=j < V, other=0.0).to(tl.float32)
    o *= tl.load(weight_ptr + j, mask=j < V, other=0.0).to(tl.float32) * z * tl.sigmoid(z)
    tl.store(y_ptr + (row * H + head) * V + j, o.to(y_ptr.dtype.element_ty), mask=j < V)


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
    warps = min(MOST_WARPS, max(1, padded_keys * padded_values // NUMBERS_A_WARP))
    _correct[(rows, heads)](
        qkv_BE, z_BHV, b_BH, a_BH, dt_bias_H, A_log_H, norm_weight_V, memory_BHKV, y, keys**-0.5, eps,
        qkv_row=qkv_BE.shape[1], z_row=z_BHV.stride(0), b_row=b_BH.stride(0), a_row=a_BH.stride(0),
        H=heads, K=keys, V=values, KEYS=padded_keys, VALUES=padded_values,
        STRENGTH=2.0 if negative_eigenvalues else 1.0, num_warps=warps,
    )  # fmt: skip
    return y
