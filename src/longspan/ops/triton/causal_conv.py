"""The short causal convolution with bias and SiLU as two passes over memory: one forward, one backward.

A few taps move next to no arithmetic, so what counts is that x is read once, y written once, and few instructions are
spent in between. A program walks through a span of tokens with the last inputs in registers and the coming ones on
their way to shared memory; the backward meets every token once too, and holds what the next tokens still add to its
gradient. Distances between tokens are constants of a
kernel, so that any multiple of 8 gets wide loads. The gradient of the filters is summed per program and then in one
order: the same bits in every run.

Shapes: B batch, T time, D channels, K taps, J programs along the tokens.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from longspan.ops.triton.device import on_its_device
from longspan.ops.triton.sums import add_up
from longspan.ops.triton.tiles import dense, has_fast_exp2, sigmoid

LARGEST_TAPS = 4
# So many tokens in a row need no moves from register to register. Triton sends loads ahead only in loops that hand on
# nothing older than their own turn: with three inputs held, in turns of three tokens or more.
UNROLL = tl.constexpr(4)


class Tile(NamedTuple):
    """How a kernel cuts its work: each program takes a span of tokens of `channels` channels.

    `span`: a multiple of `UNROLL`, three or more. `stages`: groups of `UNROLL` tokens in flight, the one that is worked
    on included.
    """

    span: int
    channels: int
    warps: int
    stages: int = 3

    def sizes(self, x_BTD: Tensor) -> dict[str, int]:
        """The arguments of a kernel; WHOLE: every program has all of its tokens and channels."""
        block = triton.next_power_of_2(self.span + 2 * (LARGEST_TAPS - 1))
        whole = x_BTD.shape[1] % self.span == 0 and x_BTD.shape[2] % self.channels == 0
        return {"SPAN": self.span, "BLOCK": block, "CHANNELS": self.channels, "STAGES": self.stages, "WHOLE": whole}


FORWARD = BACKWARD = Tile(64, 256, 2)


@triton.jit
def _inputs(values, t, c, stride, time, DIMS: tl.constexpr):
    """(channels,) at the time t, 0 outside the row."""
    return tl.load(values + t * stride + c, mask=(c < DIMS) & (t >= 0) & (t < time), other=0.0)


@triton.jit
def _next_inputs(values, t, c, stride, time, DIMS: tl.constexpr, WHOLE: tl.constexpr):
    """`_inputs` of a token of the span; WHOLE: all of them exist."""
    if WHOLE:
        return tl.load(values + t * stride + c)
    return _inputs(values, t, c, stride, time, DIMS)


@triton.jit
def _document(doc, t, time, DOCS: tl.constexpr):
    """The id at the time t; without documents all are one."""
    if DOCS:
        return tl.load(doc + t, mask=(t >= 0) & (t < time), other=-1)
    return t * 0


@triton.jit
def _within(d0, d1, values, DOCS: tl.constexpr):
    """The values where both ids are of one document, 0 elsewhere."""
    if DOCS:
        return tl.where(d0 == d1, values, 0.0)
    return values


@triton.jit
def _is_mixed(doc, first, time, DOCS: tl.constexpr, SPAN: tl.constexpr, BLOCK: tl.constexpr):
    """Whether a span and the three tokens before and after it are of several documents."""
    mixed = False
    if DOCS:
        t = first - 3 + tl.arange(0, BLOCK)
        here = tl.load(doc + first)
        ids = tl.load(doc + t, mask=(t >= 0) & (t < time) & (t < first + SPAN + 3), other=here)
        mixed = tl.max((ids != here).to(tl.int32), 0) > 0
    return mixed


@triton.jit
def _filter(filters, c, BACK: tl.constexpr, DIMS: tl.constexpr, TAPS: tl.constexpr):
    """(channels,): what multiplies the input BACK tokens ago; nothing where the filter is shorter."""
    there = (c < DIMS) & (BACK < TAPS)
    return tl.load(filters + c * TAPS + (TAPS - 1 - BACK), mask=there, other=0.0).to(tl.float32)


@triton.jit
def _sum(bias, w0, w1, w2, w3, x0, x1, x2, x3):
    """What comes before the activation."""
    z = bias + w0 * x0
    z += w1 * x1
    z += w2 * x2
    z += w3 * x3
    return z


@triton.jit
def _walk_forward(
    x, y, doc, first, c, bias, w0, w1, w2, w3, time, x_token: tl.constexpr, y_token: tl.constexpr, DIMS: tl.constexpr,
    SILU: tl.constexpr, DOCS: tl.constexpr, SPAN: tl.constexpr, STAGES: tl.constexpr, WHOLE: tl.constexpr,
    FAST: tl.constexpr,
):  # fmt: skip
    """y of one span; DOCS: of several documents."""
    x1 = _inputs(x, first - 1, c, x_token, time, DIMS).to(tl.float32)
    x2 = _inputs(x, first - 2, c, x_token, time, DIMS).to(tl.float32)
    x3 = _inputs(x, first - 3, c, x_token, time, DIMS).to(tl.float32)
    d1, d2 = _document(doc, first - 1, time, DOCS), _document(doc, first - 2, time, DOCS)
    d3 = _document(doc, first - 3, time, DOCS)
    for step in tl.range(SPAN, loop_unroll_factor=UNROLL, num_stages=STAGES):
        t = first + step
        x0 = _next_inputs(x, t, c, x_token, time, DIMS, WHOLE).to(tl.float32)
        d0 = _document(doc, t, time, DOCS)
        s1, s2, s3 = _within(d0, d1, x1, DOCS), _within(d0, d2, x2, DOCS), _within(d0, d3, x3, DOCS)
        z = _sum(bias, w0, w1, w2, w3, x0, s1, s2, s3)
        if SILU:
            z = z * sigmoid(z, FAST)
        if WHOLE:
            tl.store(y + t * y_token + c, z.to(y.dtype.element_ty))
        else:
            tl.store(y + t * y_token + c, z.to(y.dtype.element_ty), mask=(c < DIMS) & (t < time))
        x1, x2, x3 = x0, x1, x2
        d1, d2, d3 = d0, d1, d2


@triton.jit
def conv_forward(
    x_ptr, filters, bias_ptr, doc_ptr, y_ptr, time, x_row, y_row, x_token: tl.constexpr, y_token: tl.constexpr,
    DIMS: tl.constexpr, TAPS: tl.constexpr, BIAS: tl.constexpr, SILU: tl.constexpr, DOCS: tl.constexpr,
    SPAN: tl.constexpr, BLOCK: tl.constexpr, CHANNELS: tl.constexpr, STAGES: tl.constexpr, WHOLE: tl.constexpr,
    FAST: tl.constexpr,
):  # fmt: skip
    """y of one span."""
    c = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    first, row = tl.program_id(1) * SPAN, tl.program_id(2).to(tl.int64)
    x, y, doc = x_ptr + row * x_row, y_ptr + row * y_row, doc_ptr + row * time
    bias = tl.zeros((CHANNELS,), tl.float32)
    if BIAS:
        bias += tl.load(bias_ptr + c, mask=c < DIMS, other=0.0).to(tl.float32)
    w0, w1 = _filter(filters, c, 0, DIMS, TAPS), _filter(filters, c, 1, DIMS, TAPS)
    w2, w3 = _filter(filters, c, 2, DIMS, TAPS), _filter(filters, c, 3, DIMS, TAPS)
    # Most spans lie inside one document, and need no masks.
    if _is_mixed(doc, first, time, DOCS, SPAN, BLOCK):
        _walk_forward(
            x, y, doc, first, c, bias, w0, w1, w2, w3, time, x_token, y_token,
            DIMS, SILU, DOCS, SPAN, STAGES, WHOLE, FAST,
        )  # fmt: skip
    else:
        _walk_forward(
            x, y, doc, first, c, bias, w0, w1, w2, w3, time, x_token, y_token,
            DIMS, SILU, False, SPAN, STAGES, WHOLE, FAST,
        )  # fmt: skip


@triton.jit
def _before_silu(dy, z, SILU: tl.constexpr, FAST: tl.constexpr):
    """The gradient of what comes before the activation."""
    if SILU:
        gate = sigmoid(z, FAST)
        dy *= gate + z * gate * (1.0 - gate)
    return dy


@triton.jit
def _walk_backward(
    x, dy, dx, doc, first, c, bias, w0, w1, w2, w3, time,
    x_token: tl.constexpr, dy_token: tl.constexpr, dx_token: tl.constexpr, DIMS: tl.constexpr, SILU: tl.constexpr,
    DOCS: tl.constexpr, SPAN: tl.constexpr, STAGES: tl.constexpr, WHOLE: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """dx of one span, and its part of the gradients of the four taps and of the bias; DOCS: of several documents."""
    x1 = _inputs(x, first - 1, c, x_token, time, DIMS).to(tl.float32)
    x2 = _inputs(x, first - 2, c, x_token, time, DIMS).to(tl.float32)
    x3 = _inputs(x, first - 3, c, x_token, time, DIMS).to(tl.float32)
    d1, d2 = _document(doc, first - 1, time, DOCS), _document(doc, first - 2, time, DOCS)
    d3 = _document(doc, first - 3, time, DOCS)
    zero = tl.zeros_like(w0)
    # What the tokens so far give to the inputs 1, 2 and 3 tokens ago.
    p1, p2, p3 = zero, zero, zero
    d_bias, dw0, dw1, dw2, dw3 = zero, zero, zero, zero, zero
    for step in tl.range(SPAN, loop_unroll_factor=UNROLL, num_stages=STAGES):
        t = first + step
        x0 = _next_inputs(x, t, c, x_token, time, DIMS, WHOLE).to(tl.float32)
        dz = _next_inputs(dy, t, c, dy_token, time, DIMS, WHOLE).to(tl.float32)
        d0 = _document(doc, t, time, DOCS)
        s1, s2, s3 = _within(d0, d1, x1, DOCS), _within(d0, d2, x2, DOCS), _within(d0, d3, x3, DOCS)
        dz = _before_silu(dz, _sum(bias, w0, w1, w2, w3, x0, s1, s2, s3), SILU, FAST)
        dx3 = p3 + w3 * _within(d0, d3, dz, DOCS)
        to_store = step >= 3
        if not WHOLE:
            to_store = to_store & (c < DIMS) & (t - 3 < time)
        tl.store(dx + (t - 3) * dx_token + c, dx3.to(dx.dtype.element_ty), mask=to_store)
        p3 = p2 + w2 * _within(d0, d2, dz, DOCS)
        p2 = p1 + w1 * _within(d0, d1, dz, DOCS)
        p1 = w0 * dz
        d_bias += dz
        dw0 += dz * x0
        dw1 += dz * s1
        dw2 += dz * s2
        dw3 += dz * s3
        x1, x2, x3 = x0, x1, x2
        d1, d2, d3 = d0, d1, d2
    # Three more tokens reach back into the span; the next one counts what they give to the filters.
    for step in tl.static_range(3):
        t = first + SPAN + step
        x0, d0 = _inputs(x, t, c, x_token, time, DIMS).to(tl.float32), _document(doc, t, time, DOCS)
        dz = _inputs(dy, t, c, dy_token, time, DIMS).to(tl.float32)
        s1, s2, s3 = _within(d0, d1, x1, DOCS), _within(d0, d2, x2, DOCS), _within(d0, d3, x3, DOCS)
        dz = _before_silu(dz, _sum(bias, w0, w1, w2, w3, x0, s1, s2, s3), SILU, FAST)
        dx3 = p3 + w3 * _within(d0, d3, dz, DOCS)
        to_store = (c < DIMS) & (t - 3 < time)
        tl.store(dx + (t - 3) * dx_token + c, dx3.to(dx.dtype.element_ty), mask=to_store)
        p3 = p2 + w2 * _within(d0, d2, dz, DOCS)
        p2 = p1 + w1 * _within(d0, d1, dz, DOCS)
        x1, x2, x3 = x0, x1, x2
        d1, d2, d3 = d0, d1, d2
    return d_bias, dw0, dw1, dw2, dw3


@triton.jit
def _keep(sums, values, c, BACK: tl.constexpr, DIMS: tl.constexpr, TAPS: tl.constexpr):
    """What a span gives to the filter's column for the input BACK tokens ago, where there is one."""
    if BACK < TAPS:
        tl.store(sums + (TAPS - 1 - BACK) * DIMS, values, mask=c < DIMS)


