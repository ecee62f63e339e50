"""Rows of an embedding, whose gradient is summed token by token where kernels serve.

Shapes: N tokens in any arrangement, D width, V vocabulary.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from longspan.ops import kernels

# Torch's own sort of fewer places is as fast as anything here.
FEWEST_PLACES = 1024


def embedding(tokens: Tensor, weight_VD: Tensor) -> Tensor:
    """`weight[tokens]`, (..., D).

    Args:
        tokens: integer, any shape, below V.
        weight_VD: fp32 or bf16 where its gradient is a kernel's; any dtype elsewhere.
    """
    trained = torch.is_grad_enabled() and weight_VD.requires_grad
    if trained and tokens.numel() >= FEWEST_PLACES and kernels.serve(weight_VD):
        from longspan.ops.triton.embedding import embedding as kernel

        rows: Tensor = kernel(tokens, weight_VD)
        return rows
    return F.embedding(tokens, weight_VD)
