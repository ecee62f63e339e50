"""SwiGLU's product, `silu(gate) * up` of two halves side by side, with a backward of its own where kernels serve.

Shapes: F hidden width.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from longspan.ops import kernels


def swiglu(hidden: Tensor) -> Tensor:
    """(..., F), of (..., 2 F): first the gates, then what they let through. The kernel rounds once, in the end."""
    if hidden.shape[-1] <= 2 * kernels.WIDEST_ROW and kernels.serve(hidden):
        from longspan.ops.triton.swiglu import swiglu as kernel

        product: Tensor = kernels.called(kernel)(hidden)
        return product
    gate, up = hidden.chunk(2, dim=-1)
    return F.silu(gate) * up