@triton.jit
def conv_backward(
    x_ptr, filters, bias_ptr, doc_ptr, dy_ptr, dx_ptr, sums_ptr, time,
    x_row, dy_row, dx_row, x_token: tl.constexpr, dy_token: tl.constexpr, dx_token: tl.constexpr,
    DIMS: tl.constexpr, TAPS: tl.constexpr, BIAS: tl.constexpr, SILU: tl.constexpr, DOCS: tl.constexpr,
    SPAN: tl.constexpr, BLOCK: tl.constexpr, CHANNELS: tl.constexpr, STAGES: tl.constexpr, WHOLE: tl.constexpr,
    FAST: tl.constexpr,
):  # fmt: skip
    """dx of one span, and what it adds to the gradients of filters and bias."""
    c = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    first, row = tl.program_id(1) * SPAN, tl.program_id(2).to(tl.int64)
    x, dy, dx, doc = x_ptr + row * x_row, dy_ptr + row * dy_row, dx_ptr + row * dx_row, doc_ptr + row * time
    bias = tl.zeros((CHANNELS,), tl.float32)
    if BIAS:
        bias += tl.load(bias_ptr + c, mask=c < DIMS, other=0.0).to(tl.float32)
    w0, w1 = _filter(filters, c, 0, DIMS, TAPS), _filter(filters, c, 1, DIMS, TAPS)
    w2, w3 = _filter(filters, c, 2, DIMS, TAPS), _filter(filters, c, 3, DIMS, TAPS)
    if _is_mixed(doc, first, time, DOCS, SPAN, BLOCK):
        d_bias, dw0, dw1, dw2, dw3 = _walk_backward(
            x, dy, dx, doc, first, c, bias, w0, w1, w2, w3, time, x_token, dy_token, dx_token,
            DIMS, SILU, DOCS, SPAN, STAGES, WHOLE, FAST,
        )  # fmt: skip
    else:
        d_bias, dw0, dw1, dw2, dw3 = _walk_backward(
            x, dy, dx, doc, first, c, bias, w0, w1, w2, w3, time, x_token, dy_token, dx_token,
            DIMS, SILU, False, SPAN, STAGES, WHOLE, FAST,
        )  # fmt: skip
    sums = sums_ptr + (row * tl.num_programs(1) + tl.program_id(1)) * (TAPS + 1) * DIMS + c
    _keep(sums, dw0, c, 0, DIMS, TAPS)
    _keep(sums, dw1, c, 1, DIMS, TAPS)
    _keep(sums, dw2, c, 2, DIMS, TAPS)
    _keep(sums, dw3, c, 3, DIMS, TAPS)
    tl.store(sums + TAPS * DIMS, d_bias, mask=c < DIMS)


