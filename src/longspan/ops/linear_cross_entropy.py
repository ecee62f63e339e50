"""Cross-entropy of a linear head without ever holding all logits: the vocabulary is the widest layer of a small model.

Shapes: N tokens, D model width, V vocabulary, c tokens of one chunk.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from longspan.foundation.errors import UserError
from longspan.ops import kernels
from longspan.ops.compiling import never_compiled

# Logits that a kernel turns into gradients live at the same time, in their own dtype.
KERNEL_LOGITS = 3 * 2**28


@never_compiled
def linear_cross_entropy(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    targets_N: Tensor,
    *,
    chunk: int | None = None,
    ignore: int = -100,
    reduction: Literal["none", "sum"] = "sum",
) -> Tensor:
    """Negative log-likelihood (nats) of `targets` under `softmax(hidden @ weight.T)`.

    With "sum" the gradients are made in the forward pass, where a chunk's logits still exist, so the backward costs one
    multiplication. With "none" the backward computes the logits of a chunk again. Where `ops.kernels` says so, a
    Triton kernel makes the gradients, over logits in the dtype of `hidden`; without gradients logits stay fp32.

    Args:
        hidden_ND: last hidden states, fp32 or bf16 (fp64 in tests).
        weight_VD: head (or tied embedding) rows; cast to the dtype of `hidden`.
        targets_N: integer class per token; `ignore` marks tokens without loss.
        chunk: tokens whose logits live at the same time; None: `default_chunk`, or what suits the kernel.
        ignore: the target value that carries no loss.
        reduction: "sum" gives a scalar, "none" one value per token (0 where ignored).

    Returns:
        fp32 (fp64 for fp64 inputs), scalar or (N,).

    Raises:
        UserError: shapes that do not fit, a target outside the vocabulary (checked on CPU), an unknown reduction.
    """
    if reduction not in ("none", "sum"):
        raise UserError(f"reduction {reduction!r}", "'none' or 'sum'", "name one of the two; a mean is sum / count")
    if hidden_ND.dim() != 2 or hidden_ND.shape[1:] != weight_VD.shape[1:] or hidden_ND.shape[:1] != targets_N.shape:
        shapes = f"hidden {tuple(hidden_ND.shape)}, weight {tuple(weight_VD.shape)}, targets {tuple(targets_N.shape)}"
        raise UserError(shapes, "hidden (N,D), weight (V,D), targets (N,)", "flatten batch and time first")
    if chunk is not None and chunk < 1:
        raise UserError(f"chunk {chunk}", "1 or more", "raise it")
    targets_N = targets_N.long()
    counted_N = targets_N != ignore
    if not targets_N.is_cuda:
        outside = counted_N & ((targets_N < 0) | (targets_N >= weight_VD.shape[0]))
        if bool(outside.any()):
            raise UserError(
                f"target {int(targets_N[outside][0])}",
                f"0..{weight_VD.shape[0] - 1}, or {ignore} for no loss",
                "check that the tokenizer belongs to this model",
            )
    chosen_N = targets_N.masked_fill(~counted_N, 0)
    function = _Sum if reduction == "sum" else _PerToken
    train = torch.is_grad_enabled()
    loss: Tensor = function.apply(hidden_ND, weight_VD, chosen_N, counted_N, chunk, train)  # type: ignore[no-untyped-call]
    return loss


def default_chunk(vocab_size: int, device: torch.device) -> int:
    """Tokens per chunk: logits that stay near the cache on a CPU, a gigabyte of them on a GPU."""
    elements = 2**22 if device.type == "cpu" else 2**28
    return max(256, elements // vocab_size)


def _kernel_chunk(tokens: int, vocab_size: int) -> int:
    """As few spans as the buffer allows, as equal as can be: long products are the fast ones."""
    spans = -(-tokens * vocab_size // KERNEL_LOGITS)
    return max(1, -(-tokens // max(1, spans)))


def _fused(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    chosen_N: Tensor,
    counted_N: Tensor,
    scale_N: Tensor | None,
    chunk: int | None,
    wanted: tuple[bool, bool],
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """NLL (N,), and the gradients of hidden and weight (fp32) that are wanted, through the kernel."""
    from longspan.ops.triton.cross_entropy import softmax_errors

    tokens, vocab_size = hidden_ND.shape[0], weight_VD.shape[0]
    chunk = _kernel_chunk(tokens, vocab_size) if chunk is None else chunk
    weight_VD = weight_VD.to(hidden_ND.dtype)
    buffer = hidden_ND.new_empty(min(chunk, tokens), vocab_size)
    nll_N = hidden_ND.new_empty(tokens, dtype=torch.float32)
    dhidden = torch.empty_like(hidden_ND) if wanted[0] else None
    dweight: Tensor | None = None
    for start in range(0, tokens, chunk):
        span = slice(start, min(start + chunk, tokens))
        hidden_cD = hidden_ND[span]
        logits_cV = torch.mm(hidden_cD, weight_VD.T, out=buffer[: hidden_cD.shape[0]])
        scale_c = None if scale_N is None else scale_N[span]
        nll_N[span] = softmax_errors(logits_cV, chosen_N[span], counted_N[span], scale_c)
        if dhidden is not None:
            torch.mm(logits_cV, weight_VD, out=dhidden[span])
        if wanted[1]:
            dweight = _added(dweight, logits_cV, hidden_cD)
    if dweight is None and wanted[1]:
        dweight = torch.zeros_like(weight_VD, dtype=torch.float32)
    return nll_N, dhidden, dweight


def _added(total_VD: Tensor | None, errors_cV: Tensor, hidden_cD: Tensor) -> Tensor:
    """`total + errors.T @ hidden` in fp32: on CUDA the product itself adds."""
    if errors_cV.dtype == torch.float32:
        return torch.mm(errors_cV.T, hidden_cD) if total_VD is None else total_VD.addmm_(errors_cV.T, hidden_cD)
    if not errors_cV.is_cuda:
        product = torch.mm(errors_cV.T, hidden_cD).float()
        return product if total_VD is None else total_VD.add_(product)
    if total_VD is None:
        return torch.mm(errors_cV.T, hidden_cD, out_dtype=torch.float32)
    return torch.addmm(total_VD, errors_cV.T, hidden_cD, out_dtype=torch.float32, out=total_VD)


@dataclass(frozen=True, slots=True)
class _Chunks:
    """The tokens in spans, and one buffer for the logits of any of them."""

    hidden: Tensor
    weight: Tensor
    chosen: Tensor
    counted: Tensor
    chunk: int
    buffer: Tensor

    @staticmethod
    def build(hidden_ND: Tensor, weight_VD: Tensor, chosen_N: Tensor, counted_N: Tensor, chunk: int | None) -> _Chunks:
        weight_VD = weight_VD.to(hidden_ND.dtype)
        chunk = default_chunk(weight_VD.shape[0], weight_VD.device) if chunk is None else chunk
        rows = min(chunk, hidden_ND.shape[0])
        buffer = hidden_ND.new_empty(rows, weight_VD.shape[0], dtype=_statistics(hidden_ND))
        return _Chunks(hidden_ND, weight_VD, chosen_N, counted_N, chunk, buffer)

    def spans(self) -> list[slice]:
        tokens = self.hidden.shape[0]
        return [slice(start, min(start + self.chunk, tokens)) for start in range(0, tokens, self.chunk)]

    def exponentials(self, span: slice) -> tuple[Tensor, Tensor, Tensor]:
        """exp(logits - max) (c, V) in the buffer, their sum (c, 1) and the NLL (c,), 0 where not counted."""
        hidden_cD, weight_DV = self.hidden[span], self.weight.T
        buffer_cV = self.buffer[: hidden_cD.shape[0]]
        if hidden_cD.dtype == buffer_cV.dtype:
            torch.mm(hidden_cD, weight_DV, out=buffer_cV)
        elif hidden_cD.is_cuda:
            buffer_cV = torch.mm(hidden_cD, weight_DV, out_dtype=buffer_cV.dtype)
        else:
            buffer_cV.copy_(torch.mm(hidden_cD, weight_DV))
        buffer_cV.sub_(buffer_cV.amax(1, keepdim=True))
        picked_c1 = buffer_cV.gather(1, self.chosen[span, None])
        total_c1 = buffer_cV.exp_().sum(1, keepdim=True)
        nll_c = (total_c1.log() - picked_c1)[:, 0].masked_fill_(~self.counted[span], 0.0)
        return buffer_cV, total_c1, nll_c

    def add_gradients(
        self,
        span: slice,
        exponentials_cV: Tensor,
        total_c1: Tensor,
        scale_c: Tensor,
        dhidden: Tensor | None,
        dweight: Tensor | None,
    ) -> None:
        """Adds `scale` times the gradients of one span; the exponentials are used up.

        softmax - onehot = (exponentials - onehot * total) / total, and the division is left to the narrow operands.
        """
        exponentials_cV.scatter_add_(1, self.chosen[span, None], -total_c1)
        per_row_c1 = scale_c.masked_fill(~self.counted[span], 0.0)[:, None] / total_c1
        errors_cV = exponentials_cV.to(self.hidden.dtype)
        if dhidden is not None:
            dhidden[span] = torch.mm(errors_cV, self.weight) * per_row_c1
        if dweight is not None:
            scaled_cD = (self.hidden[span] * per_row_c1).to(self.hidden.dtype)
            if dweight.dtype == errors_cV.dtype:
                dweight.addmm_(errors_cV.T, scaled_cD)
            else:
                dweight += torch.mm(errors_cV.T, scaled_cD)


def _statistics(hidden_ND: Tensor) -> torch.dtype:
    return torch.float64 if hidden_ND.dtype == torch.float64 else torch.float32


class _Sum(torch.autograd.Function):
    """The summed loss; its gradients for a loss gradient of 1 are kept from the forward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        chosen_N: Tensor,
        counted_N: Tensor,
        chunk: int | None,
        train: bool,
    ) -> Tensor:
        wanted = (train and ctx.needs_input_grad[0], train and ctx.needs_input_grad[1])
        ctx.weight_dtype = weight_VD.dtype
        if any(wanted) and kernels.serve(hidden_ND):
            nll_N, *gradients = _fused(hidden_ND, weight_VD, chosen_N, counted_N, None, chunk, wanted)
            ctx.save_for_backward(*gradients)
            return nll_N.sum()
        chunks = _Chunks.build(hidden_ND, weight_VD, chosen_N, counted_N, chunk)
        dhidden = torch.empty_like(hidden_ND) if wanted[0] else None
        dweight = torch.zeros_like(weight_VD, dtype=chunks.buffer.dtype) if wanted[1] else None
        total = chunks.buffer.new_zeros(())
        ones = chunks.buffer.new_ones(chunks.buffer.shape[0])
        for span in chunks.spans():
            exponentials, totals, nll = chunks.exponentials(span)
            total += nll.sum()
            if dhidden is not None or dweight is not None:
                chunks.add_gradients(span, exponentials, totals, ones[: nll.shape[0]], dhidden, dweight)
        ctx.save_for_backward(dhidden, dweight)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
        dhidden, dweight = ctx.saved_tensors
        return (
            None if dhidden is None else _times(dhidden, dloss, dhidden.dtype),
            None if dweight is None else _times(dweight, dloss, ctx.weight_dtype),
            *(None,) * 4,
        )


