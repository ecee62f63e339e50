"""The Mamba-2 scan (SSD) on CUDA: how the kernels are cut and launched.

Kept for the backward are the inputs, the sums of log decays and, unless `KEEP_STATES` is off, one state per chunk in
the dtype of x.

Shapes: B rows, T tokens, J chunks of Q tokens, H heads, P head dim, G groups of heads that share B and C, N state.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from longspan.ops.triton import ssd_gradients, ssd_kernels
from longspan.ops.triton.decays import Decays, heads_of_program, pointer
from longspan.ops.triton.device import on_its_device
from longspan.ops.triton.sums import add_up
from longspan.ops.triton.tiles import block, has_fast_exp2

# Enough programs for any chip; below that the heads of a chunk are shared out.
ENOUGH_PROGRAMS = 264
# Below so many programs that carry states, two for each multiprocessor of an H100, rows are cut into segments, so that
# there are at least the second number: most of the four that a multiprocessor holds.
STATE_PROGRAMS, SEGMENT_PROGRAMS = 264, 384
# A segment of fewer chunks is not worth its beginning.
LEAST_CHUNKS = 16
KEEP_STATES = True


class Launch(NamedTuple):
    """How a kernel is compiled: warps of a program, stages of what is loaded ahead, registers of a thread at most."""

    warps: int
    stages: int
    registers: int | None = None

    def options(self) -> dict[str, int]:
        """As Triton takes them; only NVIDIA's compiler can be held to a number of registers."""
        options = {"num_warps": self.warps, "num_stages": self.stages}
        if self.registers is None or torch.version.hip is not None:
            return options
        return {**options, "maxnreg": self.registers}


class Cut(NamedTuple):
    """How the work is cut: tokens of a chunk, the tile of a state in flight, heads of a program, columns of a state.

    `state*` is for the kernel that carries states, `squares` for those that sum log decays over the tokens of a chunk.
    """

    chunk: int
    state_tile: tuple[int, int]
    states: Launch
    output_heads: int
    outputs: Launch
    gradients: Launch
    part_heads: int
    group_columns: int
    squares: Launch
    precision: str


# Three tf32 products per fp32 product come as near to fp32 as its own sums do, on the tensor cores.
CUTS = {
    torch.bfloat16: Cut(64, (64, 64), Launch(4, 3), 8, Launch(4, 2), Launch(4, 3), 12, 64, Launch(4, 1, 128), "ieee"),
    torch.float32: Cut(16, (64, 32), Launch(4, 1), 4, Launch(4, 1), Launch(4, 1), 12, 64, Launch(4, 1), "tf32x3"),
}


class Inputs(NamedTuple):
    """What both directions need: x (B, T, H, P), dt (B, T, H), B and C (B, T, G, N), A, D and the bias of dt (H,).

    With a bias, dt is what comes before bias and softplus.
    """

    x: Tensor
    dt: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor
    bias: Tensor | None
    doc: Tensor | None
    initial: Tensor | None
    initial_doc: Tensor | None

    def laid_out(self) -> Inputs:
        """Copies what no kernel can walk through; slices of wider rows need none."""
        x, B, C = (
            z if z.stride(-1) == 1 and z.stride(-2) == z.shape[-1] else z.contiguous() for z in (self[0], *self[3:5])
        )
        dt = self.dt if self.dt.stride(-1) == 1 else self.dt.contiguous()
        rest = (None if z is None else z.contiguous() for z in self[5:])
        return Inputs(x, dt, self.A.contiguous(), B, C, *rest)  # type: ignore[arg-type]


