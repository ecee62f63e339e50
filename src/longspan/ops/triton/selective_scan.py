"""The selective scan of Mamba-1: every program carries the states of a few channels through a segment of a row.

Decays differ per channel and state, so no product spans tokens: the work is a few operations per token, channel and
state, and a program is one warp, whose sums need no barrier. Longer rows are cut into segments that run side by side: a
first pass finds what each adds to a state and keeps of it, a second runs over the segments, and the third begins each
with its state. The backward does the same from the end. Kept for the backward is one state per chunk; the states inside
a chunk are computed again into a scratch that stays in cache. The gradients of A, B, C and D are summed per program and
then in one order: the same bits in every run.

Shapes: B rows, T tokens, E channels, N state, J chunks of Q tokens, S segments of whole chunks, I blocks of channels.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from longspan.ops.triton import selective_scan_kernels as kernels
from longspan.ops.triton.device import on_its_device
from longspan.ops.triton.tiles import has_fast_exp2

CHUNK = 16
CHANNELS = 32
# Chunks of a segment: rows of no more are not cut.
SEGMENT = 16
PASSED = 256
# Of the states inside a chunk; None: that of x.
SCRATCH: torch.dtype | None = None


class Given(NamedTuple):
    """What both directions need, in a form that kernels can walk through."""

    x: Tensor
    dt: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor
    starts: Tensor | None

    @staticmethod
    def of(
        x_BTE: Tensor,
        dt_BTE: Tensor,
        A_EN: Tensor,
        B_BTN: Tensor,
        C_BTN: Tensor,
        D_E: Tensor,
        starts_BT: Tensor | None,
    ) -> Given:
        """Copies what is laid out otherwise; slices of wider rows need none."""
        x, dt, B, C = (_laid_out(z) for z in (x_BTE, dt_BTE, B_BTN, C_BTN))
        starts = None if starts_BT is None else starts_BT.to(torch.uint8)
        return Given(x, dt, A_EN.contiguous(), B, C, D_E.contiguous(), starts)

    @property
    def flags(self) -> Tensor:
        """Where documents start; some pointer where nobody asks."""
        return self.x if self.starts is None else self.starts

    @property
    def sizes(self) -> dict[str, Any]:
        """What all kernels share."""
        channels, state = self.A.shape
        block = int(triton.next_power_of_2(state))
        block_e = min(max(CHANNELS * 16 // block, 1), int(triton.next_power_of_2(channels)))
        shared: dict[str, Any] = {"E": channels, "N": state, "BLOCK_E": block_e, "BLOCK_N": block, "num_warps": 1}
        return shared | {"DOCS": self.starts is not None, "FAST": has_fast_exp2(self.x)}

    @property
    def blocks(self) -> int:
        """Blocks of channels."""
        return int(triton.cdiv(self.A.shape[0], self.sizes["BLOCK_E"]))

    @property
    def segments(self) -> int:
        """Segments of a row."""
        return int(triton.cdiv(self.x.shape[1], CHUNK * SEGMENT))

    def before(self, initial_BNE: Tensor | None) -> Tensor:
        """(B, S, E, N) in fp32: the state before every segment."""
        if self.segments == 1:
            return self._alone(initial_BNE)
        x, dt, B = self.x, self.dt, self.B
        kept, added = self._kept_and_added()
        kernels.segment_ends[(self.blocks, self.segments, x.shape[0])](
            x, dt, self.A, B, self.flags, kept, added, x.shape[1], *(z.stride(0) for z in (x, dt, B)),
            *(z.stride(1) for z in (x, dt, B)), TOKENS=CHUNK * SEGMENT, **self.sizes,
        )  # fmt: skip
        return self._passed(kept, added, initial_BNE, back=False)

    def dafter(self, dy: Tensor, dfinal_BNE: Tensor | None) -> Tensor:
        """(B, S, E, N) in fp32: the gradient of the state after every segment."""
        if self.segments == 1:
            return self._alone(dfinal_BNE)
        dt, C = self.dt, self.C
        kept, added = self._kept_and_added()
        kernels.segment_starts[(self.blocks, self.segments, dy.shape[0])](
            dt, self.A, C, self.flags, dy, kept, added, dy.shape[1], *(z.stride(0) for z in (dt, C, dy)),
            *(z.stride(1) for z in (dt, C, dy)), TOKENS=CHUNK * SEGMENT, **self.sizes,
        )  # fmt: skip
        return self._passed(kept, added, dfinal_BNE, back=True)

    def _kept_and_added(self) -> tuple[Tensor, Tensor]:
        shape = (self.x.shape[0], self.segments, *self.A.shape)
        return self.x.new_empty(shape, dtype=torch.float32), self.x.new_empty(shape, dtype=torch.float32)

    def _passed(self, kept: Tensor, added: Tensor, first_BNE: Tensor | None, back: bool) -> Tensor:
        channels, state = self.A.shape
        kernels.pass_states[(triton.cdiv(channels * state, PASSED), self.x.shape[0])](
            kept, added, added if first_BNE is None else first_BNE.contiguous(), self.segments,
            E=channels, N=state, BLOCK=PASSED, FIRST=first_BNE is not None, BACK=back, num_warps=PASSED // 64,
        )  # fmt: skip
        return added

    def _alone(self, first_BNE: Tensor | None) -> Tensor:
        """(B, 1, E, N): what a single segment begins with."""
        if first_BNE is None:
            return self.x.new_zeros(self.x.shape[0], 1, *self.A.shape, dtype=torch.float32)
        return first_BNE.float().mT.contiguous().unsqueeze(1)


def _laid_out(values: Tensor) -> Tensor:
    return values if values.stride(-1) == 1 else values.contiguous()


@torch.library.custom_op("longspan::selective_scan", mutates_args=())
def selective_scan(
    x_BTE: Tensor,
    dt_BTE: Tensor,
    A_EN: Tensor,
    B_BTN: Tensor,
    C_BTN: Tensor,
    D_E: Tensor,
    starts_BT: Tensor | None,
    initial_BNE: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`ops.selective_scan.selective_scan` with the first tokens of documents marked; the third result is kept."""
    return _run_forward(Given.of(x_BTE, dt_BTE, A_EN, B_BTN, C_BTN, D_E, starts_BT), initial_BNE)


