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
from longspan.ops.compiling import never_compiled


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
    multiplication. With "none" the backward computes the logits of a chunk again.

    Args:
        hidden_ND: last hidden states, fp32 or bf16 (fp64 in tests).
        weight_VD: head (or tied embedding) rows; cast to the dtype of `hidden`.
        targets_N: integer class per token; `ignore` marks tokens without loss.
        chunk: tokens whose logits live at the same time; None: `default_chunk`.
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
    chunk = default_chunk(weight_VD.shape[0], weight_VD.device) if chunk is None else chunk
    if chunk < 1:
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
    weight_VD = weight_VD.to(hidden_ND.dtype)
    train = torch.is_grad_enabled()
    loss: Tensor = function.apply(hidden_ND, weight_VD, chosen_N, counted_N, chunk, train)  # type: ignore[no-untyped-call]
    return loss


def default_chunk(vocab_size: int, device: torch.device) -> int:
    """Tokens per chunk: logits that stay near the cache on a CPU, a gigabyte of them on a GPU."""
    elements = 2**22 if device.type == "cpu" else 2**28
    return max(256, elements // vocab_size)


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
    def build(hidden_ND: Tensor, weight_VD: Tensor, chosen_N: Tensor, counted_N: Tensor, chunk: int) -> _Chunks:
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
        ctx: Any, hidden_ND: Tensor, weight_VD: Tensor, chosen_N: Tensor, counted_N: Tensor, chunk: int, train: bool
    ) -> Tensor:
        chunks = _Chunks.build(hidden_ND, weight_VD, chosen_N, counted_N, chunk)
        dhidden = torch.empty_like(hidden_ND) if train and ctx.needs_input_grad[0] else None
        dweight = None
        if train and ctx.needs_input_grad[1]:
            dweight = torch.zeros_like(weight_VD, dtype=chunks.buffer.dtype)
        total = chunks.buffer.new_zeros(())
        ones = chunks.buffer.new_ones(chunk)
        for span in chunks.spans():
            exponentials, totals, nll = chunks.exponentials(span)
            total += nll.sum()
            if dhidden is not None or dweight is not None:
                chunks.add_gradients(span, exponentials, totals, ones[: nll.shape[0]], dhidden, dweight)
        ctx.save_for_backward(dhidden, dweight)
        ctx.weight_dtype = weight_VD.dtype
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
        dhidden, dweight = ctx.saved_tensors
        return (
            None if dhidden is None else (dhidden * dloss).to(dhidden.dtype),
            None if dweight is None else (dweight * dloss).to(ctx.weight_dtype),
            *(None,) * 4,
        )


class _PerToken(torch.autograd.Function):
    """One loss per token; the backward makes the logits again because it does not know the weights before."""

    @staticmethod
    def forward(
        ctx: Any, hidden_ND: Tensor, weight_VD: Tensor, chosen_N: Tensor, counted_N: Tensor, chunk: int, train: bool
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
        chunks = _Chunks.build(hidden_ND, weight_VD, chosen_N, counted_N, ctx.chunk)
        dhidden = torch.empty_like(hidden_ND) if ctx.needs_input_grad[0] else None
        dweight = torch.zeros_like(weight_VD, dtype=chunks.buffer.dtype) if ctx.needs_input_grad[1] else None
        for span in chunks.spans():
            exponentials, totals, _ = chunks.exponentials(span)
            chunks.add_gradients(span, exponentials, totals, dloss_N[span], dhidden, dweight)
        return dhidden, None if dweight is None else dweight.to(weight_VD.dtype), *(None,) * 4
