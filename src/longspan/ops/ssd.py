"""The Mamba-2 state-space scan (SSD): a linear recurrence per head that forgets at document boundaries.

Shapes: B batch, T time, H heads, P head dim, G groups of heads that share B and C, N state.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from longspan.foundation.errors import UserError
from longspan.ops import kernels
from longspan.ops.ssd_chunked import ssd_chunked

Backend = Literal["chunked", "reference"]
# Wider heads or states would not fit the registers of a kernel's program.
LARGEST_KERNEL_SIZE = 128


def ssd(
    x_BTHP: Tensor,
    dt_BTH: Tensor,
    A_H: Tensor,
    B_BTGN: Tensor,
    C_BTGN: Tensor,
    D_H: Tensor,
    *,
    doc_BT: Tensor | None = None,
    initial_state_BHPN: Tensor | None = None,
    initial_doc_B: Tensor | None = None,
    chunk: int = 64,
    backend: Backend = "chunked",
) -> tuple[Tensor, Tensor]:
    """Runs `h[t] = exp(dt[t] A) h[t-1] + dt[t] x[t] B[t]^T`, `y[t] = h[t] C[t] + D x[t]`, h = 0 before every document.

    Source: Dao & Gu 2024 (Mamba-2), section 6; `mamba_ssm/modules/ssd_minimal.py` for one document.

    Args:
        x_BTHP: inputs, T >= 1.
        dt_BTH: step sizes after softplus, fp32.
        A_H: negative decay rates, fp32.
        B_BTGN: input projections; head h uses group h // (H/G).
        C_BTGN: output projections.
        D_H: skip weights.
        doc_BT: document ids; a document is a run of equal ids. None: one document.
        initial_state_BHPN: state before the first token; None: zeros.
        initial_doc_B: document of the initial state, which counts only while `doc_BT` stays equal to it from the first
            token on. None: the initial state belongs to the document of the first token.
        chunk: tokens per chunk of the matmul form in plain torch; the kernel has its own.
        backend: "chunked" (matmuls, for training and prefill) or "reference" (a Python loop over tokens). Where
            `ops.kernels` says so, "chunked" is a Triton kernel; it serves x, B and C of one dtype (fp32 or bf16) with P
            and N up to 128, all else stays plain torch.

    Returns:
        y (B, T, H, P) in the dtype of x, and the state after the last token (B, H, P, N) in fp32 (fp64 for fp64 input).

    Raises:
        UserError: shapes that do not fit, a chunk below 1, an unknown backend, or (T > 1, on CPU) a positive A.
    """
    _check(x_BTHP, dt_BTH, A_H, B_BTGN, C_BTGN, chunk, backend)
    arguments = (x_BTHP, dt_BTH, A_H, B_BTGN, C_BTGN, D_H, doc_BT, initial_state_BHPN, initial_doc_B)
    if backend == "reference":
        return _reference(*arguments)
    if x_BTHP.shape[1] == 1:
        return _step(*arguments)
    if _has_kernel(x_BTHP, B_BTGN, C_BTGN):
        from longspan.ops.triton.ssd import ssd as kernel

        y_BTHP, state_BHPN, *_ = kernels.called(kernel)(*arguments)
        return y_BTHP, state_BHPN
    return ssd_chunked(*arguments, chunk)


def _has_kernel(x_BTHP: Tensor, B_BTGN: Tensor, C_BTGN: Tensor) -> bool:
    fits = max(x_BTHP.shape[3], B_BTGN.shape[3]) <= LARGEST_KERNEL_SIZE
    return fits and x_BTHP.dtype == B_BTGN.dtype == C_BTGN.dtype and kernels.serve(x_BTHP)


def _check(
    x_BTHP: Tensor, dt_BTH: Tensor, A_H: Tensor, B_BTGN: Tensor, C_BTGN: Tensor, chunk: int, backend: str
) -> None:
    batch, time, heads, _ = x_BTHP.shape
    groups = B_BTGN.shape[2]
    if backend not in ("chunked", "reference"):
        raise UserError(f"ssd backend {backend!r}", "'chunked' or 'reference'", "name one of the two")
    if chunk < 1 or time < 1:
        raise UserError(f"ssd over {time} tokens in chunks of {chunk}", "at least 1 of each", "raise it to 1 or more")
    # One token is the decode step, where reading A would cost as much as using it.
    if time > 1 and not A_H.is_cuda and bool((A_H > 0).any()):
        raise UserError(f"a decay rate A of {float(A_H.max()):g}", "0 or below", "pass -exp(A_log)")
    if heads % groups:
        raise UserError(f"{heads} heads in {groups} groups", "a number of groups that divides the heads", "use 1 group")
    if dt_BTH.shape != (batch, time, heads) or B_BTGN.shape != C_BTGN.shape or B_BTGN.shape[:2] != (batch, time):
        shapes = ", ".join(str(tuple(z.shape)) for z in (x_BTHP, dt_BTH, B_BTGN, C_BTGN))
        raise UserError(f"x, dt, B, C of shapes {shapes}", "(B,T,H,P), (B,T,H), (B,T,G,N), (B,T,G,N)", "align them")


def ssd_step(
    x_BHP: Tensor, dt_BH: Tensor, A_H: Tensor, B_BGN: Tensor, C_BGN: Tensor, D_H: Tensor, state_BHPN: Tensor
) -> tuple[Tensor, Tensor]:
    """One token of `ssd`, all in fp32 (or all in fp64): two passes over the state, and one product that reads it.

    Returns:
        y (B, H, P) and the state after the token; `state_BHPN` is left as it was.
    """
    batch, groups, size = B_BGN.shape
    driving_BHP = x_BHP * dt_BH.unsqueeze(-1)
    decayed = state_BHPN * torch.exp(dt_BH * A_H).unsqueeze(-1).unsqueeze(-1)
    state_bRN = decayed.view(batch * groups, -1, size)
    rows = state_bRN.shape[1]
    state_bRN.addcmul_(driving_BHP.view(-1, rows, 1), B_BGN.reshape(-1, 1, size))
    read = torch.bmm(state_bRN, C_BGN.reshape(-1, size, 1)).view(x_BHP.shape)
    return torch.addcmul(read, x_BHP, D_H.unsqueeze(-1)), decayed


def _step(
    x_B1HP: Tensor,
    dt_B1H: Tensor,
    A_H: Tensor,
    B_B1GN: Tensor,
    C_B1GN: Tensor,
    D_H: Tensor,
    doc_B1: Tensor | None,
    state_BHPN: Tensor | None,
    initial_doc_B: Tensor | None,
) -> tuple[Tensor, Tensor]:
    compute = torch.float64 if x_B1HP.dtype == torch.float64 else torch.float32
    x, dt, B, C = (z[:, 0].to(compute) for z in (x_B1HP, dt_B1H, B_B1GN, C_B1GN))
    if state_BHPN is None:
        state_BHPN = x.new_zeros(*x.shape, B.shape[-1])
    elif doc_B1 is not None and initial_doc_B is not None:
        state_BHPN = state_BHPN.masked_fill((doc_B1[:, 0] != initial_doc_B)[:, None, None, None], 0.0)
    y, state = ssd_step(x, dt, A_H.to(compute), B, C, D_H.to(compute), state_BHPN.to(compute))
    return y[:, None].to(x_B1HP.dtype), state


def _reference(
    x_BTHP: Tensor,
    dt_BTH: Tensor,
    A_H: Tensor,
    B_BTGN: Tensor,
    C_BTGN: Tensor,
    D_H: Tensor,
    doc_BT: Tensor | None,
    state_BHPN: Tensor | None,
    initial_doc_B: Tensor | None,
) -> tuple[Tensor, Tensor]:
    batch, time, heads, head_dim = x_BTHP.shape
    compute = torch.float64 if x_BTHP.dtype == torch.float64 else torch.float32
    repeat = heads // B_BTGN.shape[2]
    x, dt, A, D = (z.to(compute) for z in (x_BTHP, dt_BTH, A_H, D_H))
    B_BTHN, C_BTHN = (z.to(compute).repeat_interleave(repeat, dim=2) for z in (B_BTGN, C_BTGN))
    state = x.new_zeros(batch, heads, head_dim, B_BTGN.shape[3]) if state_BHPN is None else state_BHPN.to(compute)
    outputs = []
    for t in range(time):
        previous = initial_doc_B if t == 0 else None if doc_BT is None else doc_BT[:, t - 1]
        if doc_BT is not None and previous is not None:
            state = state.masked_fill((doc_BT[:, t] != previous)[:, None, None, None], 0.0)
        decay_BH = (dt[:, t] * A).exp()
        drive = (dt[:, t, :, None] * x[:, t])[..., None] * B_BTHN[:, t, :, None]
        state = decay_BH[..., None, None] * state + drive
        outputs.append((state * C_BTHN[:, t, :, None]).sum(-1) + D[:, None] * x[:, t])
    return torch.stack(outputs, dim=1).to(x_BTHP.dtype), state
