"""The gated delta rule: a linear recurrence per head that decays, then corrects what it remembers of a key.

Shapes: B batch, T time, H heads, K key dim, V value dim.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from longspan.foundation.errors import UserError
from longspan.ops import kernels
from longspan.ops.gated_delta_chunked import gated_delta_chunked, normalise

Backend = Literal["chunked", "reference"]
# Wider keys would not fit the registers of a kernel's program; values are cut into tiles.
LARGEST_KERNEL_KEY = 128


def gated_delta(
    q_BTHK: Tensor,
    k_BTHK: Tensor,
    v_BTHV: Tensor,
    g_BTH: Tensor,
    beta_BTH: Tensor,
    *,
    doc_BT: Tensor | None = None,
    initial_state_BHKV: Tensor | None = None,
    initial_doc_B: Tensor | None = None,
    chunk: int = 64,
    backend: Backend = "chunked",
) -> tuple[Tensor, Tensor]:
    """Runs `S[t] = e^g[t] S[t-1] + k[t] u[t]^T`, `u[t] = beta[t] (v[t] - e^g[t] S[t-1]^T k[t])`, `o[t] = S[t]^T q[t]`.

    S = 0 before every document. q and k count as `z / sqrt(|z|^2 + 1e-6)`, and q then as q / sqrt(K): with keys of
    length 1 and beta in [0, 2] no state grows by itself.

    Source: Yang, Kautz & Hatamizadeh 2024 (Gated DeltaNet), equation 10; `fla/layers/gated_deltanet.py`.

    Args:
        q_BTHK: queries, T >= 1.
        k_BTHK: keys.
        v_BTHV: values.
        g_BTH: logarithm of the decay, 0 or below, fp32.
        beta_BTH: how much of the error at a key is corrected, fp32.
        doc_BT: document ids; a document is a run of equal ids. None: one document.
        initial_state_BHKV: state before the first token; None: zeros.
        initial_doc_B: document of the initial state, which counts only while `doc_BT` stays equal to it from the first
            token on. None: the initial state belongs to the document of the first token.
        chunk: tokens per chunk of the matmul form in plain torch; the kernel has its own.
        backend: "chunked" (matmuls, for training and prefill) or "reference" (a Python loop over tokens). Where
            `ops.kernels` says so, "chunked" is a Triton kernel; it serves q, k and v of one dtype (fp32 or bf16) with
            K up to 128, all else stays plain torch.

    Returns:
        o (B, T, H, V) in the dtype of v, and the state after the last token (B, H, K, V) in fp32 (fp64 for fp64 input).

    Raises:
        UserError: shapes that do not fit, a chunk below 1, an unknown backend, or (T > 1, on CPU, not compiled) a
            positive g.
    """
    _check(q_BTHK, k_BTHK, v_BTHV, g_BTH, beta_BTH, chunk, backend)
    arguments = (q_BTHK, k_BTHK, v_BTHV, g_BTH, beta_BTH, doc_BT, initial_state_BHKV, initial_doc_B)
    if backend == "reference":
        return _reference(*arguments)
    if v_BTHV.shape[1] == 1:
        return _step(*arguments)
    if _has_kernel(q_BTHK, k_BTHK, v_BTHV):
        from longspan.ops.triton.gated_delta import gated_delta as kernel

        o_BTHV, state_BHKV, *_ = kernels.called(kernel)(*arguments)
        return o_BTHV, state_BHKV
    return gated_delta_chunked(*arguments, chunk)


def _has_kernel(q_BTHK: Tensor, k_BTHK: Tensor, v_BTHV: Tensor) -> bool:
    fits = k_BTHK.shape[3] <= LARGEST_KERNEL_KEY and q_BTHK.dtype == k_BTHK.dtype == v_BTHV.dtype
    return fits and kernels.serve(v_BTHV)


def _check(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, chunk: int, backend: str) -> None:
    time = v.shape[1]
    if backend not in ("chunked", "reference"):
        raise UserError(f"gated_delta backend {backend!r}", "'chunked' or 'reference'", "name one of the two")
    if chunk < 1 or time < 1:
        given = f"gated_delta over {time} tokens in chunks of {chunk}"
        raise UserError(given, "at least 1 of each", "raise it to 1 or more")
    if q.shape != k.shape or not (q.shape[:3] == v.shape[:3] == g.shape == beta.shape):
        shapes = ", ".join(str(tuple(z.shape)) for z in (q, k, v, g, beta))
        allowed = "(B,T,H,K), (B,T,H,K), (B,T,H,V), (B,T,H), (B,T,H)"
        raise UserError(f"q, k, v, g, beta of shapes {shapes}", allowed, "align them")
    # One token is the decode step, where reading g would cost as much as using it; a compiler reads no values.
    if time > 1 and not g.is_cuda and not torch.compiler.is_compiling() and bool((g > 0).any()):
        raise UserError(f"a log decay g of {float(g.max()):g}", "0 or below", "pass -exp(A_log) * softplus(..)")


def gated_delta_step(
    q_BHK: Tensor,
    k_BHK: Tensor,
    v_BHV: Tensor,
    g_BH: Tensor,
    beta_BH: Tensor,
    state_BHKV: Tensor,
    *,
    overwrite: bool = False,
) -> tuple[Tensor, Tensor]:
    """One token of `gated_delta`, all in fp32 (or all in fp64): one product reads the old state for query and key.

    Returns:
        o (B, H, V) and the state after the token: `state_BHKV` itself (contiguous, without gradient) where it is to be
        overwritten; else it is left as it was.
    """
    batch, heads, key_dim = k_BHK.shape
    q_b1K, k_b1K = (normalise(z)[0].reshape(batch * heads, 1, key_dim) for z in (q_BHK, k_BHK))
    q_b1K = q_b1K * key_dim**-0.5
    decay_b11 = g_BH.exp().reshape(-1, 1, 1)
    old_bKV = state_BHKV.reshape(batch * heads, key_dim, -1)
    state_bKV = old_bKV.mul_(decay_b11) if overwrite else old_bKV * decay_b11
    read_b2V = torch.bmm(torch.cat((q_b1K, k_b1K), dim=1), state_bKV)
    u_b1V = (v_BHV.reshape(batch * heads, 1, -1) - read_b2V[:, 1:]) * beta_BH.reshape(-1, 1, 1)
    o_b1V = torch.baddbmm(read_b2V[:, :1], torch.bmm(q_b1K, k_b1K.mT), u_b1V)
    added = torch.Tensor.baddbmm_ if overwrite else torch.baddbmm
    new_bKV = added(state_bKV, k_b1K.mT, u_b1V)
    return o_b1V.view(v_BHV.shape), state_BHKV if overwrite else new_bKV.view(state_BHKV.shape)


def _step(
    q_B1HK: Tensor,
    k_B1HK: Tensor,
    v_B1HV: Tensor,
    g_B1H: Tensor,
    beta_B1H: Tensor,
    doc_B1: Tensor | None,
    state_BHKV: Tensor | None,
    initial_doc_B: Tensor | None,
) -> tuple[Tensor, Tensor]:
    compute = torch.float64 if v_B1HV.dtype == torch.float64 else torch.float32
    q, k, v, g, beta = (z[:, 0].to(compute) for z in (q_B1HK, k_B1HK, v_B1HV, g_B1H, beta_B1H))
    if state_BHKV is None:
        state_BHKV = v.new_zeros(*k.shape, v.shape[-1])
    elif doc_B1 is not None and initial_doc_B is not None:
        state_BHKV = state_BHKV.masked_fill((doc_B1[:, 0] != initial_doc_B)[:, None, None, None], 0.0)
    o, state = gated_delta_step(q, k, v, g, beta, state_BHKV.to(compute))
    return o[:, None].to(v_B1HV.dtype), state


def _reference(
    q_BTHK: Tensor,
    k_BTHK: Tensor,
    v_BTHV: Tensor,
    g_BTH: Tensor,
    beta_BTH: Tensor,
    doc_BT: Tensor | None,
    state_BHKV: Tensor | None,
    initial_doc_B: Tensor | None,
) -> tuple[Tensor, Tensor]:
    compute = torch.float64 if v_BTHV.dtype == torch.float64 else torch.float32
    q, k, v, g, beta = (z.to(compute) for z in (q_BTHK, k_BTHK, v_BTHV, g_BTH, beta_BTH))
    q, k = (z / (z.square().sum(-1, keepdim=True) + 1e-6).sqrt() for z in (q, k))
    q = q / q.shape[-1] ** 0.5
    batch, time, heads, key_dim = k.shape
    state = v.new_zeros(batch, heads, key_dim, v.shape[-1]) if state_BHKV is None else state_BHKV.to(compute)
    outputs = []
    for t in range(time):
        previous = initial_doc_B if t == 0 else None if doc_BT is None else doc_BT[:, t - 1]
        if doc_BT is not None and previous is not None:
            state = state.masked_fill((doc_BT[:, t] != previous)[:, None, None, None], 0.0)
        state = state * g[:, t, :, None, None].exp()
        error = v[:, t] - (state * k[:, t, :, :, None]).sum(2)
        state = state + k[:, t, :, :, None] * (beta[:, t, :, None] * error)[:, :, None]
        outputs.append((state * q[:, t, :, :, None]).sum(2))
    return torch.stack(outputs, dim=1).to(v_BTHV.dtype), state
