"""Short causal depthwise convolution that never looks across a document boundary.

A few taps are cheaper as shifted multiply-adds over rows that stay in cache than as a library convolution, which wants
(B, D, T) and a mask of its own. The backward computes the sum before the activation again instead of keeping it.

Shapes: B batch, T time, D channels, K taps; tap k looks k tokens back and has the weight in column K-1-k.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from longspan.foundation.errors import UserError
from longspan.ops import kernels

LARGEST_KERNEL_TAPS = 4
TILE_TOKENS = 512


def causal_conv(
    x_BTD: Tensor,
    weight_DK: Tensor,
    bias_D: Tensor | None,
    *,
    doc_BT: Tensor | None = None,
    tail_BKD: Tensor | None = None,
    tail_doc_BK: Tensor | None = None,
    activation: Literal["silu"] | None = "silu",
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Computes `y[t] = act(bias + sum_k weight[:, K-1-k] * x[t-k])` over the taps inside the document of t.

    The order of the taps is that of `torch.nn.Conv1d` and of `causal_conv1d_fn` (Dao-AILab/causal-conv1d).

    Args:
        x_BTD: inputs, T >= 1.
        weight_DK: one filter per channel; the last column multiplies x[t].
        bias_D: added before the activation, or None.
        doc_BT: document ids; a tap counts only where `doc[t-k] == doc[t]`. None: one document.
        tail_BKD: the K-1 inputs before x, (B, K-1, D); None: the sequence starts here.
        tail_doc_BK: document ids of the tail, (B, K-1); None: the tail belongs to the document of `doc_BT[:, 0]`.
        activation: "silu" or None.

    Returns:
        y (B, T, D); the tail to hand to the next call (B, K-1, D); its document ids (B, K-1), None without documents.

    Raises:
        UserError: an unknown activation, or shapes that do not fit.
    """
    taps = weight_DK.shape[1]
    batch, time, channels = x_BTD.shape
    if activation not in ("silu", None):
        raise UserError(f"activation {activation!r}", "'silu' or None", "name one of the two")
    if taps < 2:
        raise UserError(f"a convolution of {taps} taps", "2 taps or more", "multiply by a weight instead")
    if weight_DK.shape[0] != channels or (tail_BKD is not None and tail_BKD.shape != (batch, taps - 1, channels)):
        tail_shape = None if tail_BKD is None else tuple(tail_BKD.shape)
        raise UserError(
            f"x {tuple(x_BTD.shape)}, weight {tuple(weight_DK.shape)}, tail {tail_shape}",
            "x (B,T,D), weight (D,K), tail (B,K-1,D)",
            "align the channels and keep K-1 inputs in the tail",
        )
    if time > 1 and tail_BKD is None and taps <= LARGEST_KERNEL_TAPS and kernels.serve(x_BTD):
        from longspan.ops.triton.causal_conv import causal_conv as kernel

        y_BTD = kernels.called(kernel)(x_BTD, weight_DK, bias_D, doc_BT, activation == "silu")
        if time >= taps:
            # Views: no more launches than the kernel itself.
            return y_BTD, x_BTD[:, time - taps + 1 :], None if doc_BT is None else doc_BT[:, time - taps + 1 :]
        docs = None if doc_BT is None else _with_tail(doc_BT, tail_doc_BK, taps)[:, time:]
        return y_BTD, _last(x_BTD, x_BTD.new_zeros(batch, taps - 1, channels)), docs
    taps_KD = weight_DK.to(x_BTD.dtype).T
    bias_D = x_BTD.new_zeros(channels) if bias_D is None else bias_D.to(x_BTD.dtype)
    tail_BKD = x_BTD.new_zeros(batch, taps - 1, channels) if tail_BKD is None else tail_BKD.to(x_BTD.dtype)
    docs = None if doc_BT is None else _with_tail(doc_BT, tail_doc_BK, taps)
    same_KBT1 = _same_document(docs, taps, x_BTD.dtype)
    if time == 1:
        # Reversed: `same` counts back from the token, the tail forward to it.
        seen_BKD = tail_BKD if same_KBT1 is None else tail_BKD * same_KBT1[:, :, 0].flip(0).transpose(0, 1)
        y_BD, _ = causal_conv_step(x_BTD[:, 0], taps_KD.T, bias_D, seen_BKD)
        y_BTD = (F.silu(y_BD) if activation == "silu" else y_BD)[:, None]
        tail = torch.cat((tail_BKD, x_BTD), dim=1)[:, 1:]
    else:
        silu = activation == "silu"
        y_BTD = _Conv.apply(x_BTD, taps_KD, bias_D, tail_BKD, same_KBT1, silu)  # type: ignore[no-untyped-call]
        tail = _last(x_BTD, tail_BKD)
    return y_BTD, tail, None if docs is None else docs[:, time:]


