"""The short causal convolution with bias and SiLU as two passes over memory: one forward, one backward.

A few taps move next to no arithmetic, so what counts is that x is read once, y written once, and few instructions are
spent in between. A program walks through spans of tokens with the last inputs in registers, many spans side by side;
the backward meets every token once too, and holds what the next tokens still add to its gradient. Distances between
tokens are constants of a kernel, so that any multiple of 8 gets wide loads. The gradient of the filters is summed per
program and then in one order: the same bits in every run.

Shapes: B batch, T time, D channels, K taps, J programs along the tokens.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from longspan.ops.triton.device import on_its_device

LARGEST_TAPS = 4


class Tile(NamedTuple):
    """How a kernel cuts its work: each program takes `spans` spans of `span` tokens of `channels` channels."""

    span: int
    spans: int
    channels: int
    warps: int


FORWARD, BACKWARD = Tile(64, 4, 128, 4), Tile(64, 2, 128, 2)


@triton.jit
def _channels(values, t, c, stride, time, DIMS: tl.constexpr):
    """(spans, channels) at the times t of each span, 0 outside the row."""
    inside = ((t >= 0) & (t < time))[:, None] & (c < DIMS)[None, :]
    return tl.load(values[:, None] + t[:, None] * stride + c[None, :], mask=inside, other=0.0)


@triton.jit
def _document(doc, t, time, DOCS: tl.constexpr):
    """The ids at the times t; without documents all are one."""
    ids = tl.zeros_like(t)
    if DOCS:
        ids = tl.load(doc + t, mask=(t >= 0) & (t < time), other=-1)
    return ids


@triton.jit
def _filter(filters, c, BACK: tl.constexpr, DIMS: tl.constexpr, TAPS: tl.constexpr):
    """(1, channels): what multiplies the input BACK tokens ago; nothing where the filter is shorter."""
    return tl.load(filters + c * TAPS + (TAPS - 1 - BACK), mask=(c < DIMS) & (BACK < TAPS), other=0.0).to(tl.float32)[
        None, :
    ]


@triton.jit
def _spans(batch, time, SPAN: tl.constexpr, SPANS: tl.constexpr):
    """The row and the first token of every span of this program; those past the last row start past its end."""
    per_row = tl.cdiv(time, SPAN)
    span = tl.program_id(1) * SPANS + tl.arange(0, SPANS)
    row = span // per_row
    first = tl.where(row < batch, (span % per_row) * SPAN, time + SPAN)
    return tl.minimum(row, batch - 1).to(tl.int64), first


@triton.jit
def conv_forward(
    x_ptr, filters, bias_ptr, doc_ptr, y_ptr, batch, time, x_row, y_row,
    x_token: tl.constexpr, y_token: tl.constexpr,
    DIMS: tl.constexpr, TAPS: tl.constexpr, BIAS: tl.constexpr, SILU: tl.constexpr, DOCS: tl.constexpr,
    SPAN: tl.constexpr, SPANS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """y of a few spans."""
    c = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    row, first = _spans(batch, time, SPAN, SPANS)
    x, y, doc = x_ptr + row * x_row, y_ptr + row * y_row, doc_ptr + row * time
    bias = tl.zeros((1, CHANNELS), tl.float32)
    if BIAS:
        bias += tl.load(bias_ptr + c, mask=c < DIMS, other=0.0).to(tl.float32)[None, :]
    w0, w1 = _filter(filters, c, 0, DIMS, TAPS), _filter(filters, c, 1, DIMS, TAPS)
    w2, w3 = _filter(filters, c, 2, DIMS, TAPS), _filter(filters, c, 3, DIMS, TAPS)
    x1 = _channels(x, first - 1, c, x_token, time, DIMS).to(tl.float32)
    x2 = _channels(x, first - 2, c, x_token, time, DIMS).to(tl.float32)
    x3 = _channels(x, first - 3, c, x_token, time, DIMS).to(tl.float32)
    d1, d2 = _document(doc, first - 1, time, DOCS), _document(doc, first - 2, time, DOCS)
    d3 = _document(doc, first - 3, time, DOCS)
    x_next, x_after = _channels(x, first, c, x_token, time, DIMS), _channels(x, first + 1, c, x_token, time, DIMS)
    d_next = _document(doc, first, time, DOCS)
    for step in range(SPAN):
        t = first + step
        x0, d0 = x_next.to(tl.float32), d_next
        # Two tokens are on their way while one is worked on.
        x_next, x_after = x_after, _channels(x, t + 2, c, x_token, time, DIMS)
        d_next = _document(doc, t + 1, time, DOCS)
        z = bias + w0 * x0
        z += w1 * tl.where((d0 == d1)[:, None], x1, 0.0)
        z += w2 * tl.where((d0 == d2)[:, None], x2, 0.0)
        z += w3 * tl.where((d0 == d3)[:, None], x3, 0.0)
        if SILU:
            z = z * tl.sigmoid(z)
        inside = (t < time)[:, None] & (c < DIMS)[None, :]
        tl.store(y[:, None] + t[:, None] * y_token + c[None, :], z.to(y_ptr.dtype.element_ty), mask=inside)
        x1, x2, x3 = x0, x1, x2
        d1, d2, d3 = d0, d1, d2


@triton.jit
def conv_backward(
    x_ptr, filters, bias_ptr, doc_ptr, dy_ptr, dx_ptr, sums_ptr, batch, time,
    x_row, dy_row, dx_row, x_token: tl.constexpr, dy_token: tl.constexpr, dx_token: tl.constexpr,
    DIMS: tl.constexpr, TAPS: tl.constexpr, BIAS: tl.constexpr, SILU: tl.constexpr, DOCS: tl.constexpr,
    SPAN: tl.constexpr, SPANS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """dx of a few spans, and what they add to the gradients of filters and bias."""
    c = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    row, first = _spans(batch, time, SPAN, SPANS)
    x, dy, dx, doc = x_ptr + row * x_row, dy_ptr + row * dy_row, dx_ptr + row * dx_row, doc_ptr + row * time
    bias = tl.zeros((1, CHANNELS), tl.float32)
    if BIAS:
        bias += tl.load(bias_ptr + c, mask=c < DIMS, other=0.0).to(tl.float32)[None, :]
    w0, w1 = _filter(filters, c, 0, DIMS, TAPS), _filter(filters, c, 1, DIMS, TAPS)
    w2, w3 = _filter(filters, c, 2, DIMS, TAPS), _filter(filters, c, 3, DIMS, TAPS)
    x1 = _channels(x, first - 1, c, x_token, time, DIMS).to(tl.float32)
    x2 = _channels(x, first - 2, c, x_token, time, DIMS).to(tl.float32)
    x3 = _channels(x, first - 3, c, x_token, time, DIMS).to(tl.float32)
    d1, d2 = _document(doc, first - 1, time, DOCS), _document(doc, first - 2, time, DOCS)
    d3 = _document(doc, first - 3, time, DOCS)
    zero = tl.zeros((SPANS, CHANNELS), tl.float32)
    # What the tokens so far give to the inputs 1, 2 and 3 tokens ago.
    p1, p2, p3 = zero, zero, zero
    d_bias, dw0, dw1, dw2, dw3 = zero, zero, zero, zero, zero
    x_next, x_after = _channels(x, first, c, x_token, time, DIMS), _channels(x, first + 1, c, x_token, time, DIMS)
    dy_next, dy_after = _channels(dy, first, c, dy_token, time, DIMS), _channels(dy, first + 1, c, dy_token, time, DIMS)
    d_next = _document(doc, first, time, DOCS)
    for step in range(SPAN + 3):
        t = first + step
        x0, d0, dz = x_next.to(tl.float32), d_next, dy_next.to(tl.float32)
        x_next, x_after = x_after, _channels(x, t + 2, c, x_token, time, DIMS)
        dy_next, dy_after = dy_after, _channels(dy, t + 2, c, dy_token, time, DIMS)
        d_next = _document(doc, t + 1, time, DOCS)
        same1, same2, same3 = (d0 == d1)[:, None], (d0 == d2)[:, None], (d0 == d3)[:, None]
        s1, s2, s3 = tl.where(same1, x1, 0.0), tl.where(same2, x2, 0.0), tl.where(same3, x3, 0.0)
        if SILU:
            z = bias + w0 * x0 + w1 * s1 + w2 * s2 + w3 * s3
            gate = tl.sigmoid(z)
            dz *= gate + z * gate * (1.0 - gate)
        to_store = (step >= 3) & (t - 3 < time)
        dx3 = p3 + w3 * tl.where(same3, dz, 0.0)
        tl.store(
            dx[:, None] + (t - 3)[:, None] * dx_token + c[None, :],
            dx3.to(dx_ptr.dtype.element_ty),
            mask=to_store[:, None] & (c < DIMS)[None, :],
        )
        p3 = p2 + w2 * tl.where(same2, dz, 0.0)
        p2 = p1 + w1 * tl.where(same1, dz, 0.0)
        p1 = w0 * dz
        # The last three steps belong to the next span, which sums them.
        dz = tl.where(step < SPAN, dz, 0.0)
        d_bias += dz
        dw0 += dz * x0
        dw1 += dz * s1
        dw2 += dz * s2
        dw3 += dz * s3
        x1, x2, x3 = x0, x1, x2
        d1, d2, d3 = d0, d1, d2
    sums = sums_ptr + tl.program_id(1).to(tl.int64) * 5 * DIMS + c
    tl.store(sums, tl.sum(dw0, 0), mask=c < DIMS)
    tl.store(sums + DIMS, tl.sum(dw1, 0), mask=c < DIMS)
    tl.store(sums + 2 * DIMS, tl.sum(dw2, 0), mask=c < DIMS)
    tl.store(sums + 3 * DIMS, tl.sum(dw3, 0), mask=c < DIMS)
    tl.store(sums + 4 * DIMS, tl.sum(d_bias, 0), mask=c < DIMS)


def _grid(x_BTD: Tensor, tile: Tile) -> tuple[int, int]:
    batch, time, channels = x_BTD.shape
    return triton.cdiv(channels, tile.channels), triton.cdiv(batch * triton.cdiv(time, tile.span), tile.spans)


def _dense(x_BTD: Tensor) -> Tensor:
    """Itself where the channels lie side by side, a copy otherwise."""
    return x_BTD if x_BTD.stride(-1) == 1 else x_BTD.contiguous()


@on_its_device
def run_forward(x_BTD: Tensor, weight_DK: Tensor, bias_D: Tensor | None, doc_BT: Tensor | None, silu: bool) -> Tensor:
    """y (B, T, D), contiguous."""
    x_BTD, weight_DK = _dense(x_BTD), weight_DK.contiguous()
    y_BTD = torch.empty_like(x_BTD, memory_format=torch.contiguous_format)
    channels, taps = weight_DK.shape
    conv_forward[_grid(x_BTD, FORWARD)](
        x_BTD, weight_DK, weight_DK if bias_D is None else bias_D, x_BTD if doc_BT is None else doc_BT.contiguous(),
        y_BTD, *x_BTD.shape[:2], x_BTD.stride(0), y_BTD.stride(0), x_BTD.stride(1), y_BTD.stride(1),
        DIMS=channels, TAPS=taps, BIAS=bias_D is not None, SILU=silu, DOCS=doc_BT is not None,
        SPAN=FORWARD.span, SPANS=FORWARD.spans, CHANNELS=FORWARD.channels, num_warps=FORWARD.warps,
    )  # fmt: skip
    return y_BTD


@torch.library.custom_op("longspan::causal_conv", mutates_args=())
def causal_conv(x_BTD: Tensor, weight_DK: Tensor, bias_D: Tensor | None, doc_BT: Tensor | None, silu: bool) -> Tensor:
    """`ops.causal_conv.causal_conv` of rows that start here, K <= `LARGEST_TAPS`; y (B, T, D), contiguous."""
    return run_forward(x_BTD, weight_DK, bias_D, doc_BT, silu)


@causal_conv.register_fake
def _(x_BTD: Tensor, weight_DK: Tensor, bias_D: Tensor | None, doc_BT: Tensor | None, silu: bool) -> Tensor:
    return torch.empty_like(x_BTD, memory_format=torch.contiguous_format)


@torch.library.custom_op("longspan::causal_conv_backward", mutates_args=())
def causal_conv_backward(
    dy_BTD: Tensor, x_BTD: Tensor, weight_DK: Tensor, bias_D: Tensor | None, doc_BT: Tensor | None, silu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of x, weight and bias (the latter also where there is none)."""
    dx_BTD = torch.empty_like(x_BTD, memory_format=torch.contiguous_format)
    dweight_DK, dbias_D = run_backward(dx_BTD, dy_BTD, x_BTD, weight_DK, bias_D, doc_BT, silu)
    return dx_BTD, dweight_DK, dbias_D