class Plan(NamedTuple):
    """The sizes of one call and the arguments that its kernels share."""

    cut: Cut
    chunks: int
    shared: dict[str, Any]
    blocks: tuple[int, int]
    fast: bool

    @staticmethod
    def of(inputs: Inputs) -> Plan:
        """Of inputs that are laid out."""
        x, B = inputs.x, inputs.B
        _, time, heads, head_dim = x.shape
        groups, state = B.shape[2:]
        cut = CUTS[x.dtype]
        chunks = triton.cdiv(time, cut.chunk)
        # The interpreter has no bf16 products; rounding comes first there too.
        operand = {torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}[x.dtype] if x.is_cuda else tl.float32
        shared: dict[str, Any] = {"H": heads, "GROUP": heads // groups, "P": head_dim, "N": state, "Q": cut.chunk}
        shared |= {"OPERAND": operand, "PRECISION": cut.precision}
        return Plan(cut, chunks, shared, (block(head_dim, x), block(state, x)), has_fast_exp2(x))

    def tiled(self, time: int, tile: tuple[int, int] | None = None) -> dict[str, Any]:
        """The shared arguments with the tile of a kernel; WHOLE where every tile is full."""
        block_p, block_n = (min(a, b) for a, b in zip(self.blocks, tile or self.blocks, strict=True))
        whole = time % self.cut.chunk == 0 and self.shared["P"] % block_p == 0 and self.shared["N"] % block_n == 0
        return {**self.shared, "BLOCK_P": block_p, "BLOCK_N": block_n, "WHOLE": whole}

    def segments(self, rows: int, tiles: int) -> int:
        """Into how many a row is cut for the kernel that carries states: 1 where there are programs enough without."""
        programs = rows * self.shared["H"] * tiles
        number = 1 if programs >= STATE_PROGRAMS else triton.cdiv(SEGMENT_PROGRAMS, programs)
        number = max(1, min(number, self.chunks // LEAST_CHUNKS))
        # A segment without a chunk would read past the end.
        return int(triton.cdiv(self.chunks, triton.cdiv(self.chunks, number)))


class Walk(NamedTuple):
    """What the kernel that carries states is given: a (B, T, H, P), b (B, T, G, N), the state to begin with and where
    the last goes; BACK: from the end, for gradients."""

    a: Tensor
    b: Tensor
    begin: Tensor | None
    end: Tensor | None
    back: bool

    def run(self, plan: Plan, decays: Decays, states: Tensor) -> None:
        """Fills `states` and `end`."""
        rows, tiled = self.a.shape[0], plan.tiled(self.a.shape[1], plan.cut.state_tile)
        tiles = triton.cdiv(tiled["P"], tiled["BLOCK_P"]) * triton.cdiv(tiled["N"], tiled["BLOCK_N"])
        segments = plan.segments(rows, tiles)
        a, b, alone, kept, told = self.a, self.b, self.a, self.a, self.a
        if segments > 1:
            sizes = rows, segments, tiled["H"]
            alone = a.new_empty(*sizes, tiled["P"], tiled["N"], dtype=torch.float32)
            kept = a.new_empty(*sizes, tiles, dtype=torch.float32)
            told = a.new_zeros(*sizes, tiles, dtype=torch.int32)
        ssd_kernels.states[(tiles, tiled["H"], rows * segments)](
            a, b, decays.planes, decays.carry, pointer(self.begin, a), states, pointer(self.end, a), alone, kept, told,
            self.a.shape[1], plan.chunks, decays.planes.stride(0), *a.stride()[:2], *b.stride()[:2],
            BACK=self.back, BEGIN=self.begin is not None, END=self.end is not None, SEGMENTS=segments,
            REACH=triton.next_power_of_2(triton.cdiv(plan.chunks, segments)), FAST=plan.fast, **tiled,
            **plan.cut.states.options(),
        )  # fmt: skip


def _states(inputs: Inputs, plan: Plan, decays: Decays, final: Tensor | None) -> Tensor:
    """(B, J, H, P, N): the state before every chunk; `final`, where given, receives the one after the last."""
    x, B = inputs.x, inputs.B
    rows, _, heads, head_dim = x.shape
    states = x.new_empty(rows, plan.chunks, heads, head_dim, B.shape[-1])
    Walk(x, B, inputs.initial, final, False).run(plan, decays, states)
    return states


class Kept(NamedTuple):
    """What the backward finds: the states before the chunks (empty without `KEEP_STATES`) and the `Decays`."""

    states: Tensor
    planes: Tensor
    carry: Tensor
    run: Tensor


@on_its_device
def run_forward(inputs: Inputs) -> tuple[Tensor, Tensor, Kept]:
    """y (B, T, H, P), the last state (B, H, P, N) in fp32, and what the backward needs."""
    inputs = inputs.laid_out()
    plan = Plan.of(inputs)
    by_dt = inputs.dt, inputs.A, inputs.bias, inputs.doc, inputs.initial_doc
    decays = Decays.of(*by_dt, plan.cut.chunk, plan.cut.squares.options())
    x, B, C = inputs.x, inputs.B, inputs.C
    rows, time, heads, head_dim = x.shape
    final = x.new_empty(rows, heads, head_dim, B.shape[-1], dtype=torch.float32)
    states = _states(inputs, plan, decays, final)
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    each = _largest_divisor(plan.shared["GROUP"], plan.cut.output_heads)
    ssd_kernels.outputs[(heads // each, plan.chunks, rows)](
        x, B, C, inputs.D, decays.planes, decays.run, states, y, time, decays.planes.stride(0),
        *x.stride()[:2], *B.stride()[:2], *C.stride()[:2], HEADS=each, FAST=plan.fast, **plan.tiled(time),
        **plan.cut.outputs.options(),
    )  # fmt: skip
    return y, final, Kept(states if KEEP_STATES else x.new_empty(0), *decays)


def forward_like(x_BTHP: Tensor, state: int) -> tuple[Tensor, Tensor, Kept]:
    """What `run_forward` returns, without values."""
    rows, time, heads, head_dim = x_BTHP.shape
    chunk = CUTS[x_BTHP.dtype].chunk
    chunks = (time + chunk - 1) // chunk
    final = x_BTHP.new_empty(rows, heads, head_dim, state, dtype=torch.float32)
    states = x_BTHP.new_empty(rows, chunks, heads, head_dim, state) if KEEP_STATES else x_BTHP.new_empty(0)
    planes = x_BTHP.new_empty(4, rows, heads, chunks * chunk, dtype=torch.float32)
    carry = x_BTHP.new_empty(rows, heads, chunks, dtype=torch.float32)
    run = x_BTHP.new_empty(rows, chunks * chunk, dtype=torch.int32)
    return torch.empty_like(x_BTHP, memory_format=torch.contiguous_format), final, Kept(states, planes, carry, run)


def _largest_divisor(number: int, limit: int) -> int:
    return max(d for d in range(1, limit + 1) if number % d == 0)


class Gradients(NamedTuple):
    """Where the gradients of x, B and C go."""

    x: Tensor
    B: Tensor
    C: Tensor

    @staticmethod
    def like(inputs: Inputs) -> Gradients:
        """Tensors of their own."""
        return Gradients(
            *(torch.empty_like(z, memory_format=torch.contiguous_format) for z in inputs[0:1] + inputs[3:5])
        )


@on_its_device
def run_backward(
    inputs: Inputs, kept: Kept, dy: Tensor, dfinal: Tensor | None, into: Gradients, ddt: Tensor
) -> tuple[Tensor, Tensor | None]:
    """Fills `into` and `ddt`; returns the gradients of A, D and, where there is one, the bias of dt, as rows of one
    tensor (of which each would be a kernel to copy), and that of the state."""
    inputs = inputs.laid_out()
    plan = Plan.of(inputs)
    decays = Decays(*kept[1:])
    x, dt, _, B, C = inputs[:5]
    rows, time, heads, head_dim = x.shape
    states = kept.states if kept.states.numel() else _states(inputs, plan, decays, None)
    if not (dy.stride(-1) == 1 and dy.stride(-2) == head_dim):
        dy = dy.contiguous()
    dstates, dinitial = _state_gradients(inputs, plan, decays, dy, dfinal)
    plane = decays.planes.stride(0)
    groups, group = B.shape[2], plan.shared["GROUP"]
    whole = plan.tiled(time)
    columns = min(whole["BLOCK_N"], plan.cut.group_columns)
    tiles = triton.cdiv(B.shape[-1], columns)
    of_tokens = decays.planes.new_empty(ssd_gradients.READ.value + tiles, *decays.planes.shape[1:])
    passed = decays.carry.new_empty(rows, tiles, heads, plan.chunks, plan.blocks[0])
    parts = _parts(group, plan.chunks * rows * groups, plan.cut.part_heads)
    dscores = x.new_empty(rows, groups * parts, plan.chunks, plan.cut.chunk, plan.cut.chunk)
    strides = [*x.stride()[:2], *B.stride()[:2], *C.stride()[:2], *dy.stride()[:2]]
    into_strides = [*into.B.stride()[:2], *into.C.stride()[:2]]
    ssd_gradients.gradients[(groups * (parts + tiles), plan.chunks, rows)](
        x, B, C, inputs.D, dy, decays.planes, decays.run, states, dstates, into.x, dscores, into.B, into.C,
        of_tokens, passed, time, plane, *strides, *into.x.stride()[:2], *into_strides,
        COLUMNS=columns, HEADS=group // parts, FAST=plan.fast, **whole, **plan.cut.gradients.options(),
    )  # fmt: skip
    of_chunks = x.new_empty(2 if inputs.bias is None else 3, rows, plan.chunks, heads, dtype=torch.float32)
    ssd_gradients.last_gradients[(groups + 1, plan.chunks, rows)](
        dt, pointer(inputs.bias, dt), inputs.A, B, C, *decays, of_tokens, passed, dscores, ddt,
        *of_chunks[:2], of_chunks[-1], into.B, into.C, time, plane, *dt.stride()[:2], *ddt.stride()[:2],
        *B.stride()[:2], *C.stride()[:2], *into_strides,
        H=heads, GROUPS=groups, N=B.shape[-1], Q=plan.cut.chunk, BLOCK_P=plan.blocks[0], BLOCK_N=whole["BLOCK_N"],
        HEADS=heads_of_program(heads), PARTS=parts, TILES=tiles, SOFTPLUS=inputs.bias is not None,
        WHOLE=whole["WHOLE"], OPERAND=whole["OPERAND"], PRECISION=whole["PRECISION"], **plan.cut.squares.options(),
    )  # fmt: skip
    return add_up(of_chunks.flatten(1, 2)), dinitial


def _state_gradients(
    inputs: Inputs, plan: Plan, decays: Decays, dy: Tensor, dfinal: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """(B, J, H, P, N), of the state after every chunk; and of the one before the first, if there is one."""
    x, C = inputs.x, inputs.C
    rows, _, heads, head_dim = x.shape
    dinitial = None if inputs.initial is None else torch.empty_like(inputs.initial, dtype=torch.float32)
    dstates = x.new_empty(rows, plan.chunks, heads, head_dim, C.shape[-1])
    Walk(dy, C, None if dfinal is None else dfinal.contiguous(), dinitial, True).run(plan, decays, dstates)
    return dstates, dinitial


def _parts(group: int, programs: int, most: int) -> int:
    """Into how many parts of at most `most` heads a group is cut, so that there are enough programs."""
    parts = (d for d in range(1, group + 1) if group % d == 0 and group // d <= most)
    return next((d for d in parts if d * programs >= ENOUGH_PROGRAMS), group)