def _with_tail(doc_BT: Tensor, tail_doc_BK: Tensor | None, taps: int) -> Tensor:
    """The ids of the tail, then those of x."""
    before = doc_BT[:, :1].expand(-1, taps - 1) if tail_doc_BK is None else tail_doc_BK.to(doc_BT.dtype)
    return torch.cat((before, doc_BT), dim=1)


def _last(x_BTD: Tensor, tail_BKD: Tensor) -> Tensor:
    """The last K-1 inputs."""
    reach, time = tail_BKD.shape[1], x_BTD.shape[1]
    return x_BTD[:, time - reach :] if time > reach else torch.cat((tail_BKD, x_BTD), dim=1)[:, time:]


def _same_document(docs: Tensor | None, taps: int, dtype: torch.dtype) -> Tensor | None:
    """(K-1, B, T, 1): 1 where the token k back (k = index + 1) is of the same document; None: all are."""
    if docs is None:
        return None
    now = docs[:, taps - 1 :]
    same = torch.stack([docs[:, taps - 1 - k : docs.shape[1] - k] == now for k in range(1, taps)])
    if docs.device.type == "cpu" and bool(same.all()):
        return None
    return same.to(dtype)[..., None]


def causal_conv_step(x_BD: Tensor, weight_DK: Tensor, bias_D: Tensor | None, tail_BKD: Tensor) -> tuple[Tensor, Tensor]:
    """One token of `causal_conv`, before the activation: the window is so small that one product beats K shifted ones.

    Returns:
        y (B, D), and the tail for the next token (B, K-1, D).
    """
    window_BKD = torch.cat((tail_BKD, x_BD.unsqueeze(1)), dim=1)
    y_BD = (window_BKD * weight_DK.T).sum(1)
    return y_BD if bias_D is None else y_BD.add_(bias_D), window_BKD[:, 1:]


class _Tile(NamedTuple):
    """Some tokens of some rows as views: x (r, t, D), the K-1 inputs before them, and where taps stay inside."""

    x: Tensor
    before: Tensor
    same: Tensor | None

    def shifted(self, k: int) -> tuple[Tensor, Tensor]:
        """The inputs k tokens back of t = k.. and of t = 0..k-1, zero where they are of another document."""
        first = min(k, self.x.shape[1])
        start = self.before.shape[1] - k
        past, recent = self.before[:, start : start + first], self.x[:, : self.x.shape[1] - first]
        if self.same is None:
            return recent, past
        return recent * self.same[k - 1, :, first:], past * self.same[k - 1, :, :first]

    def convolve(self, taps_KD: Tensor, bias_D: Tensor) -> Tensor:
        """The sum before the activation."""
        last = taps_KD.shape[0] - 1
        z = torch.addcmul(bias_D, self.x, taps_KD[last])
        for k in range(1, last + 1):
            recent, past = self.shifted(k)
            z[:, past.shape[1] :].addcmul_(recent, taps_KD[last - k])
            z[:, : past.shape[1]].addcmul_(past, taps_KD[last - k])
        return z