def _grid(x_BTD: Tensor, tile: Tile) -> tuple[int, int, int]:
    batch, time, channels = x_BTD.shape
    return triton.cdiv(channels, tile.channels), triton.cdiv(time, tile.span), batch


@on_its_device
def run_forward(x_BTD: Tensor, weight_DK: Tensor, bias_D: Tensor | None, doc_BT: Tensor | None, silu: bool) -> Tensor:
    """y (B, T, D), contiguous."""
    x_BTD, weight_DK = dense(x_BTD), weight_DK.contiguous()
    y_BTD = torch.empty_like(x_BTD, memory_format=torch.contiguous_format)
    channels, taps = weight_DK.shape
    conv_forward[_grid(x_BTD, FORWARD)](
        x_BTD, weight_DK, weight_DK if bias_D is None else bias_D, x_BTD if doc_BT is None else doc_BT.contiguous(),
        y_BTD, x_BTD.shape[1], x_BTD.stride(0), y_BTD.stride(0), x_BTD.stride(1), y_BTD.stride(1),
        DIMS=channels, TAPS=taps, BIAS=bias_D is not None, SILU=silu, DOCS=doc_BT is not None,
        FAST=has_fast_exp2(x_BTD), **FORWARD.sizes(x_BTD), num_warps=FORWARD.warps,
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
    x_BTD, dy_BTD, weight_DK = dense(x_BTD), dense(dy_BTD), weight_DK.contiguous()
    channels, taps = weight_DK.shape
    grid = _grid(x_BTD, BACKWARD)
    # Column by column, then the bias.
    sums_JKD = x_BTD.new_empty((grid[1] * grid[2], taps + 1, channels), dtype=torch.float32)
    conv_backward[grid](
        x_BTD, weight_DK, weight_DK if bias_D is None else bias_D, x_BTD if doc_BT is None else doc_BT.contiguous(),
        dy_BTD, dx_BTD, sums_JKD, x_BTD.shape[1], *(z.stride(0) for z in (x_BTD, dy_BTD, dx_BTD)),
        *(z.stride(1) for z in (x_BTD, dy_BTD, dx_BTD)),
        DIMS=channels, TAPS=taps, BIAS=bias_D is not None, SILU=silu, DOCS=doc_BT is not None,
        FAST=has_fast_exp2(x_BTD), **BACKWARD.sizes(x_BTD), num_warps=BACKWARD.warps,
    )  # fmt: skip
    sums_KD = add_up(sums_JKD.view(1, -1, (taps + 1) * channels)).view(taps + 1, channels)
    bias_dtype = weight_DK.dtype if bias_D is None else bias_D.dtype
    dweight_DK = sums_KD[:taps].T.to(weight_DK.dtype).contiguous()
    return dweight_DK, sums_KD[taps].to(bias_dtype)


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
