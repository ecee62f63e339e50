"""The selective scan of Mamba-1: a linear recurrence per channel that forgets at document boundaries.

Shapes: B batch, T time, E channels, N state.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from longspan.foundation.errors import UserError
from longspan.ops import kernels
from longspan.ops.selective_scan_chunked import document_starts, selective_scan_chunked

Backend = Literal["chunked", "reference"]
# The states of one channel have to fit the registers of a kernel's program, which is one warp.
LARGEST_KERNEL_STATE = 64


def selective_scan(
    x_BTE: Tensor,
    dt_BTE: Tensor,
    A_EN: Tensor,
    B_BTN: Tensor,
    C_BTN: Tensor,
    D_E: Tensor,
    *,
    doc_BT: Tensor | None = None,
    initial_state_BNE: Tensor | None = None,
    initial_doc_B: Tensor | None = None,
    chunk: int = 32,
    backend: Backend = "chunked",
) -> tuple[Tensor, Tensor]:
    """Runs `h[t] = exp(dt[t] A) h[t-1] + dt[t] x[t] B[t]`, `y[t] = h[t] C[t] + D x[t]`, h = 0 before every document.

    Source: Gu & Dao 2023 (Mamba), algorithm 2; `selective_scan_ref` of mamba_ssm for one document, without its gate.

    Args:
        x_BTE: inputs, T >= 1.
        dt_BTE: step sizes after softplus, fp32.
        A_EN: negative decay rates, fp32.
        B_BTN: input projections, shared by all channels.
        C_BTN: output projections.
        D_E: skip weights.
        doc_BT: document ids; a document is a run of equal ids. None: one document.
        initial_state_BNE: state before the first token; None: zeros.
        initial_doc_B: document of the initial state, which counts only while `doc_BT` stays equal to it from the first
            token on. None: the initial state belongs to the document of the first token.
        chunk: tokens per chunk of the chunked form; one state per chunk is kept for the backward. A kernel has its own.
        backend: "chunked" (for training and prefill) or "reference" (a Python loop over tokens). Where `ops.kernels`
            says so, "chunked" is a Triton kernel; it serves fp32 and bf16 with N up to 64, all else stays plain torch.

    Returns:
        y (B, T, E) in the dtype of x, and the state after the last token (B, N, E) in fp32 (fp64 for fp64 input).

    Raises:
        UserError: shapes that do not fit, a chunk below 1, an unknown backend, or (T > 1, on CPU) a positive A.
    """
    _check(x_BTE, dt_BTE, A_EN, B_BTN, C_BTN, chunk, backend)
    arguments = (x_BTE, dt_BTE, A_EN, B_BTN, C_BTN, D_E, doc_BT, initial_state_BNE, initial_doc_B)
    if backend == "reference":
        return _reference(*arguments)
    if x_BTE.shape[1] == 1:
        return _step(*arguments)
    if A_EN.shape[1] <= LARGEST_KERNEL_STATE and kernels.serve(x_BTE):
        from longspan.ops.triton.selective_scan import selective_scan as kernel

        starts_BT = document_starts(doc_BT, initial_doc_B)
        y_BTE, state_BNE, _ = kernels.called(kernel)(
            x_BTE, dt_BTE, A_EN, B_BTN, C_BTN, D_E, starts_BT, initial_state_BNE
        )
        return y_BTE, state_BNE
    return selective_scan_chunked(*arguments, chunk)


def _check(x_BTE: Tensor, dt_BTE: Tensor, A_EN: Tensor, B_BTN: Tensor, C_BTN: Tensor, chunk: int, backend: str) -> None:
    batch, time, channels = x_BTE.shape
    if backend not in ("chunked", "reference"):
        raise UserError(f"selective scan backend {backend!r}", "'chunked' or 'reference'", "name one of the two")
    if chunk < 1 or time < 1:
        given = f"a selective scan over {time} tokens in chunks of {chunk}"
        raise UserError(given, "at least 1 of each", "raise it to 1 or more")
    # One token is the decode step, where reading A would cost as much as using it.
    if time > 1 and not torch.compiler.is_compiling() and not A_EN.is_cuda and bool((A_EN > 0).any()):
        raise UserError(f"a decay rate A of {float(A_EN.max()):g}", "0 or below", "pass -exp(A_log)")
    projected = (batch, time, A_EN.shape[1])
    if dt_BTE.shape != x_BTE.shape or A_EN.shape[0] != channels or not B_BTN.shape == C_BTN.shape == projected:
        shapes = ", ".join(str(tuple(z.shape)) for z in (x_BTE, dt_BTE, A_EN, B_BTN, C_BTN))
        raise UserError(f"x, dt, A, B, C of shapes {shapes}", "(B,T,E), (B,T,E), (E,N), (B,T,N), (B,T,N)", "align them")


def selective_scan_step(
    x_BE: Tensor, dt_BE: Tensor, A_NE: Tensor, B_BN: Tensor, C_BN: Tensor, D_E: Tensor, state_BNE: Tensor
) -> tuple[Tensor, Tensor]:
    """One token of `selective_scan`, all in fp32 (or all in fp64), with A transposed.

    Returns:
        y (B, E) and the state after the token; `state_BNE` is left as it was.
    """
    decay_BNE = (dt_BE.unsqueeze(1) * A_NE).exp_()
    state = (decay_BNE * state_BNE).addcmul_((x_BE * dt_BE).unsqueeze(1), B_BN.unsqueeze(2))
    y_BE = torch.bmm(C_BN.unsqueeze(1), state).squeeze(1)
    return torch.addcmul(y_BE, x_BE, D_E), state


def _step(
    x_B1E: Tensor,
    dt_B1E: Tensor,
    A_EN: Tensor,
    B_B1N: Tensor,
    C_B1N: Tensor,
    D_E: Tensor,
    doc_B1: Tensor | None,
    state_BNE: Tensor | None,
    initial_doc_B: Tensor | None,
) -> tuple[Tensor, Tensor]:
    compute = torch.float64 if x_B1E.dtype == torch.float64 else torch.float32
    x, dt, B, C = (z[:, 0].to(compute) for z in (x_B1E, dt_B1E, B_B1N, C_B1N))
    if state_BNE is None:
        state_BNE = x.new_zeros(x.shape[0], B.shape[1], x.shape[1])
    elif doc_B1 is not None and initial_doc_B is not None:
        state_BNE = state_BNE.masked_fill((doc_B1[:, 0] != initial_doc_B)[:, None, None], 0.0)
    y, state = selective_scan_step(x, dt, A_EN.to(compute).T, B, C, D_E.to(compute), state_BNE.to(compute))
    return y[:, None].to(x_B1E.dtype), state


def _reference(
    x_BTE: Tensor,
    dt_BTE: Tensor,
    A_EN: Tensor,
    B_BTN: Tensor,
    C_BTN: Tensor,
    D_E: Tensor,
    doc_BT: Tensor | None,
    state_BNE: Tensor | None,
    initial_doc_B: Tensor | None,
) -> tuple[Tensor, Tensor]:
    compute = torch.float64 if x_BTE.dtype == torch.float64 else torch.float32
    x, dt, A, B, C, D = (z.to(compute) for z in (x_BTE, dt_BTE, A_EN, B_BTN, C_BTN, D_E))
    batch, time, channels = x.shape
    state = x.new_zeros(batch, A.shape[1], channels) if state_BNE is None else state_BNE.to(compute)
    starts_BT = document_starts(doc_BT, initial_doc_B)
    outputs = []
    for t in range(time):
        if starts_BT is not None:
            state = state.masked_fill(starts_BT[:, t, None, None], 0.0)
        decay_BNE = (dt[:, t, None] * A.T).exp()
        state = decay_BNE * state + (dt[:, t] * x[:, t])[:, None] * B[:, t, :, None]
        outputs.append((state * C[:, t, :, None]).sum(1) + D * x[:, t])
    return torch.stack(outputs, dim=1).to(x_BTE.dtype), state