@on_its_device
def run_backward(
    dx_BTD: Tensor,
    dy_BTD: Tensor,
    x_BTD: Tensor,
    weight_DK: Tensor,
    bias_D: Tensor | None,
    doc_BT: Tensor | None,
    silu: bool,
) -> tuple[Tensor, Tensor]:
    """Writes the gradient of x, whose channels must lie side by side, and returns those of weight and bias."""
    x_BTD, dy_BTD, weight_DK = _dense(x_BTD), _dense(dy_BTD), weight_DK.contiguous()
    channels, taps = weight_DK.shape
    grid = _grid(x_BTD, BACKWARD)
    sums_JKD = x_BTD.new_empty((grid[1], 5, channels), dtype=torch.float32)
    conv_backward[grid](
        x_BTD, weight_DK, weight_DK if bias_D is None else bias_D, x_BTD if doc_BT is None else doc_BT.contiguous(),
        dy_BTD, dx_BTD, sums_JKD, *x_BTD.shape[:2], *(z.stride(0) for z in (x_BTD, dy_BTD, dx_BTD)),
        *(z.stride(1) for z in (x_BTD, dy_BTD, dx_BTD)),
        DIMS=channels, TAPS=taps, BIAS=bias_D is not None, SILU=silu, DOCS=doc_BT is not None,
        SPAN=BACKWARD.span, SPANS=BACKWARD.spans, CHANNELS=BACKWARD.channels, num_warps=BACKWARD.warps,
    )  # fmt: skip
    sums_KD = sums_JKD.sum(0)
    bias_dtype = weight_DK.dtype if bias_D is None else bias_D.dtype
    dweight_DK = sums_KD[:taps].flip(0).T.to(weight_DK.dtype).contiguous()
    return dweight_DK, sums_KD[4].to(bias_dtype)


@causal_conv_backward.register_fake
def _(
    dy_BTD: Tensor, x_BTD: Tensor, weight_DK: Tensor, bias_D: Tensor | None, doc_BT: Tensor | None, silu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    dbias_D = weight_DK.new_empty(weight_DK.shape[0], dtype=weight_DK.dtype if bias_D is None else bias_D.dtype)
    dx_BTD = torch.empty_like(x_BTD, memory_format=torch.contiguous_format)
    return dx_BTD, torch.empty_like(weight_DK, memory_format=torch.contiguous_format), dbias_D


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.silu = inputs
    ctx.save_for_backward(*tensors)


def _differentiate(ctx: Any, dy_BTD: Tensor) -> tuple[Tensor | None, ...]:
    *tensors, doc_BT = ctx.saved_tensors
    dx_BTD, dweight_DK, dbias_D = causal_conv_backward(dy_BTD, *tensors, doc_BT, ctx.silu)
    return dx_BTD, dweight_DK, None if tensors[2] is None else dbias_D, None, None


causal_conv.register_autograd(_differentiate, setup_context=_save)