def _ranges(x_BTD: Tensor, reach: int) -> list[tuple[slice, slice]]:
    """Rows and times that fit the cache together, never shorter than the reach of the taps; a GPU takes all at once."""
    batch, time = x_BTD.shape[:2]
    tokens = max(TILE_TOKENS * torch.get_num_threads(), reach) if x_BTD.device.type == "cpu" else batch * time
    rows = max(1, tokens // time)
    return [
        (slice(row, min(row + rows, batch)), slice(start, min(start + tokens, time)))
        for row in range(0, batch, rows)
        for start in range(0, time, tokens)
    ]


def _before(values_BTD: Tensor, tail_BKD: Tensor, rows: slice, start: int) -> Tensor:
    """What lies in the K-1 places before `start`, as a view."""
    reach = tail_BKD.shape[1]
    return tail_BKD[rows] if start == 0 else values_BTD[rows, start - reach : start]


def _tile(x_BTD: Tensor, tail_BKD: Tensor, same_KBT1: Tensor | None, rows: slice, times: slice) -> _Tile:
    same = None if same_KBT1 is None else same_KBT1[:, rows, times]
    return _Tile(x_BTD[rows, times], _before(x_BTD, tail_BKD, rows, times.start), same)


class _Conv(torch.autograd.Function):
    """Convolution and activation as one step that keeps only its inputs."""

    @staticmethod
    def forward(
        ctx: Any,
        x_BTD: Tensor,
        taps_KD: Tensor,
        bias_D: Tensor,
        tail_BKD: Tensor,
        same_KBT1: Tensor | None,
        silu: bool,
    ) -> Tensor:
        taps_KD = taps_KD.contiguous()
        y = torch.empty_like(x_BTD, memory_format=torch.contiguous_format)
        for rows, times in _ranges(x_BTD, tail_BKD.shape[1]):
            z = _tile(x_BTD, tail_BKD, same_KBT1, rows, times).convolve(taps_KD, bias_D)
            y[rows, times] = F.silu(z, inplace=True) if silu else z
        ctx.save_for_backward(x_BTD, taps_KD, bias_D, tail_BKD, same_KBT1)
        ctx.silu = silu
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_BTD: Tensor) -> tuple[Tensor | None, ...]:
        x_BTD, taps_KD, bias_D, tail_BKD, same_KBT1 = ctx.saved_tensors
        last = taps_KD.shape[0] - 1
        dx = torch.empty_like(x_BTD, memory_format=torch.contiguous_format)
        dtail, dtaps, dbias = torch.zeros_like(tail_BKD), torch.zeros_like(taps_KD), torch.zeros_like(bias_D)
        for rows, times in _ranges(x_BTD, tail_BKD.shape[1]):
            tile = _tile(x_BTD, tail_BKD, same_KBT1, rows, times)
            dz = dy_BTD[rows, times]
            if ctx.silu:
                dz = torch.ops.aten.silu_backward(dz, tile.convolve(taps_KD, bias_D))
            dbias += dz.sum((0, 1))
            dtaps[last] += (dz * tile.x).sum((0, 1))
            dx_tile, dbefore = dx[rows, times], _before(dx, dtail, rows, times.start)
            torch.mul(dz, taps_KD[last], out=dx_tile)
            for k in range(1, last + 1):
                seen = dz if tile.same is None else dz * tile.same[k - 1]
                first = min(k, tile.x.shape[1])
                recent, past = slice(0, tile.x.shape[1] - first), slice(last - k, last - k + first)
                dx_tile[:, recent].addcmul_(seen[:, first:], taps_KD[last - k])
                dbefore[:, past].addcmul_(seen[:, :first], taps_KD[last - k])
                dtaps[last - k] += (seen[:, first:] * tile.x[:, recent]).sum((0, 1))
                dtaps[last - k] += (seen[:, :first] * tile.before[:, past]).sum((0, 1))
        return dx, dtaps, dbias, dtail, None, None
