"""What lies between the two projections of a Mamba-2 layer, in one step for autograd: convolution, scan, gated norm.

The kernels are those of the single ops. Done in one step, the gradients of z, x, B, C and dt are written where the
input projection reads them, instead of each on its own and then together once more; bias and softplus of the step sizes
are part of the scan.

The projected tensor comes with all tokens in one dimension and any distance between them, and its gradient leaves with
rows of whole lines of memory: a compiler that spreads the rows of a product copies nothing on the way in or out, and no
product meets rows that begin at odd places.

Shapes: B rows, T tokens, M = B * T, E = H * P inner width, H heads, P head dim, N state, K = 2 E + 2 N + H, W taps.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from longspan.ops.triton import causal_conv, rms_norm
from longspan.ops.triton import ssd_launches as scan
from longspan.ops.triton.tiles import spread


class Parts(NamedTuple):
    """Views of a projected tensor (M, K) or of its gradient: z (B, T, E), x, B and C (B, T, E + 2 N), dt (B, T, H)."""

    z: Tensor
    convolved: Tensor
    dt: Tensor

    @staticmethod
    def of(projected_MK: Tensor, rows: int, inner: int, state: int) -> Parts:
        """In the order of the rows of `in_proj`."""
        convolved = inner + 2 * state
        sizes = [inner, convolved, projected_MK.shape[1] - inner - convolved]
        return Parts(*projected_MK.unflatten(0, (rows, -1)).split_with_sizes(sizes, -1))


def _scanned(xBC: Tensor, heads: int, state: int) -> tuple[Tensor, Tensor, Tensor]:
    """Views x (B, T, H, P), B and C (B, T, 1, N) of what the convolution gives."""
    x, B, C = xBC.split_with_sizes([xBC.shape[2] - 2 * state, state, state], -1)
    return x.unflatten(2, (heads, -1)), B.unsqueeze(2), C.unsqueeze(2)


@torch.library.custom_op("longspan::mamba2", mutates_args=(), tags=(torch.Tag.flexible_layout,))
def mamba2(
    projected_MK: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor,
    dt_bias_H: Tensor,
    A_H: Tensor,
    D_H: Tensor,
    norm_weight_E: Tensor,
    doc_BT: Tensor | None,
    rows: int,
    state: int,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(M, E), the input of the output projection, in the dtype of `projected`; the other results are kept."""
    heads, inner = A_H.shape[0], norm_weight_E.shape[0]
    parts = Parts.of(projected_MK, rows, inner, state)
    xBC = causal_conv.run_forward(parts.convolved, conv_weight, conv_bias, doc_BT, True)
    x, B, C = _scanned(xBC, heads, state)
    y, _, kept = scan.run_forward(scan.Inputs(x, parts.dt, A_H, B, C, D_H, dt_bias_H, doc_BT, None, None))
    out = rms_norm.run_forward(y.flatten(2), parts.z, norm_weight_E, eps, y.dtype)
    return out.flatten(0, 1), xBC, y, *kept


@mamba2.register_fake
def _(
    projected_MK: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor,
    dt_bias_H: Tensor,
    A_H: Tensor,
    D_H: Tensor,
    norm_weight_E: Tensor,
    doc_BT: Tensor | None,
    rows: int,
    state: int,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    heads, inner = A_H.shape[0], norm_weight_E.shape[0]
    time = projected_MK.shape[0] // rows
    y, _, kept = scan.forward_like(projected_MK.new_empty(rows, time, heads, inner // heads), state)
    xBC = projected_MK.new_empty(rows, time, inner + 2 * state)
    return projected_MK.new_empty(rows * time, inner), xBC, y, *kept


@torch.library.custom_op("longspan::mamba2_backward", mutates_args=(), tags=(torch.Tag.flexible_layout,))
def mamba2_backward(
    d_out: Tensor,
    xBC: Tensor,
    y: Tensor,
    states: Tensor,
    planes: Tensor,
    carry: Tensor,
    run: Tensor,
    projected_MK: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor,
    dt_bias_H: Tensor,
    A_H: Tensor,
    D_H: Tensor,
    norm_weight_E: Tensor,
    doc_BT: Tensor | None,
    rows: int,
    state: int,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of `projected`, of the convolution's weight and bias, of A, D and dt_bias (3, H) in fp32, of the
    norm's weight."""
    heads, inner = A_H.shape[0], norm_weight_E.shape[0]
    parts = Parts.of(projected_MK, rows, inner, state)
    d_projected = spread(projected_MK)
    d_parts = Parts.of(d_projected, rows, inner, state)
    dy, d_xBC = torch.empty_like(y), torch.empty_like(xBC)
    d_norm = rms_norm.run_backward(
        d_out, y.flatten(2), parts.z, norm_weight_E, eps, dy.view(-1, inner), d_parts.z.flatten(0, 1)
    )
    x, B, C = _scanned(xBC, heads, state)
    inputs = scan.Inputs(x, parts.dt, A_H, B, C, D_H, dt_bias_H, doc_BT, None, None)
    into, kept = scan.Gradients(*_scanned(d_xBC, heads, state)), scan.Kept(states, planes, carry, run)
    d_heads, _ = scan.run_backward(inputs, kept, dy, None, into, d_parts.dt)
    d_weight, d_bias = causal_conv.run_backward(
        d_parts.convolved, d_xBC, parts.convolved, conv_weight, conv_bias, doc_BT, True
    )
    d_weight = d_weight.contiguous()
    return d_projected, d_weight, d_bias, d_heads, d_norm


@mamba2_backward.register_fake
def _(
    d_out: Tensor,
    xBC: Tensor,
    y: Tensor,
    states: Tensor,
    planes: Tensor,
    carry: Tensor,
    run: Tensor,
    projected_MK: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor,
    dt_bias_H: Tensor,
    A_H: Tensor,
    D_H: Tensor,
    norm_weight_E: Tensor,
    doc_BT: Tensor | None,
    rows: int,
    state: int,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    dw, db, dn = (
        torch.empty_like(z, memory_format=torch.contiguous_format) for z in (conv_weight, conv_bias, norm_weight_E)
    )
    return spread(projected_MK), dw, db, A_H.new_empty((3, *A_H.shape), dtype=torch.float32), dn


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.rows, ctx.state, ctx.eps = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output[1:], *tensors)


def _differentiate(ctx: Any, d_out: Tensor, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    d_projected, dw, db, d_heads, d_norm = mamba2_backward(d_out, *ctx.saved_tensors, ctx.rows, ctx.state, ctx.eps)
    # Views of one tensor, which only an op's results may not be.
    dA, dD, d_dt_bias = d_heads
    of_heads = (d.to(z.dtype) for d, z in zip((d_dt_bias, dA, dD), ctx.saved_tensors[-5:-2], strict=True))
    return d_projected, dw, db, *of_heads, d_norm, None, None, None, None


mamba2.register_autograd(_differentiate, setup_context=_save)
