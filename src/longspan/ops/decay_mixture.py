"""A weighted sum of decays per token and channel that never holds one value per token, channel and feature.

Shapes: B batch, T time, D channels, N features; t tokens of a tile.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from longspan.foundation.errors import UserError
from longspan.ops.compiling import never_compiled

FLOOR = 1e-6
CACHED_ELEMENTS, MOST_ELEMENTS = 1 << 19, 1 << 27


@never_compiled
def decay_mixture(weight_BTN: Tensor, delta_BT: Tensor, A_DN: Tensor) -> Tensor:
    """Computes `y[t, d] = sum_n weight[t, n] * max(exp(delta[t] * A[d, n]), 1e-6)`.

    Args:
        weight_BTN: weights of the features.
        delta_BT: step sizes, 0 or above.
        A_DN: decay rates, 0 or below.

    Returns:
        y (B, T, D) in fp32 (fp64 for fp64 weights).

    Raises:
        UserError: shapes that do not fit.
    """
    if weight_BTN.shape[:2] != delta_BT.shape or weight_BTN.shape[-1] != A_DN.shape[-1]:
        shapes = ", ".join(str(tuple(z.shape)) for z in (weight_BTN, delta_BT, A_DN))
        raise UserError(f"weight, delta, A of shapes {shapes}", "(B,T,N), (B,T), (D,N)", "align them")
    dtype = torch.float64 if weight_BTN.dtype == torch.float64 else torch.float32
    weight, delta, A = weight_BTN.to(dtype).flatten(0, 1), delta_BT.to(dtype).flatten(), A_DN.to(dtype).T
    y: Tensor = _Mixture.apply(weight, delta, A.contiguous())  # type: ignore[no-untyped-call]
    return y.view(*delta_BT.shape, -1)


def _tiles(num_tokens: int, A_ND: Tensor) -> Iterator[slice]:
    """What stays in cache on a CPU, what fits memory elsewhere."""
    elements = CACHED_ELEMENTS if A_ND.device.type == "cpu" else MOST_ELEMENTS
    step = max(1, elements // A_ND.numel())
    for start in range(0, num_tokens, step):
        yield slice(start, min(start + step, num_tokens))


def _decays(delta_t: Tensor, rates_ND: Tensor, floored: bool) -> Tensor:
    """(t, N, D). Powers of two: on a CPU they cost a third of exponentials."""
    decays = (delta_t[:, None, None] * rates_ND).exp2_()
    return decays.clamp_(FLOOR, 1.0) if floored else decays


class _Mixture(torch.autograd.Function):
    """Keeps its inputs and computes the decays again in the backward."""

    @staticmethod
    def forward(ctx: Any, weight_tN: Tensor, delta_t: Tensor, A_ND: Tensor) -> Tensor:
        # Nothing reaches the floor in common use; on a GPU even asking would wait.
        ctx.floored = A_ND.device.type != "cpu" or float(delta_t.max() * A_ND.min()) < math.log(FLOOR)
        ctx.save_for_backward(weight_tN, delta_t, A_ND)
        y = weight_tN.new_empty(weight_tN.shape[0], A_ND.shape[1])
        rates_ND = A_ND * math.log2(math.e)
        for t in _tiles(len(y), A_ND):
            torch.bmm(weight_tN[t, None], _decays(delta_t[t], rates_ND, ctx.floored), out=y[t, None])
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_tD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        weight_tN, delta_t, A_ND = ctx.saved_tensors
        dweight, ddelta = torch.empty_like(weight_tN), torch.empty_like(delta_t)
        dA_N1D = torch.zeros_like(A_ND).unsqueeze(1)
        rates_ND = A_ND * math.log2(math.e)
        for t in _tiles(len(dy_tD), A_ND):
            decays = _decays(delta_t[t], rates_ND, ctx.floored)
            dweight[t] = torch.bmm(decays, dy_tD[t, :, None]).squeeze(-1)
            if ctx.floored:
                # What is held by the floor has no slope.
                decays.mul_(decays > FLOOR)
            decays.mul_(dy_tD[t, None])
            scaled_Nt = (weight_tN[t] * delta_t[t, None]).T
            dA_N1D.baddbmm_(scaled_Nt.unsqueeze(1), decays.transpose(0, 1))
            ddelta[t] = (decays.mul_(A_ND).sum(-1) * weight_tN[t]).sum(-1)
        return dweight, ddelta, dA_N1D.squeeze(1)
