"""The gate of a SwiGLU MLP between its two products.

Shapes: F hidden width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from longspan.ops import kernels


def swiglu(hidden_2F: Tensor) -> Tensor:
    """`silu(gate) * up` of (..., 2 F), gate first: (..., F) in the same dtype.

    Where gradients are recorded it is plain torch, which a compiler fuses in training.
    """
    if not torch.is_grad_enabled() and not torch.compiler.is_compiling() and kernels.serve(hidden_2F):
        from longspan.ops.triton.swiglu import run_swiglu

        return run_swiglu(hidden_2F)
    gate, up = hidden_2F.chunk(2, dim=-1)
    return F.silu(gate) * up