@on_its_device
def _run_forward(given: Given, initial_BNE: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    x, dt, A, B, C, D, _ = given
    rows, time, _ = x.shape
    y, final, states = _like(x, A.shape[1])
    before = given.before(initial_BNE)
    kernels.scan_forward[(given.blocks, given.segments, rows)](
        x, dt, A, B, C, D, given.flags, before, y, final, states, time, states.shape[1],
        *(z.stride(0) for z in (x, dt, B, C)), *(z.stride(1) for z in (x, dt, B, C)),
        Q=CHUNK, CHUNKS=SEGMENT, **given.sizes,
    )  # fmt: skip
    return y, final, states


def _like(x_BTE: Tensor, state: int) -> tuple[Tensor, Tensor, Tensor]:
    rows, time, channels = x_BTE.shape
    final = x_BTE.new_empty(rows, state, channels, dtype=torch.float32)
    states = x_BTE.new_empty(rows, (time + CHUNK - 1) // CHUNK, channels, state, dtype=torch.float32)
    return torch.empty_like(x_BTE, memory_format=torch.contiguous_format), final, states


@selective_scan.register_fake
def _(x_BTE: Tensor, dt_BTE: Tensor, A_EN: Tensor, *_: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    return _like(x_BTE, A_EN.shape[1])


@torch.library.custom_op("longspan::selective_scan_backward", mutates_args=())
def selective_scan_backward(
    dy_BTE: Tensor,
    dfinal_BNE: Tensor | None,
    states: Tensor,
    x_BTE: Tensor,
    dt_BTE: Tensor,
    A_EN: Tensor,
    B_BTN: Tensor,
    C_BTN: Tensor,
    D_E: Tensor,
    starts_BT: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of x, dt, A, B, C, D and the initial state."""
    given = Given.of(x_BTE, dt_BTE, A_EN, B_BTN, C_BTN, D_E, starts_BT)
    return _run_backward(given, dy_BTE, dfinal_BNE, states)


@on_its_device
def _run_backward(
    given: Given, dy_BTE: Tensor, dfinal_BNE: Tensor | None, states: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    x, dt, A, B, C, D, _ = given
    dy = _laid_out(dy_BTE)
    rows, time, channels = x.shape
    state, sizes = A.shape[1], given.sizes
    dafter = given.dafter(dy, dfinal_BNE)
    parts = rows * given.segments
    scratch = x.new_empty(parts * given.blocks, CHUNK, sizes["BLOCK_E"], sizes["BLOCK_N"], dtype=SCRATCH)
    dx, ddt = (torch.empty_like(z, memory_format=torch.contiguous_format) for z in (x, dt))
    dA, dD = (x.new_empty(parts, *z.shape, dtype=torch.float32) for z in (A, D))
    dB, dC = (x.new_empty(given.blocks, rows, time, state, dtype=torch.float32) for _ in range(2))
    dinitial = x.new_empty(rows, state, channels, dtype=torch.float32)
    kernels.scan_backward[(given.blocks, given.segments, rows)](
        x, dt, A, B, C, D, given.flags, states, dy, dafter, scratch, dx, ddt, dA, dB, dC, dD, dinitial,
        rows, time, states.shape[1],
        *(z.stride(0) for z in (x, dt, B, C, dy)), *(z.stride(1) for z in (x, dt, B, C, dy)),
        Q=CHUNK, CHUNKS=SEGMENT, **sizes,
    )  # fmt: skip
    return dx, ddt, dA.sum(0), dB.sum(0).to(B.dtype), dC.sum(0).to(C.dtype), dD.sum(0), dinitial


@selective_scan_backward.register_fake
def _(
    dy_BTE: Tensor,
    dfinal_BNE: Tensor | None,
    states: Tensor,
    x_BTE: Tensor,
    dt_BTE: Tensor,
    A_EN: Tensor,
    B_BTN: Tensor,
    C_BTN: Tensor,
    D_E: Tensor,
    _: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    dx, ddt, dB, dC = (
        torch.empty_like(z, memory_format=torch.contiguous_format) for z in (x_BTE, dt_BTE, B_BTN, C_BTN)
    )
    dA, dD = (z.new_empty(z.shape, dtype=torch.float32) for z in (A_EN, D_E))
    return dx, ddt, dA, dB, dC, dD, x_BTE.new_empty(x_BTE.shape[0], A_EN.shape[1], x_BTE.shape[2], dtype=torch.float32)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    ctx.set_materialize_grads(False)
    ctx.initial = inputs[7] is not None
    ctx.save_for_backward(output[2], *inputs[:7])


def _differentiate(ctx: Any, dy: Tensor | None, dfinal: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    states, *inputs = ctx.saved_tensors
    dy = torch.zeros_like(inputs[0], memory_format=torch.contiguous_format) if dy is None else dy
    *gradients, dinitial = selective_scan_backward(dy, dfinal, states, *inputs)
    gradients = [gradient.to(z.dtype) for gradient, z in zip(gradients, inputs[:6], strict=True)]
    return *gradients, None, dinitial if ctx.initial else None


selective_scan.register_autograd(_differentiate, setup_context=_save)
