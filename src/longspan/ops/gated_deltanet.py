"""All that lies between the projections of a Gated DeltaNet layer in one step, where kernels serve.

Shapes: B rows, T tokens, M = B * T, H heads, K key dim, V value dim, E = 2 H K + H V convolved channels, P projected
columns, W taps.
"""

from __future__ import annotations

import torch
from torch import Tensor

from longspan.ops import kernels
from longspan.ops.causal_conv import LARGEST_KERNEL_TAPS
from longspan.ops.gated_delta import LARGEST_KERNEL_KEY

# A program of the norm holds a few heads in its registers.
LARGEST_KERNEL_VALUE = 1024


def serves(x_BTD: Tensor, taps: int, key_dim: int, value_dim: int) -> bool:
    """Whether `between_projections` can run for a layer of `x`: where kernels are chosen, over more than one token, at
    these sizes."""
    fits = taps <= LARGEST_KERNEL_TAPS and key_dim <= LARGEST_KERNEL_KEY and value_dim <= LARGEST_KERNEL_VALUE
    return fits and x_BTD.shape[1] > 1 and kernels.serve(x_BTD)


def between_projections(
    projected_MP: Tensor,
    conv_weight: Tensor,
    dt_bias_H: Tensor,
    A_log_H: Tensor,
    norm_weight_V: Tensor,
    *,
    doc_BT: Tensor | None,
    rows: int,
    eps: float,
    negative_eigenvalues: bool,
) -> Tensor:
    """`norm(gated_delta(silu(conv(q k v)), b, a)) * silu(z)` of rows that start here; see `causal_conv`, `gated_delta`.

    Args:
        projected_MP: q, k, v, z, b, a side by side, as `in_proj` gives them, before any activation; columns after them
            are not read.
        conv_weight: (E, W), of a convolution without bias.
        dt_bias_H: of the step sizes.
        A_log_H: the log decay is -exp(A_log) softplus(a + dt_bias).
        norm_weight_V: of the norm over each head.
        doc_BT: document ids; None: one document.
        rows: B.
        eps: of the norm.
        negative_eigenvalues: corrections are twice as strong.

    Returns:
        (M, H * V) in the dtype of `projected`.
    """
    from longspan.ops.triton.gated_deltanet import gated_deltanet

    parameters = (conv_weight, dt_bias_H.float(), -torch.exp(A_log_H.float()), norm_weight_V)
    y: Tensor
    y, *_ = kernels.called(gated_deltanet)(
        projected_MP, *parameters, doc_BT, rows, 2.0 if negative_eigenvalues else 1.0, eps
    )
    return y
