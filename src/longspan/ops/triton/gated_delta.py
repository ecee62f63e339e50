"""The gated delta rule on CUDA: how the kernels are cut, launched and made known to autograd and the compiler.

Kept for the backward are the inputs, the decays and, per chunk and head, the inverse of the system, the corrections u
and the state before the chunk, in the dtype of v; all else is computed again. Where few programs would carry the states
of whole rows, rows are cut into segments: what each makes of any state is found first, for all of them at once.

Shapes: B rows, T tokens, J chunks of Q tokens, H heads, K key dim, V value dim.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from longspan.ops.triton import gated_delta_kernels as kernels
from longspan.ops.triton.decays import Decays, pointer
from longspan.ops.triton.device import on_its_device
from longspan.ops.triton.tiles import block


class Launch(NamedTuple):
    """Warps of a program, stages of its loops, and how many registers a thread may have where that is limited."""

    warps: int
    stages: int
    registers: int | None = None

    def options(self) -> dict[str, int]:
        """For Triton."""
        limit = {} if self.registers is None else {"maxnreg": self.registers}
        return {"num_warps": self.warps, "num_stages": self.stages, **limit}


class Cut(NamedTuple):
    """Tokens of a chunk, values of a tile with and without a state in flight, precisions, and launches by kernel.

    Tiles on a GPU are no narrower than `tiles.NARROWEST`. `solve`: what the operands of the inverse are rounded to. Its
    entries are 2 at most with keys of length 1 and beta up to 2, so that fp16 is as good as tf32, with half the bytes.
    """

    chunk: int
    state_values: int
    values: int
    precision: str
    solve: tl.dtype
    launches: Mapping[str, Launch]


# Programs that carry states: one to a multiprocessor of a large chip; a segment has so many chunks at least.
SEGMENT_PROGRAMS, FEWEST_SEGMENTS, SHORTEST_SEGMENT = 144, 3, 8
STATEFUL = ("states", "state_gradients")
CUTS = {
    torch.bfloat16: Cut(64, 64, 64, "ieee", tl.float16, {
        "systems": Launch(4, 1, 168),
        "states": Launch(4, 3),
        "outputs": Launch(4, 2),
        "correction_gradients": Launch(4, 2),
        "state_gradients": Launch(4, 2),
        "mixing_gradients": Launch(4, 2),
        "system_gradients": Launch(4, 1),
    }),
    torch.float32: Cut(16, 32, 32, "tf32x3", tl.float32, defaultdict(lambda: Launch(4, 1))),
}  # fmt: skip


class Inputs(NamedTuple):
    """What both directions need: q and k (B, T, H, K), v (B, T, H, V), g and beta (B, T, H), documents, the state."""

    q: Tensor
    k: Tensor
    v: Tensor
    g: Tensor
    beta: Tensor
    doc: Tensor | None
    initial: Tensor | None
    initial_doc: Tensor | None

    def laid_out(self) -> Inputs:
        """Copies what no kernel can walk through; slices of wider rows need none."""
        heads = (_by_heads(z) for z in self[:3])
        numbers = (z if z.stride(-1) == 1 else z.contiguous() for z in self[3:5])
        return Inputs(*heads, *numbers, *(None if z is None else z.contiguous() for z in self[5:]))

    def strides(self, *names: str) -> list[int]:
        """Of rows and tokens."""
        return [size for name in names for size in getattr(self, name).stride()[:2]]


def _by_heads(z: Tensor) -> Tensor:
    return z if z.stride(-1) == 1 and z.stride(-2) == z.shape[-1] else z.contiguous()


def segments_of(v_BTHV: Tensor) -> tuple[int, int]:
    """Segments of a row, where states that run through whole rows would leave most of a chip idle, and their chunks.

    What a segment makes of any state is found first, which takes longer than the states themselves where no document
    ends: two segments would gain nothing.
    """
    rows, time, heads, values = v_BTHV.shape
    cut = CUTS[v_BTHV.dtype]
    chunks = -(-time // cut.chunk)
    programs = rows * heads * -(-values // min(cut.state_values, block(values, v_BTHV)))
    segments = min(SEGMENT_PROGRAMS // programs, chunks // SHORTEST_SEGMENT)
    length = -(-chunks // segments) if segments >= FEWEST_SEGMENTS else chunks
    return -(-chunks // length), length


class Plan(NamedTuple):
    """The sizes of one call and the arguments that its kernels share."""

    cut: Cut
    rows: int
    time: int
    chunks: int
    segments: int
    length: int
    shared: dict[str, Any]
    block_v: int

    @staticmethod
    def of(inputs: Inputs) -> Plan:
        """Of inputs that are laid out."""
        rows, time, heads, key_dim = inputs.k.shape
        cut = CUTS[inputs.v.dtype]
        # The interpreter has no bf16 products; rounding comes first there too.
        operand = {torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}[inputs.v.dtype]
        shared: dict[str, Any] = {"H": heads, "K": key_dim, "V": inputs.v.shape[-1], "Q": cut.chunk}
        shared |= {"BLOCK_K": block(key_dim, inputs.v), "OPERAND": operand if inputs.v.is_cuda else tl.float32}
        shared["PRECISION"] = cut.precision
        chunks, (segments, length) = triton.cdiv(time, cut.chunk), segments_of(inputs.v)
        return Plan(cut, rows, time, chunks, segments, length, shared, block(inputs.v.shape[-1], inputs.v))

    def of_kernel(self, name: str) -> dict[str, Any]:
        """The shared arguments, the kernel's tiles and launch; WHOLE where every tile is full."""
        block_v = min(self.cut.state_values if name in STATEFUL else self.cut.values, self.block_v)
        whole = self.time % self.cut.chunk == 0 and self.shared["K"] == self.shared["BLOCK_K"]
        whole = whole and self.shared["V"] % block_v == 0
        return {**self.shared, "BLOCK_V": block_v, "WHOLE": whole, **self.cut.launches[name].options()}

    @property
    def span(self) -> int:
        """Chunks of a segment, as a block."""
        return int(triton.next_power_of_2(self.length))

    def state_grid(self, *columns: int) -> tuple[int, int, int]:
        """Programs of the kernels that carry states of so many columns over all segments."""
        width = min(self.cut.state_values, self.block_v)
        return sum(triton.cdiv(size, width) for size in columns), self.shared["H"], self.rows * self.segments

    @property
    def grid(self) -> tuple[int, int, int]:
        """Programs of the others."""
        return self.shared["H"], self.chunks, self.rows

    def of_segments(self, like: Tensor, columns: int) -> Tensor:
        """States (B, segments, H, K, columns) in fp32."""
        sizes = (self.rows, self.segments, self.shared["H"], self.shared["K"], columns)
        return like.new_empty(sizes, dtype=torch.float32)

    def joined(self, maps: Tensor, ends: Tensor, start: Tensor | None, back: bool) -> Tensor:
        """What every segment starts with, from what each makes of nothing; `back`: from the last to the first."""
        starts, (_, _, _, key_dim, value_dim) = torch.empty_like(ends), ends.shape
        block_v = min(self.cut.state_values, self.block_v)
        kernels.joined[triton.cdiv(value_dim, block_v), ends.shape[2], self.rows](
            maps, ends, pointer(start, ends), starts, self.segments, H=ends.shape[2], K=key_dim, V=value_dim,
            BLOCK_K=self.shared["BLOCK_K"], BLOCK_V=block_v, INITIAL=start is not None, BACK=back,
            num_warps=max(4, self.shared["BLOCK_K"] // 16), num_stages=2,
        )  # fmt: skip
        return starts

    def scratch(self, like: Tensor, *sizes: int) -> Tensor:
        """(B, J, H, ...) in the dtype of `like`."""
        return like.new_empty(self.rows, self.chunks, self.shared["H"], *sizes)


class Kept(NamedTuple):
    """What a forward leaves for its backward beside its inputs; maps: of states over segments, if there are several."""

    norms: Tensor
    inverses: Tensor
    u: Tensor
    states: Tensor
    planes: Tensor
    carry: Tensor
    run: Tensor
    maps: Tensor

    @property
    def decays(self) -> Decays:
        """Of the forward."""
        return Decays(self.planes, self.carry, self.run)


class Gradients(NamedTuple):
    """Where the gradients of q, k (B, T, H, K) and v (B, T, H, V) go: the numbers of all heads of a token in a row."""

    q: Tensor
    k: Tensor
    v: Tensor


@on_its_device
def run_forward(inputs: Inputs) -> tuple[Tensor, Tensor, Kept]:
    """o (B, T, H, V), the last state (B, H, K, V) in fp32, and what the backward needs."""
    inputs = inputs.laid_out()
    plan = Plan.of(inputs)
    q, k, v, g, beta, doc, initial, initial_doc = inputs
    decays = Decays.of(g, None, None, doc, initial_doc, plan.cut.chunk)
    plane = decays.planes.stride(0)
    o, final, norms, inverses, u, states, maps = _results(v, k.shape[-1])
    kernels.systems[plan.grid](
        q, k, beta, decays.planes, norms, decays.run, inverses, plan.time, plane,
        *inputs.strides("q", "k", "beta"), LEVELS=plan.cut.chunk.bit_length() - 1, SOLVE=plan.cut.solve,
        **plan.of_kernel("systems"),
    )  # fmt: skip

    def run_states(columns: tuple[int, ...], begin: Tensor | None, end: Tensor, ends: bool) -> None:
        kernels.states[plan.state_grid(*columns)](
            k, v, beta, decays.planes, norms, decays.carry, pointer(begin, v), inverses, u, states, end, maps,
            plan.time, plan.chunks, plane, plan.segments, plan.length, *inputs.strides("k", "v", "beta"),
            INITIAL=begin is not None, ENDS=ends, SPAN=plan.span, **plan.of_kernel("states"),
        )  # fmt: skip

    begin = initial
    if plan.segments > 1:
        ends = plan.of_segments(v, v.shape[-1])
        run_states((v.shape[-1], k.shape[-1]), None, ends, True)
        begin = plan.joined(maps, ends, initial, back=False)
    run_states((v.shape[-1],), begin, final, False)
    kernels.outputs[plan.grid](
        q, k, decays.planes, norms, decays.run, u, states, o, plan.time, plane, *inputs.strides("q", "k"),
        **plan.of_kernel("outputs"),
    )  # fmt: skip
    return o, final, Kept(norms, inverses, u, states, *decays, maps)


def _results(v_BTHV: Tensor, key_dim: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Room for what kernels of the forward write: o, the last state, norms, inverses, corrections, states, maps."""
    rows, time, heads, value_dim = v_BTHV.shape
    size = CUTS[v_BTHV.dtype].chunk
    chunks, segments = (time + size - 1) // size, segments_of(v_BTHV)[0]
    return (
        torch.empty_like(v_BTHV, memory_format=torch.contiguous_format),
        v_BTHV.new_empty(rows, heads, key_dim, value_dim, dtype=torch.float32),
        v_BTHV.new_empty(2, rows, heads, chunks * size, dtype=torch.float32),
        v_BTHV.new_empty(rows, chunks, heads, size, size),
        v_BTHV.new_empty(rows, chunks, heads, size, value_dim),
        v_BTHV.new_empty(rows, chunks, heads, key_dim, value_dim),
        v_BTHV.new_empty(rows, segments if segments > 1 else 0, heads, key_dim, key_dim, dtype=torch.float32),
    )


def like(v_BTHV: Tensor, key_dim: int) -> tuple[Tensor, Tensor, Kept]:
    """What `run_forward` returns, without values."""
    o, final, norms, inverses, u, states, maps = _results(v_BTHV, key_dim)
    _, rows, heads, padded = norms.shape
    planes, carry = norms.new_empty(4, rows, heads, padded), norms.new_empty(rows, heads, inverses.shape[1])
    run = norms.new_empty(rows, padded, dtype=torch.int32)
    return o, final, Kept(norms, inverses, u, states, planes, carry, run, maps)


@on_its_device
def run_backward(
    inputs: Inputs, kept: Kept, do: Tensor, dfinal: Tensor | None, into: Gradients
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Fills the gradients of q, k and v; returns those of g, beta and, where there is one, the initial state."""
    inputs = inputs.laid_out()
    plan = Plan.of(inputs)
    q, k, v, g, beta, _, initial, _ = inputs
    norms, inverses, u, states, *_ = kept
    do = _by_heads(do)
    decays = kept.decays
    plane = decays.planes.stride(0)
    du, dstates = torch.empty_like(u), torch.empty_like(states)
    dg, dbeta = (torch.empty_like(z, memory_format=torch.contiguous_format) for z in (g, beta))
    kernels.correction_gradients[plan.grid](
        q, k, do, decays.planes, norms, decays.run, du, plan.time, plane,
        *inputs.strides("q", "k"), *do.stride()[:2], **plan.of_kernel("correction_gradients"),
    )  # fmt: skip
    dinitial = None if initial is None else torch.empty_like(initial, dtype=torch.float32)

    def run_states(dend: Tensor | None, dbegin: Tensor | None, ends: bool) -> None:
        kernels.state_gradients[plan.state_grid(v.shape[-1])](
            q, k, beta, do, decays.planes, norms, decays.carry, inverses, pointer(dend, v), du, dstates,
            pointer(dbegin, v), plan.time, plan.chunks, plane, plan.segments, plan.length,
            *inputs.strides("q", "k", "beta"), *do.stride()[:2],
            FINAL=dend is not None, INITIAL=dbegin is not None, ENDS=ends, SPAN=plan.span,
            **plan.of_kernel("state_gradients"),
        )  # fmt: skip

    dend = None if dfinal is None else dfinal.contiguous()
    if plan.segments > 1:
        begins = plan.of_segments(v, v.shape[-1])
        run_states(None, begins, True)
        dend = plan.joined(kept.maps, begins, dend, back=True)
    run_states(dend, dinitial, False)
    dk_part = plan.scratch(v, plan.cut.chunk, k.shape[-1])
    dsums = torch.empty_like(decays.planes[0])
    kernels.mixing_gradients[plan.grid](
        q, k, do, decays.planes, norms, decays.carry, decays.run, u, states, dstates, into.q, dk_part, dsums,
        plan.time, plane, *inputs.strides("q", "k"), *do.stride()[:2], *into.q.stride()[:2],
        **plan.of_kernel("mixing_gradients"),
    )  # fmt: skip
    kernels.system_gradients[plan.grid](
        k, v, beta, decays.planes, norms, decays.run, u, du, states, dk_part, dsums,
        into.k, into.v, dg, dbeta, plan.time, plane,
        *inputs.strides("k", "v", "beta"), *into.k.stride()[:2], *into.v.stride()[:2],
        **plan.of_kernel("system_gradients"),
    )  # fmt: skip
    return dg, dbeta, dinitial


@torch.library.custom_op("longspan::gated_delta", mutates_args=())
def gated_delta(
    q_BTHK: Tensor,
    k_BTHK: Tensor,
    v_BTHV: Tensor,
    g_BTH: Tensor,
    beta_BTH: Tensor,
    doc_BT: Tensor | None,
    initial_BHKV: Tensor | None,
    initial_doc_B: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`ops.gated_delta.gated_delta`; all results after the second are for the backward."""
    inputs = Inputs(q_BTHK, k_BTHK, v_BTHV, g_BTH, beta_BTH, doc_BT, initial_BHKV, initial_doc_B)
    o, final, kept = run_forward(inputs)
    return o, final, *kept


@gated_delta.register_fake
def _(q: Tensor, k_BTHK: Tensor, v_BTHV: Tensor, *_: Tensor | None) -> tuple[Tensor, ...]:
    o, final, kept = like(v_BTHV, k_BTHK.shape[-1])
    return o, final, *kept


@torch.library.custom_op("longspan::gated_delta_backward", mutates_args=())
def gated_delta_backward(
    do_BTHV: Tensor,
    dfinal_BHKV: Tensor | None,
    norms: Tensor,
    inverses: Tensor,
    u: Tensor,
    states: Tensor,
    planes: Tensor,
    carry: Tensor,
    run: Tensor,
    maps: Tensor,
    q_BTHK: Tensor,
    k_BTHK: Tensor,
    v_BTHV: Tensor,
    g_BTH: Tensor,
    beta_BTH: Tensor,
    doc_BT: Tensor | None,
    initial_BHKV: Tensor | None,
    initial_doc_B: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of q, k, v, g, beta and the initial state (empty where there is none)."""
    inputs = Inputs(q_BTHK, k_BTHK, v_BTHV, g_BTH, beta_BTH, doc_BT, initial_BHKV, initial_doc_B)
    kept = Kept(norms, inverses, u, states, planes, carry, run, maps)
    into = Gradients(*(torch.empty_like(z, memory_format=torch.contiguous_format) for z in inputs[:3]))
    dg, dbeta, dinitial = run_backward(inputs, kept, do_BTHV, dfinal_BHKV, into)
    return *into, dg, dbeta, v_BTHV.new_empty(0, dtype=torch.float32) if dinitial is None else dinitial


@gated_delta_backward.register_fake
def _(do_BTHV: Tensor, dfinal_BHKV: Tensor | None, *others: Any) -> tuple[Tensor, ...]:
    given = Inputs(*others[len(Kept._fields) :])
    gradients = (torch.empty_like(z, memory_format=torch.contiguous_format) for z in given[:5])
    shape = (0,) if given.initial is None else given.initial.shape
    return *gradients, given.v.new_empty(shape, dtype=torch.float32)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output[2:], *inputs)


def _differentiate(ctx: Any, do: Tensor | None, dfinal: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors
    inputs = saved[len(Kept._fields) :]
    do = torch.zeros_like(inputs[2], memory_format=torch.contiguous_format) if do is None else do
    *gradients, dinitial = gated_delta_backward(do, dfinal, *saved)
    return *gradients, None, None if inputs[6] is None else dinitial, None


gated_delta.register_autograd(_differentiate, setup_context=_save)
