"""Convolution, scan and gated norm of a Mamba-2 layer in one step, where kernels serve; elsewhere the ops one by one.

Shapes: B rows, T tokens, M = B * T, E = H * P inner width, H heads, P head dim, N state, K = 2 E + 2 N + H, W taps.
"""

from __future__ import annotations

import torch
from torch import Tensor

from longspan.ops import kernels
from longspan.ops.causal_conv import LARGEST_KERNEL_TAPS
from longspan.ops.ssd import LARGEST_KERNEL_SIZE


def serves(x_BTD: Tensor, inner: int, taps: int, head_dim: int, state: int) -> bool:
    """Whether `between_projections` can run for a layer of `x`: where kernels are chosen, over more than one token, at
    these sizes."""
    fits = taps <= LARGEST_KERNEL_TAPS and max(head_dim, state) <= LARGEST_KERNEL_SIZE and inner <= kernels.WIDEST_ROW
    return fits and x_BTD.shape[1] > 1 and kernels.serve(x_BTD)


def between_projections(
    projected_MK: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor,
    dt_bias_H: Tensor,
    A_log_H: Tensor,
    D_H: Tensor,
    norm_weight_E: Tensor,
    *,
    doc_BT: Tensor | None,
    rows: int,
    state: int,
    eps: float,
) -> Tensor:
    """`norm(ssd(silu(conv(xBC))), z)` of rows that start here; see `causal_conv`, `ssd` and `GatedRMSNorm`.

    Args:
        projected_MK: z, x, B, C, dt side by side, as `in_proj` gives them; dt before its bias and softplus.
        conv_weight: (E + 2 N, W).
        conv_bias: (E + 2 N,).
        dt_bias_H: of the step sizes.
        A_log_H: A = -exp(A_log).
        D_H: skip weights.
        norm_weight_E: of the gated norm.
        doc_BT: document ids; None: one document.
        rows: B.
        state: N.
        eps: of the gated norm.

    Returns:
        (M, E) in the dtype of `projected`.
    """
    from longspan.ops.triton.mamba2 import mamba2

    A_H = -torch.exp(A_log_H.float())
    y_ME: Tensor
    parameters = (conv_weight, conv_bias, dt_bias_H.float(), A_H, D_H.float(), norm_weight_E)
    y_ME, *_ = mamba2(projected_MK, *parameters, doc_BT, rows, state, eps)
    return y_ME


def read_between_projections(
    projected_BTK: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor,
    dt_bias_H: Tensor,
    A_log_H: Tensor,
    D_H: Tensor,
    norm_weight_E: Tensor,
    *,
    doc_BT: Tensor | None,
    state: int,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """`between_projections` without gradients, and the state (B, H, P, N) after the last token, fp32.

    Its kernels are called past torch's dispatcher: a prompt of a thousand tokens would wait for the host otherwise.
    """
    from longspan.ops.triton import causal_conv, rms_norm
    from longspan.ops.triton import ssd_launches as scan

    heads, inner = A_log_H.shape[0], norm_weight_E.shape[0]
    z, xBC, dt = projected_BTK.split_with_sizes([inner, inner + 2 * state, heads], -1)
    xBC = causal_conv.run_forward(xBC, conv_weight, conv_bias, doc_BT, True)
    x, B, C = xBC.split_with_sizes([inner, state, state], -1)
    x, B, C = x.view(*x.shape[:2], heads, -1), B.unsqueeze(2), C.unsqueeze(2)
    A_H, D_H, dt_bias_H = -torch.exp(A_log_H.float()), D_H.float(), dt_bias_H.float()
    y, final_BHPN, _ = scan.run_forward(scan.Inputs(x, dt, A_H, B, C, D_H, dt_bias_H, doc_BT, None, None))
    return rms_norm.run_forward(y.flatten(2), z, norm_weight_E, eps, y.dtype), final_BHPN
