"""The Mamba-2 scan (SSD) on CUDA, made known to autograd and the compiler.

Shapes: B rows, T tokens, H heads, P head dim, G groups of heads that share B and C, N state.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from longspan.ops.triton.ssd_launches import Gradients, Inputs, Kept, forward_like, run_backward, run_forward


@torch.library.custom_op("longspan::ssd", mutates_args=())
def ssd(
    x_BTHP: Tensor,
    dt_BTH: Tensor,
    A_H: Tensor,
    B_BTGN: Tensor,
    C_BTGN: Tensor,
    D_H: Tensor,
    doc_BT: Tensor | None,
    initial_BHPN: Tensor | None,
    initial_doc_B: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`ops.ssd.ssd`; the third result and what follows it are for the backward."""
    inputs = Inputs(x_BTHP, dt_BTH, A_H, B_BTGN, C_BTGN, D_H, None, doc_BT, initial_BHPN, initial_doc_B)
    y, final, kept = run_forward(inputs)
    return y, final, *kept


@ssd.register_fake
def _(
    x_BTHP: Tensor,
    dt_BTH: Tensor,
    A_H: Tensor,
    B_BTGN: Tensor,
    C_BTGN: Tensor,
    D_H: Tensor,
    doc_BT: Tensor | None,
    initial_BHPN: Tensor | None,
    initial_doc_B: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    y, final, kept = forward_like(x_BTHP, B_BTGN.shape[-1])
    return y, final, *kept


@torch.library.custom_op("longspan::ssd_backward", mutates_args=())
def ssd_backward(
    dy_BTHP: Tensor,
    dfinal_BHPN: Tensor | None,
    states: Tensor,
    planes: Tensor,
    carry: Tensor,
    run: Tensor,
    x_BTHP: Tensor,
    dt_BTH: Tensor,
    A_H: Tensor,
    B_BTGN: Tensor,
    C_BTGN: Tensor,
    D_H: Tensor,
    doc_BT: Tensor | None,
    initial_BHPN: Tensor | None,
    initial_doc_B: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of x, dt, B, C, A and D (2, H), and the initial state (empty where there is none)."""
    inputs = Inputs(x_BTHP, dt_BTH, A_H, B_BTGN, C_BTGN, D_H, None, doc_BT, initial_BHPN, initial_doc_B)
    into = Gradients.like(inputs)
    ddt = torch.empty_like(dt_BTH, memory_format=torch.contiguous_format)
    dAD, dinitial = run_backward(inputs, Kept(states, planes, carry, run), dy_BTHP, dfinal_BHPN, into, ddt)
    return into.x, ddt, into.B, into.C, dAD, dAD.new_empty(0) if dinitial is None else dinitial


@ssd_backward.register_fake
def _(
    dy_BTHP: Tensor,
    dfinal_BHPN: Tensor | None,
    states: Tensor,
    planes: Tensor,
    carry: Tensor,
    run: Tensor,
    x_BTHP: Tensor,
    dt_BTH: Tensor,
    A_H: Tensor,
    B_BTGN: Tensor,
    C_BTGN: Tensor,
    D_H: Tensor,
    doc_BT: Tensor | None,
    initial_BHPN: Tensor | None,
    initial_doc_B: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    dx, ddt, dB, dC = (
        torch.empty_like(z, memory_format=torch.contiguous_format) for z in (x_BTHP, dt_BTH, B_BTGN, C_BTGN)
    )
    shape = (0,) if initial_BHPN is None else initial_BHPN.shape
    dAD = A_H.new_empty((2, *A_H.shape), dtype=torch.float32)
    return dx, ddt, dB, dC, dAD, x_BTHP.new_empty(shape, dtype=torch.float32)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output[2:], *inputs)


def _differentiate(ctx: Any, dy: Tensor | None, dfinal: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    kept, inputs = Kept(*ctx.saved_tensors[:4]), ctx.saved_tensors[4:]
    dy = torch.zeros_like(inputs[0], memory_format=torch.contiguous_format) if dy is None else dy
    dx, ddt, dB, dC, dAD, dinitial = ssd_backward(dy, dfinal, *kept, *inputs)
    raw = dx, ddt, dAD[0], dB, dC, dAD[1]
    gradients = [gradient.to(z.dtype) for gradient, z in zip(raw, inputs[:6], strict=True)]
    return *gradients, None, None if inputs[7] is None else dinitial, None


ssd.register_autograd(_differentiate, setup_context=_save)