def _times(gradient: Tensor, dloss: Tensor, dtype: torch.dtype) -> Tensor:
    if not kernels.serve(gradient):
        return (gradient * dloss).to(dtype)
    from longspan.ops.triton.cross_entropy import times

    product: Tensor = times(gradient, dloss, dtype)
    return product


class _PerToken(torch.autograd.Function):
    """One loss per token; the backward makes the logits again because it does not know the weights before."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        chosen_N: Tensor,
        counted_N: Tensor,
        chunk: int | None,
        train: bool,
    ) -> Tensor:
        chunks = _Chunks.build(hidden_ND, weight_VD, chosen_N, counted_N, chunk)
        loss_N = chunks.buffer.new_empty(hidden_ND.shape[0])
        for span in chunks.spans():
            loss_N[span] = chunks.exponentials(span)[2]
        if train:
            ctx.save_for_backward(hidden_ND, weight_VD, chosen_N, counted_N)
            ctx.chunk = chunk
        return loss_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dloss_N: Tensor) -> tuple[Tensor | None, ...]:
        hidden_ND, weight_VD, chosen_N, counted_N = ctx.saved_tensors
        wanted = (ctx.needs_input_grad[0], ctx.needs_input_grad[1])
        if kernels.serve(hidden_ND):
            _, dhidden, dweight = _fused(hidden_ND, weight_VD, chosen_N, counted_N, dloss_N, ctx.chunk, wanted)
            return dhidden, None if dweight is None else dweight.to(weight_VD.dtype), *(None,) * 4
        chunks = _Chunks.build(hidden_ND, weight_VD, chosen_N, counted_N, ctx.chunk)
        dhidden = torch.empty_like(hidden_ND) if wanted[0] else None
        dweight = torch.zeros_like(weight_VD, dtype=chunks.buffer.dtype) if wanted[1] else None
        for span in chunks.spans():
            exponentials, totals, _ = chunks.exponentials(span)
            chunks.add_gradients(span, exponentials, totals, dloss_N[span], dhidden, dweight)
        return dhidden, None if dweight is None else dweight.to(weight_VD.dtype), *(None,) * 4
