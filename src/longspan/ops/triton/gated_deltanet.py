"""What lies between the two projections of a Gated DeltaNet layer, in one step for autograd.

Convolution, gates, delta rule, the norm of each head and the gate after it are kernels one after another. In one step
the gradients of q, k, v, z, b and a are written where the input projection reads them, instead of each on its own and
then together once more.

The projected tensor comes with all tokens in one dimension and any distance between them, and its gradient leaves with
rows of whole lines of memory, as in a Mamba-2 layer. Columns after those of `a`, which the projection may have so that
no product meets rows that begin at odd places, are not read; their gradients are 0.

Shapes: B rows, T tokens, M = B * T, H heads, K key dim, V value dim, E = 2 H K + H V convolved channels, P projected
columns, W taps.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from longspan.ops.triton import causal_conv, delta_gates, head_norm
from longspan.ops.triton import gated_delta as rule
from longspan.ops.triton.tiles import dense, spread


class Parts(NamedTuple):
    """Views of a projected tensor (M, P) or of its gradient: q k v (B, T, E), z (M, H, V), b and a (M, H), the rest."""

    convolved: Tensor
    z: Tensor
    b: Tensor
    a: Tensor
    rest: Tensor

    @staticmethod
    def of(projected_MP: Tensor, rows: int, heads: int, channels: int, values: int) -> Parts:
        """In the order of the rows of `in_proj`."""
        sizes = [channels, heads * values, heads, heads]
        sizes.append(projected_MP.shape[1] - sum(sizes))
        convolved, z, *gates = dense(projected_MP).split_with_sizes(sizes, -1)
        return Parts(convolved.unflatten(0, (rows, -1)), z.unflatten(1, (heads, -1)), *gates)


def _heads(qkv: Tensor, heads: int, values: int) -> list[Tensor]:
    """Views q, k (B, T, H, K) and v (B, T, H, V) of what the convolution gives."""
    keys = (qkv.shape[2] - heads * values) // 2
    return [z.unflatten(2, (heads, -1)) for z in qkv.split_with_sizes([keys, keys, heads * values], -1)]


def _inputs(qkv: Tensor, beta_MH: Tensor, g_MH: Tensor, values: int, doc_BT: Tensor | None) -> rule.Inputs:
    q, k, v = _heads(qkv, beta_MH.shape[1], values)
    g, beta = (z.unflatten(0, (qkv.shape[0], -1)) for z in (g_MH, beta_MH))
    return rule.Inputs(q, k, v, g, beta, doc_BT, None, None)


@torch.library.custom_op("longspan::gated_deltanet", mutates_args=(), tags=(torch.Tag.flexible_layout,))
def gated_deltanet(
    projected_MP: Tensor,
    conv_weight: Tensor,
    dt_bias_H: Tensor,
    A_H: Tensor,
    norm_weight_V: Tensor,
    doc_BT: Tensor | None,
    rows: int,
    strength: float,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(M, H * V), the input of the output projection, in the dtype of `projected`; the other results are kept."""
    heads, values = A_H.shape[0], norm_weight_V.shape[0]
    parts = Parts.of(projected_MP, rows, heads, conv_weight.shape[0], values)
    qkv = causal_conv.run_forward(parts.convolved, conv_weight, None, doc_BT, True)
    beta, g = delta_gates.run_forward(parts.b, parts.a, dt_bias_H, A_H, strength)
    o, _, kept = rule.run_forward(_inputs(qkv, beta, g, values, doc_BT))
    y = head_norm.run_forward(o.flatten(0, 1), parts.z, norm_weight_V, eps)
    return y.flatten(1), qkv, beta, g, o, *kept


@gated_deltanet.register_fake
def _(
    projected_MP: Tensor,
    conv_weight: Tensor,
    dt_bias_H: Tensor,
    A_H: Tensor,
    norm_weight_V: Tensor,
    doc_BT: Tensor | None,
    rows: int,
    strength: float,
    eps: float,
) -> tuple[Tensor, ...]:
    tokens, heads, values = projected_MP.shape[0], A_H.shape[0], norm_weight_V.shape[0]
    qkv = projected_MP.new_empty(rows, tokens // rows, conv_weight.shape[0])
    beta, g = (projected_MP.new_empty(tokens, heads, dtype=torch.float32) for _ in range(2))
    _, k, v = _heads(qkv, heads, values)
    o, _, kept = rule.like(v, k.shape[-1])
    return projected_MP.new_empty(tokens, heads * values), qkv, beta, g, o, *kept


@torch.library.custom_op("longspan::gated_deltanet_backward", mutates_args=(), tags=(torch.Tag.flexible_layout,))
def gated_deltanet_backward(
    d_out: Tensor,
    qkv: Tensor,
    beta_MH: Tensor,
    g_MH: Tensor,
    o: Tensor,
    norms: Tensor,
    inverses: Tensor,
    u: Tensor,
    states: Tensor,
    planes: Tensor,
    carry: Tensor,
    run: Tensor,
    maps: Tensor,
    projected_MP: Tensor,
    conv_weight: Tensor,
    dt_bias_H: Tensor,
    A_H: Tensor,
    norm_weight_V: Tensor,
    doc_BT: Tensor | None,
    rows: int,
    strength: float,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of `projected`, of the convolution's weight, of A and dt_bias (2, H) in fp32, of the norm's
    weight."""
    heads, values = A_H.shape[0], norm_weight_V.shape[0]
    parts = Parts.of(projected_MP, rows, heads, conv_weight.shape[0], values)
    d_projected = spread(projected_MP)
    d_parts = Parts.of(d_projected, rows, heads, conv_weight.shape[0], values)
    do, d_qkv = torch.empty_like(o), torch.empty_like(qkv)
    d_norm = head_norm.run_backward(
        dense(d_out).unflatten(1, (heads, values)),
        o.flatten(0, 1),
        parts.z,
        norm_weight_V,
        eps,
        do.flatten(0, 1),
        d_parts.z,
    )
    kept = rule.Kept(norms, inverses, u, states, planes, carry, run, maps)
    into = rule.Gradients(*_heads(d_qkv, heads, values))
    dg, dbeta, _ = rule.run_backward(_inputs(qkv, beta_MH, g_MH, values, doc_BT), kept, do, None, into)
    d_weight, _ = causal_conv.run_backward(d_parts.convolved, d_qkv, parts.convolved, conv_weight, None, doc_BT, True)
    d_heads = delta_gates.run_backward(
        parts.a, dt_bias_H, A_H, beta_MH, dbeta, dg, strength, d_parts.b, d_parts.a, d_parts.rest
    )
    return d_projected, d_weight, d_heads, d_norm


@gated_deltanet_backward.register_fake
def _(d_out: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    projected_MP, conv_weight, _, A_H, norm_weight_V, *_ = others[-9:]
    dw, dn = (torch.empty_like(z, memory_format=torch.contiguous_format) for z in (conv_weight, norm_weight_V))
    return spread(projected_MP), dw, A_H.new_empty((2, *A_H.shape), dtype=torch.float32), dn


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.rows, ctx.strength, ctx.eps = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output[1:], *tensors)


def _differentiate(ctx: Any, d_out: Tensor, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors
    d_projected, dw, d_heads, d_norm = gated_deltanet_backward(d_out, *saved, ctx.rows, ctx.strength, ctx.eps)
    # Views of one tensor, which only an op's results may not be.
    dA, d_dt_bias = (d.to(z.dtype) for d, z in zip(d_heads, (saved[-3], saved[-4]), strict=True))
    return d_projected, dw, d_dt_bias, dA, d_norm, None, None, None, None


gated_deltanet.register_autograd(_differentiate, setup_context=_save)
