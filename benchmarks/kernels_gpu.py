"""The Triton kernels on one GPU: are they right, how fast are they, how far from what the chip allows.

    python benchmarks/kernels_gpu.py                       # everything, most important first, about three minutes
    python benchmarks/kernels_gpu.py --check               # correctness alone
    python benchmarks/kernels_gpu.py --only conv,ssd --seconds 60

First the two ceilings of this card are measured: a copy of 2 GiB (bytes read plus bytes written) and an 8192-cubed bf16
product. Kernels are checked against the plain ops in fp64 over the same rounded inputs, on fresh random documents, with
every allocation poisoned beforehand, twice for the same bits. Times are medians of CUDA events (`do_bench`) at 65,536
tokens in bf16; `floor` is the larger of fewest bytes over the copy's rate and operations over the product's. A part
that fails says so and the next one runs; parts that would start after `--seconds` are left out and named. Prints a
table and, as its last line, one JSON object, which also goes to $OUT/kernels_gpu.json where OUT is set.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import threading
import time as clock
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from longspan.ops import kernels
from longspan.ops.attention import attention, flex_block_mask
from longspan.ops.causal_conv import causal_conv
from longspan.ops.gated_delta import gated_delta
from longspan.ops.selective_scan import selective_scan
from longspan.ops.ssd import ssd

BF16, FP32 = torch.bfloat16, torch.float32
TOLERANCE = {FP32: 1e-4, BF16: 1e-2}
SHAPES = ((32, 2048), (4, 16384))
WIDTH, HEADS, HEAD_DIM, STATE, INNER = 768, 24, 64, 128, 1536
DELTA_HEADS = 9
CONVOLVED, PROJECTED = INNER + 2 * STATE, 2 * INNER + 2 * STATE + HEADS
DEVICE = torch.device("cuda")


TOLD = "@"
"""Begins a line that a process tells its parent."""


class Run:
    """What a process measures, told to the parent on the way."""

    def __init__(self) -> None:
        self.failed: list[str] = []
        self.bytes_per_second = self.flops_per_second = float("nan")

    def tell(self, what: str, value: Any) -> None:
        """One line to the parent."""
        print(TOLD + json.dumps({what: value}), flush=True)

    def add(self, part: str, **values: Any) -> None:
        """One row."""
        self.tell("row", {"part": part, **values})

    def floor_ms(self, num_bytes: float, flops: float) -> float:
        return 1e3 * max(num_bytes / self.bytes_per_second, flops / self.flops_per_second)


def median_ms(function: Callable[[], object], rep: int = 60) -> float:
    from triton.testing import do_bench

    return float(do_bench(function, warmup=15, rep=rep, return_mode="median"))


def normal(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
    return torch.randn(shape, device=DEVICE).to(dtype)


def documents(rows: int, time: int, mean: float) -> Tensor:
    return (torch.rand(rows, time, device=DEVICE) < 1.0 / mean).cumsum(1).int()


@contextmanager
def poisoned() -> Iterator[None]:
    """Memory that an op takes holds NaN, so that what it never writes shows."""
    torch._C._set_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch._C._set_deterministic_algorithms(False)


def both_ways(function: Callable[..., Sequence[Tensor]], leaves: Sequence[Tensor]) -> list[Tensor]:
    outputs = function(*leaves)
    generator = torch.Generator(DEVICE).manual_seed(1)
    slopes = [torch.randn(y.shape, device=DEVICE, generator=generator).to(BF16).to(y.dtype) for y in outputs]
    return [*(y.detach() for y in outputs), *torch.autograd.grad(list(outputs), list(leaves), slopes)]


def compare(
    run: Run,
    name: str,
    kernel: Callable[..., Sequence[Tensor]],
    plain: Callable[..., Sequence[Tensor]],
    leaves: Sequence[Tensor],
    roundings: int = 1,
) -> None:
    """Values and gradients of the kernel against the plain op in fp64."""
    leaves = [z.detach().requires_grad_() for z in leaves]
    with poisoned():
        ours = both_ways(kernel, leaves)
        again = both_ways(kernel, leaves)
    before = kernels.choose("plain")
    exact = both_ways(plain, [z.detach().double().requires_grad_() for z in leaves])
    kernels.choose(before)
    errors = [float((a.double() - b).norm() / b.norm().clamp(min=1e-12)) for a, b in zip(ours, exact, strict=True)]
    same = all(torch.equal(a, b) for a, b in zip(ours, again, strict=True))
    limit = roundings * max(TOLERANCE[z.dtype] for z in leaves)
    right = max(errors) < limit and all(e == e for e in errors)
    run.add(f"check {name}", right=right, same_bits=same, worst=max(errors), errors=[f"{e:.1e}" for e in errors])
    if not right:
        run.failed.append(f"check {name}: {max(errors):.1e}")


def ssd_inputs(rows: int, time: int, heads: int, head_dim: int, state: int, dtype: torch.dtype = BF16) -> list[Tensor]:
    return [
        normal(rows, time, heads, head_dim, dtype=dtype),
        F.softplus(normal(rows, time, heads, dtype=FP32) - 3.0),
        -torch.rand(heads, device=DEVICE) * 15 - 1,
        normal(rows, time, 1, state, dtype=dtype),
        normal(rows, time, 1, state, dtype=dtype),
        normal(heads, dtype=FP32),
    ]


def check_conv(run: Run) -> None:
    for dtype, rows, time, channels in ((BF16, 3, 1000, CONVOLVED), (FP32, 2, 77, 100)):
        doc = documents(rows, time, 20.0)
        leaves = [normal(rows, time, channels, dtype=dtype), normal(channels, 4, dtype=FP32)]
        leaves.append(normal(channels, dtype=FP32))
        compare(
            run,
            f"conv {dtype} T={time}",
            lambda *z, doc=doc: [causal_conv(*z, doc_BT=doc)[0]],
            lambda *z, doc=doc: [causal_conv(*z, doc_BT=doc)[0]],
            leaves,
        )


def check_ssd(
    dtype: torch.dtype, rows: int, time: int, heads: int, head_dim: int, state: int, mean: float, goes_on: bool = False
) -> Callable[[Run], None]:
    """Documents of `mean` tokens; goes on from states, one of which is of another document."""

    def check(run: Run) -> None:
        doc = documents(rows, time, mean) + 1
        doc[:, 0] = torch.arange(rows, device=DEVICE) % 2 + doc[:, 1] - 1
        before = doc[:, 0].clone()
        before[0] -= 1
        leaves = ssd_inputs(rows, time, heads, head_dim, state, dtype)
        if goes_on:
            leaves.append(normal(rows, heads, head_dim, state, dtype=FP32))

        def scan(*z: Tensor) -> Sequence[Tensor]:
            past = {"initial_state_BHPN": z[6], "initial_doc_B": before} if goes_on else {}
            return ssd(*z[:6], doc_BT=doc, **past)

        compare(run, f"ssd {dtype} T={time} P={head_dim} N={state}", scan, scan, leaves)

    return check


def scan_inputs(rows: int, time: int, channels: int, state: int, dtype: torch.dtype = BF16) -> list[Tensor]:
    return [
        normal(rows, time, channels, dtype=dtype),
        F.softplus(normal(rows, time, channels, dtype=FP32) - 3.0),
        -torch.rand(channels, state, device=DEVICE) * 15 - 1,
        normal(rows, time, state, dtype=dtype),
        normal(rows, time, state, dtype=dtype),
        normal(channels, dtype=FP32),
    ]


def check_scan(run: Run) -> None:
    for dtype, rows, time, channels, state in ((BF16, 2, 300, INNER, 16), (FP32, 3, 77, 100, 7)):
        doc = documents(rows, time, 20.0)

        def scan(*z: Tensor, doc: Tensor = doc) -> Sequence[Tensor]:
            return selective_scan(*z, doc_BT=doc)

        compare(run, f"scan {dtype} T={time}", scan, scan, scan_inputs(rows, time, channels, state, dtype))


def delta_inputs(rows: int, time: int, heads: int, key_dim: int, value_dim: int, dtype: torch.dtype = BF16):
    return [
        normal(rows, time, heads, key_dim, dtype=dtype),
        normal(rows, time, heads, key_dim, dtype=dtype),
        normal(rows, time, heads, value_dim, dtype=dtype),
        -F.softplus(normal(rows, time, heads, dtype=FP32) - 3.0) * 4.0,
        torch.sigmoid(normal(rows, time, heads, dtype=FP32)),
    ]


def check_delta(
    dtype: torch.dtype,
    rows: int,
    time: int,
    heads: int,
    key_dim: int,
    value_dim: int,
    mean: float,
    goes_on: bool = False,
    chunk: int | None = None,
) -> Callable[[Run], None]:
    """As `check_ssd`; `chunk`: another than is used."""

    def check(run: Run) -> None:
        from longspan.ops.triton import gated_delta as launched

        if chunk is not None:
            launched.CUTS[dtype] = launched.CUTS[dtype]._replace(chunk=chunk)
        doc = documents(rows, time, mean) + 1
        before = doc[:, 0].clone()
        before[0] -= 1
        leaves = delta_inputs(rows, time, heads, key_dim, value_dim, dtype)
        if goes_on:
            leaves.append(normal(rows, heads, key_dim, value_dim, dtype=FP32))

        def scan(*z: Tensor) -> Sequence[Tensor]:
            past = {"initial_state_BHKV": z[5], "initial_doc_B": before} if goes_on else {}
            return gated_delta(*z[:5], doc_BT=doc, **past)

        name = f"delta {dtype} T={time} K={key_dim} V={value_dim} chunk={launched.CUTS[dtype].chunk}"
        compare(run, name, scan, scan, leaves, roundings=2)

    return check


def check_attention(run: Run) -> None:
    rows, time = 2, 700
    doc = documents(rows, time, 150.0)
    for window in (None, 200):
        mask = flex_block_mask(doc, window=window)
        rules: dict[str, Any] = {"q_doc_BT": doc, "window": window}
        compare(
            run,
            f"attention window {window}",
            lambda *z, rules=rules, mask=mask: [attention(*z, **rules, backend="flex", block_mask=mask)],
            lambda *z, rules=rules: [attention(*z, **rules, backend="reference")],
            [normal(rows, time, 12, 64) for _ in range(3)],
        )


def check_norm(run: Run) -> None:
    from longspan.models.norms import GatedRMSNorm, RMSNorm

    def apply(kind: type[RMSNorm], *z: Tensor) -> list[Tensor]:
        module = kind(z[-1].shape[0], 1e-5)
        del module.weight
        module.weight = z[-1]
        return [module(*z[:-1])]

    def plain(*z: Tensor) -> list[Tensor]:
        x = z[0] if len(z) == 2 else z[0] * F.silu(z[1])
        return [F.rms_norm(x, x.shape[-1:], z[-1], 1e-5)]

    for dtype, width in ((BF16, INNER), (FP32, 100)):
        leaves = [normal(2, 500, width, dtype=dtype), normal(2, 500, width, dtype=dtype), normal(width, dtype=FP32)]
        compare(run, f"gated norm {dtype}", lambda *z: apply(GatedRMSNorm, *z), plain, leaves)
        compare(run, f"norm {dtype}", lambda *z: apply(RMSNorm, *z), plain, [leaves[0], leaves[2]])
    from longspan.ops.triton.rms_norm import add_rms_norm

    leaves = [normal(2, 500, WIDTH, dtype=FP32), normal(2, 500, WIDTH), normal(WIDTH, dtype=FP32)]
    compare(run, "norm of a sum", lambda *z: add_rms_norm(*z, 1e-5, BF16), summed_and_normed, leaves)


def check_layer(run: Run) -> None:
    from longspan.models.segments import Segments
    from longspan.ops import mamba2

    rows, time = 2, 500
    doc = documents(rows, time, 50.0)
    mixer = mamba2_layer()
    sizes = [INNER, CONVOLVED, HEADS]

    def plain(projected: Tensor, weight: Tensor, bias: Tensor, dt_bias: Tensor, A_log: Tensor, D: Tensor, w: Tensor):
        z, xBC, dt = projected.unflatten(0, (rows, time)).split_with_sizes(sizes, -1)
        x, B, C = causal_conv(xBC, weight, bias, doc_BT=doc)[0].split_with_sizes([INNER, STATE, STATE], -1)
        dt = F.softplus(dt + dt_bias)
        y, _ = ssd(x.unflatten(2, (HEADS, HEAD_DIM)), dt, -A_log.exp(), B[:, :, None], C[:, :, None], D, doc_BT=doc)
        return [F.rms_norm(y.flatten(2) * F.silu(z), (INNER,), w, 1e-5).flatten(0, 1)]

    parameters = (mixer.conv_weight, mixer.conv_bias, mixer.dt_bias, mixer.A_log, mixer.D, mixer.norm.weight)
    compare(
        run,
        "layer between projections",
        lambda *z: [mamba2.between_projections(*z, doc_BT=doc, rows=rows, state=STATE, eps=1e-5)],
        plain,
        [normal(rows * time, PROJECTED), *parameters],
        # A norm takes from dD most of what its terms are, but not their rounding.
        roundings=4,
    )
    x = normal(rows, time, WIDTH)
    segments = Segments.build(doc)
    with torch.no_grad(), torch.autocast("cuda", dtype=BF16):
        fused, _ = mixer(x, segments, None)
        before = kernels.choose("plain")
        stepwise, _ = mixer(x, segments, None)
        kernels.choose(before)
    error = float((fused.float() - stepwise.float()).norm() / stepwise.float().norm())
    run.add("check layer against plain torch", right=error < 2e-2, worst=error)
    if not error < 2e-2:
        run.failed.append(f"check layer against plain torch: {error:.1e}")


def mamba2_layer() -> Any:
    from longspan.models.mixers.mamba2 import Mamba2, Mamba2Settings

    mixer = Mamba2(WIDTH, Mamba2Settings(state=STATE, mamba_head_dim=HEAD_DIM))
    mixer.init_weights(torch.Generator().manual_seed(0))
    return mixer.to(DEVICE)


def measure_ceilings(run: Run) -> None:
    source = torch.empty(1 << 30, dtype=torch.uint8, device=DEVICE).random_()
    target = torch.empty_like(source)
    copy = median_ms(lambda: target.copy_(source))
    run.bytes_per_second = 2 * source.numel() / copy * 1e3
    a, b = normal(8192, 8192), normal(8192, 8192)
    product = median_ms(lambda: a @ b)
    run.flops_per_second = 2 * 8192**3 / product * 1e3
    run.add("ceilings", copy_TB_s=run.bytes_per_second / 1e12, matmul_TFLOP_s=run.flops_per_second / 1e12)


def time_both(
    run: Run, name: str, function: Callable[..., Sequence[Tensor]], leaves: Sequence[Tensor], floor: float, **more: Any
) -> float:
    """Forward alone and forward with backward, as a training step calls them."""
    leaves = [z.detach().requires_grad_() for z in leaves]
    slopes = [torch.randn_like(y) for y in function(*leaves)]
    with torch.no_grad():
        forward = median_ms(lambda: function(*leaves))
    both = median_ms(lambda: torch.autograd.grad(list(function(*leaves)), leaves, slopes))
    run.add(name, forward_ms=forward, both_ms=both, floor_ms=floor, of_floor=floor / both, **more)
    return both


def bench_conv(run: Run) -> None:
    # Forward: x and y; backward: x, dy and dx.
    floor = run.floor_ms(5 * 65_536 * CONVOLVED * 2, 0)
    for rows, time in SHAPES:
        wide = normal(rows, time, PROJECTED)
        leaves = [wide[..., INNER : INNER + CONVOLVED], normal(CONVOLVED, 4, dtype=FP32), normal(CONVOLVED, dtype=FP32)]
        doc = documents(rows, time, 700.0)
        without = time_both(run, f"conv {rows}x{time}", lambda *z: [causal_conv(*z)[0]], leaves, floor)
        with_documents = time_both(
            run, f"conv {rows}x{time} documents", lambda *z, doc=doc: [causal_conv(*z, doc_BT=doc)[0]], leaves, floor
        )
        run.add(f"conv {rows}x{time} isolation", costs=with_documents / without - 1)


def ssd_floor(run: Run) -> float:
    tokens, chunk = 65_536, 64
    wide, narrow, states = tokens * INNER * 2, tokens * STATE * 2, tokens // chunk * INNER * STATE * 2
    # Forward x, B, C, y and the states; backward x, B, C, dy, the states and dx, dB, dC, each once.
    moved = (2 * wide + 2 * narrow + states) + (3 * wide + 4 * narrow + states)
    flops = 3 * tokens * (chunk * (STATE + INNER) + 4 * INNER * STATE)
    return run.floor_ms(moved, flops)


def bench_ssd(run: Run) -> None:
    floor = ssd_floor(run)
    for rows, time in SHAPES:
        leaves = ssd_inputs(rows, time, HEADS, HEAD_DIM, STATE)
        doc = documents(rows, time, 700.0)
        without = time_both(run, f"ssd {rows}x{time}", lambda *z: ssd(*z)[:1], leaves, floor)
        with_documents = time_both(
            run, f"ssd {rows}x{time} documents", lambda *z, doc=doc: ssd(*z, doc_BT=doc)[:1], leaves, floor
        )
        run.add(f"ssd {rows}x{time} isolation", costs=with_documents / without - 1)


def profile(run: Run, name: str, function: Callable[[], object]) -> None:
    """Which kernel takes how long, of one call after a warm one."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as recording

    function()
    torch.cuda.synchronize()
    with recording(activities=[ProfilerActivity.CUDA]) as trace:
        for _ in range(3):
            function()
        torch.cuda.synchronize()
    times = {e.key: e.self_device_time_total / 3e3 for e in trace.key_averages() if e.self_device_time_total > 0}
    for key, ms in sorted(times.items(), key=lambda item: -item[1])[:16]:
        run.add(f"profile {name}", ms=ms, kernel=key[:70])


def profile_ssd(run: Run) -> None:
    for rows, time in SHAPES:
        leaves = [z.requires_grad_() for z in ssd_inputs(rows, time, HEADS, HEAD_DIM, STATE)]
        slope = normal(rows, time, HEADS, HEAD_DIM)
        profile(
            run,
            f"ssd {rows}x{time}",
            lambda leaves=leaves, slope=slope: torch.autograd.grad(ssd(*leaves)[0], leaves, slope),
        )


def variants_ssd(run: Run) -> None:
    """Other cuts of the same work, one kernel at a time; which is best may differ from card to card."""
    from longspan.ops.triton import ssd as launched

    usual = launched.CUTS[BF16]
    long = {"chunk": 128, "output_warps": (8, 3), "gradient_warps": (8, 2), "group_warps": (8, 3)}
    changes: list[dict[str, Any]] = [
        {"all_warps": None},
        {"all_warps": (4, 2)},
        {"all_warps": (4, 3)},
        {**long, "all_warps": None},
        {**long, "all_warps": (8, 2)},
        {"all_warps": None, "output_heads": 12},
    ]
    shapes = (*SHAPES, (1, 32_768))
    inputs = {shape: ssd_inputs(*shape, HEADS, HEAD_DIM, STATE) for shape in shapes}
    slopes = {shape: normal(*shape, HEADS, HEAD_DIM) for shape in shapes}
    expected: dict[tuple[int, int], list[Tensor]] = {}
    few = launched.MULTIPROCESSORS
    for change in (*changes, {"segments": False}):
        segments = change.get("segments", True)
        launched.MULTIPROCESSORS = few if segments else 0
        launched.CUTS[BF16] = usual if not segments else usual._replace(**change)
        try:
            for shape, leaves in inputs.items():
                if not segments and shape[0] > 1:
                    continue
                given = launched.Inputs(*leaves, None, None, None, None)
                y, _, states = launched.run_forward(given)
                into, ddt, dy = launched.Gradients.like(given), torch.empty_like(leaves[1]), slopes[shape]
                dA, dD, *_ = launched.run_backward(given, states, dy, None, into, ddt)
                found = [z.clone() for z in (y, *into, ddt, dA, dD)]
                known = expected.setdefault(shape, found)
                apart = max(
                    float((a.float() - b.float()).norm() / b.float().norm()) for a, b in zip(found, known, strict=True)
                )
                forward = median_ms(lambda given=given: launched.run_forward(given), rep=30)
                backward = median_ms(
                    lambda g=given, s=states, y=dy, i=into, d=ddt: launched.run_backward(g, s, y, None, i, d), rep=30
                )
                name = f"ssd cut {shape[0]}x{shape[1]}"
                run.add(name, forward_ms=forward, backward_ms=backward, apart=apart, change=str(change))
        except Exception as error:
            run.add("ssd cut failed", change=str(change), error=f"{type(error).__name__}: {str(error)[:200]}")
        finally:
            launched.CUTS[BF16], launched.MULTIPROCESSORS = usual, few


def variants_scan(run: Run) -> None:
    """Sizes of the Mamba-1 scan."""
    from longspan.ops.triton import selective_scan as launched

    usual = launched.CHUNK, launched.SEGMENT, launched.CHANNELS
    for rows, time in SHAPES:
        leaves = [z.requires_grad_() for z in scan_inputs(rows, time, INNER, 16)]
        doc, slope = documents(rows, time, 700.0), normal(rows, time, INNER)
        scan = lambda v=leaves, d=doc: selective_scan(*v, doc_BT=d)[0]  # noqa: E731
        for sizes in (usual, (16, 16, 32), (8, 32, 32), (8, 16, 32), (8, 32, 16), (4, 64, 32), (8, 64, 32)):
            launched.CHUNK, launched.SEGMENT, launched.CHANNELS = sizes
            try:
                both = median_ms(lambda f=scan, v=leaves, s=slope: torch.autograd.grad(f(), v, s), rep=30)
                run.add(f"scan cut {rows}x{time}", both_ms=both, chunk_segment_channels=str(sizes))
            finally:
                launched.CHUNK, launched.SEGMENT, launched.CHANNELS = usual


def bench_scan(run: Run) -> None:
    """Mamba-1; no product spans tokens, so what counts beside bytes is the exponentials."""
    tokens = 65_536
    floor = run.floor_ms(tokens * INNER * (2 + 4 + 2) + tokens * INNER * (2 + 4 + 2 + 2 + 4), 0)
    for rows, time in SHAPES:
        leaves = scan_inputs(rows, time, INNER, 16)
        doc = documents(rows, time, 700.0)
        time_both(
            run, f"scan {rows}x{time} documents", lambda *z, doc=doc: selective_scan(*z, doc_BT=doc)[:1], leaves, floor
        )
        leaves, slope = [z.requires_grad_() for z in leaves], normal(rows, time, INNER)
        scan = lambda v=leaves, d=doc: selective_scan(*v, doc_BT=d)[0]  # noqa: E731
        profile(run, f"scan {rows}x{time}", lambda f=scan, v=leaves, s=slope: torch.autograd.grad(f(), v, s))


def bench_delta(run: Run) -> None:
    """Gated DeltaNet at 3/4 of the width in keys and twice that in values."""
    keys, values, chunk = DELTA_HEADS * 64, DELTA_HEADS * 128, 64
    # Forward q, k, v, o and the states; backward q, k, v, do, the states and dq, dk, dv, each once.
    moved = 65_536 * 2 * ((2 * keys + 2 * values + values * 64 / chunk) * 2 + 2 * keys + values)
    flops = 3 * 65_536 * (chunk * (3 * keys + 2 * values) + 6 * values * 64)
    floor = run.floor_ms(moved, flops)
    for rows, time in SHAPES:
        leaves = delta_inputs(rows, time, DELTA_HEADS, 64, 128)
        doc = documents(rows, time, 700.0)
        time_both(run, f"delta {rows}x{time}", lambda *z: gated_delta(*z)[:1], leaves, floor)
        scan = lambda *z, doc=doc: gated_delta(*z, doc_BT=doc)[:1]  # noqa: E731
        time_both(run, f"delta {rows}x{time} documents", scan, leaves, floor)
        leaves = [z.requires_grad_() for z in leaves]
        slope = normal(rows, time, DELTA_HEADS, 128)
        profile(run, f"delta {rows}x{time}", lambda v=leaves, s=slope, f=scan: torch.autograd.grad(f(*v), v, s))


def bench_attention(run: Run) -> None:
    """Isolated documents of about 700 tokens; operations are counted inside documents alone."""
    for rows, time in SHAPES:
        doc = documents(rows, time, 700.0)
        mask = flex_block_mask(doc)
        starts = F.pad((doc[:, 1:] != doc[:, :-1]), (1, 0), value=True).flatten().nonzero()[:, 0]
        lengths = torch.diff(starts, append=starts.new_tensor([rows * time])).double()
        flops = 3.5 * 2 * float((lengths**2).sum()) * WIDTH
        leaves = [normal(rows, time, 12, 64) for _ in range(3)]
        time_both(
            run,
            f"attention {rows}x{time} documents",
            lambda *z, doc=doc, mask=mask: [attention(*z, q_doc_BT=doc, backend="flex", block_mask=mask)],
            leaves,
            run.floor_ms(12 * 65_536 * WIDTH * 2, flops),
            mask_ms=median_ms(lambda doc=doc: flex_block_mask(doc)),
        )


def variants_conv(run: Run) -> None:
    from longspan.ops.triton import causal_conv as launched

    rows, time = SHAPES[0]
    x = normal(rows, time, CONVOLVED)
    weight, bias, dx = normal(CONVOLVED, 4, dtype=FP32), normal(CONVOLVED, dtype=FP32), torch.empty_like(x)
    doc = documents(rows, time, 700.0)
    usual = launched.FORWARD, launched.BACKWARD
    for tile in ((64, 16, 64, 4), (64, 8, 64, 4), (128, 8, 64, 4), (32, 8, 64, 4), (64, 4, 128, 4), (64, 8, 128, 8)):
        try:
            launched.FORWARD = launched.BACKWARD = launched.Tile(*tile)
            forward = median_ms(lambda: launched.run_forward(x, weight, bias, doc, True), rep=30)
            backward = median_ms(lambda: launched.run_backward(dx, x, x, weight, bias, doc, True), rep=30)
            run.add("conv tile", forward_ms=forward, backward_ms=backward, tile=str(tile))
        finally:
            launched.FORWARD, launched.BACKWARD = usual


def variants_norm(run: Run) -> None:
    """Warps of a row and programs of the backward, of the gated norm and of that of a sum."""
    from longspan.ops.triton import rms_norm as launched

    usual = launched._warps, launched.PROGRAMS
    y, z, weight = normal(8, 4096, INNER), normal(8, 4096, INNER), normal(INNER, dtype=FP32)
    dy, dz = torch.empty_like(y).view(-1, INNER), torch.empty_like(z).view(-1, INNER)
    x, branch, scale = normal(8, 4096, WIDTH, dtype=FP32), normal(8, 4096, WIDTH), normal(WIDTH, dtype=FP32)
    for warps, programs in ((4, 1056), (8, 1056), (8, 2112), (2, 1056), (2, 2112), (4, 2112)):
        launched._warps, launched.PROGRAMS = (lambda _, warps=warps: warps), programs
        try:
            run.add(
                "norms of 32,768 tokens",
                gated_forward_ms=median_ms(lambda: launched.run_forward(y, z, weight, 1e-5, BF16), rep=20),
                gated_backward_ms=median_ms(lambda: launched.run_backward(y, y, z, weight, 1e-5, dy, dz), rep=20),
                sum_forward_ms=median_ms(lambda: launched.add_rms_norm(x, branch, scale, 1e-5, BF16), rep=20),
                sum_backward_ms=median_ms(
                    lambda: launched.add_rms_norm_backward(x, branch, x, scale, 1e-5, FP32, BF16), rep=20
                ),
                warps=warps,
                programs=programs,
            )
        finally:
            launched._warps, launched.PROGRAMS = usual


def bench_norm(run: Run) -> None:
    from longspan.models.norms import GatedRMSNorm

    norm = GatedRMSNorm(INNER, 1e-5).to(DEVICE)
    norm.init_weights()
    y, z = normal(32, 2048, INNER), normal(32, 2048, INNER)
    floor = run.floor_ms(8 * 65_536 * INNER * 2, 0)
    time_both(run, "gated norm", lambda *t: [norm(*t)], [y, z], floor)


def summed_and_normed(x: Tensor, branch: Tensor, weight: Tensor) -> list[Tensor]:
    """As plain ops."""
    total = x + branch
    return [total, (F.rms_norm(total, total.shape[-1:], eps=1e-5) * weight).to(branch.dtype)]


def bench_add_norm(run: Run) -> None:
    """The residual stream with a branch added, and its norm: one op, and as a compiler fuses plain ops."""
    from longspan.ops.triton.rms_norm import add_rms_norm

    # Forward x, branch, sum, norm; backward sum, both gradients that come, both that go.
    floor = run.floor_ms(32_768 * WIDTH * (4 + 2 + 4 + 2 + 4 + 4 + 2 + 4 + 2), 0)
    leaves = [normal(8, 4096, WIDTH, dtype=FP32), normal(8, 4096, WIDTH), normal(WIDTH, dtype=FP32)]
    time_both(run, "sum and norm, 32,768 tokens", lambda *z: add_rms_norm(*z, 1e-5, BF16), leaves, floor)
    compiled = torch.compile(summed_and_normed, dynamic=False)
    time_both(run, "sum and norm, compiled", compiled, leaves, floor)
    leaves, slopes = [z.requires_grad_() for z in leaves], [torch.randn_like(z) for z in leaves[:2]]
    profile(run, "sum and norm", lambda: torch.autograd.grad(add_rms_norm(*leaves, 1e-5, BF16), leaves, slopes))
    profile(run, "sum and norm, compiled", lambda: torch.autograd.grad(compiled(*leaves), leaves, slopes))


def bench_layer(run: Run) -> None:
    from longspan.models.segments import Segments

    mixer = mamba2_layer()
    products = 6 * 65_536 * WIDTH * (PROJECTED + INNER)
    # Beside the products: convolution, scan and norm at their floors.
    rest = run.floor_ms(5 * 65_536 * CONVOLVED * 2 + 8 * 65_536 * INNER * 2, 0) + ssd_floor(run)
    floor = run.floor_ms(0, products) + rest
    for rows, time in SHAPES:
        x = normal(rows, time, WIDTH)
        for doc in (None, documents(rows, time, 700.0)):
            segments = Segments.build(doc, shape=(rows, time), device=DEVICE)
            name = f"mamba2 layer {rows}x{time}" + ("" if doc is None else " documents")

            def layer(x: Tensor, *_: Tensor, segments: Segments = segments) -> list[Tensor]:
                with torch.autocast("cuda", dtype=BF16):
                    return [mixer(x, segments, None)[0]]

            torch.cuda.reset_peak_memory_stats()
            parameters = list(mixer.parameters())
            leaves = [x.requires_grad_(), *parameters]
            slope = normal(rows, time, WIDTH)
            both = median_ms(lambda f=layer, v=leaves, s=slope: torch.autograd.grad(f(*v), v, s))
            peak = torch.cuda.max_memory_allocated() / 2**30
            run.add(name, both_ms=both, floor_ms=floor, of_floor=floor / both, peak_GiB=peak)
    profile(run, name, lambda: torch.autograd.grad(layer(*leaves), leaves, slope))


def bench_plain(run: Run) -> None:
    """What the same ops cost in plain torch, at fewer tokens and scaled up: the whole needs more memory."""
    before = kernels.choose("plain")
    rows, time = 4, 2048
    scale = 65_536 / (rows * time)
    try:
        leaves = [z.requires_grad_() for z in ssd_inputs(rows, time, HEADS, HEAD_DIM, STATE)]
        slope = normal(rows, time, HEADS, HEAD_DIM)
        both = median_ms(lambda: torch.autograd.grad(ssd(*leaves)[0], leaves, slope))
        run.add("ssd plain torch, scaled", both_ms=both * scale)
        x, weight = normal(rows, time, CONVOLVED).requires_grad_(), normal(CONVOLVED, 4, dtype=FP32).requires_grad_()
        both = median_ms(lambda: torch.autograd.grad(causal_conv(x, weight, None)[0].sum(), (x, weight)))
        run.add("conv plain torch, scaled", both_ms=both * scale)
    finally:
        kernels.choose(before)


def bench_step(run: Run, *patterns: str) -> None:
    from longspan.models.budget import training_flops_per_token
    from longspan.models.language_model import LanguageModel, ModelConfig

    vocab = 32_000
    shapes = {
        "M": ModelConfig(pattern="M" * 24, width=WIDTH, heads=12, state=STATE, mlp="none"),
        "AM": ModelConfig(pattern="AM" * 6, width=WIDTH, heads=12, state=STATE, mlp_width=1536),
        "A": ModelConfig(pattern="A" * 12, width=WIDTH, heads=12, mlp_width=2048),
    }
    for name, config in ((name, shapes[name]) for name in patterns):
        model = LanguageModel(config, vocab, seed=0, device=DEVICE)
        optimizer = torch.optim.AdamW(model.parameter_groups(0.1), lr=1e-4, fused=True)
        size = sum(p.numel() for p in model.parameters())
        for rows, time in ((8, 4096), (1, 32768)) if name == "M" else ((8, 4096),):
            tokens = torch.randint(0, vocab, (rows, time), device=DEVICE)
            doc = documents(rows, time, 700.0)
            segments = model.segments(tokens, doc)

            def step(tokens: Tensor = tokens, segments: Any = segments, model: Any = model, optimizer: Any = optimizer):
                with torch.autocast("cuda", dtype=BF16):
                    nll, count = model.loss(tokens, tokens, segments)
                (nll / count).backward()
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)

            try:
                torch.cuda.reset_peak_memory_stats()
                step()
                ms = median_ms(step, rep=500)
            except torch.OutOfMemoryError:
                run.add(f"step {name} {rows}x{time}", error="out of memory")
                continue
            rate = rows * time / ms * 1e3
            used = rate * training_flops_per_token(config, vocab, time) / run.flops_per_second
            peak = torch.cuda.max_memory_allocated() / 2**30
            run.add(
                f"step {name} {rows}x{time}",
                ms=ms,
                tok_s=rate,
                of_matmul=used,
                peak_GiB=peak,
                parameters=size,
                eager=True,
            )
        del model, optimizer


# Each in a process of its own: what a kernel does to a device outlives it there.
CHECKS: dict[str, Callable[[Run], None]] = {
    "check conv": check_conv,
    "check norm": check_norm,
    "check ssd": check_ssd(BF16, 2, 1024, HEADS, HEAD_DIM, STATE, 100.0),
    "check ssd one-token documents": check_ssd(BF16, 2, 331, 4, HEAD_DIM, STATE, 1.0),
    "check ssd fp32": check_ssd(FP32, 2, 200, 4, HEAD_DIM, STATE, 30.0, True),
    "check ssd 24 40": check_ssd(BF16, 3, 200, 3, 24, 40, 30.0, True),
    "check ssd 8 4": check_ssd(BF16, 3, 200, 3, 8, 4, 30.0, True),
    "check ssd 128 128": check_ssd(BF16, 2, 200, 3, 128, 128, 30.0, True),
    "check layer": check_layer,
    "check scan": check_scan,
    "check delta": check_delta(BF16, 2, 1024, DELTA_HEADS, 64, 128, 100.0),
    "check delta fp32": check_delta(FP32, 2, 200, 4, 64, 128, 30.0, True),
    "check delta 128 64": check_delta(BF16, 2, 200, 3, 128, 64, 30.0, True),
    **{
        f"check delta {name} {k} {v}": check_delta(dtype, 3, 200, 3, k, v, 3.0, True)
        for name, dtype in (("bf16", BF16), ("fp32", FP32))
        for k, v in ((8, 40), (16, 32), (24, 40), (32, 8), (40, 16))
    },
    **{f"check delta chunk {q}": check_delta(BF16, 3, 200, 3, 24, 40, 20.0, True, q) for q in (16, 32)},
    "check attention": check_attention,
}
# Most important first. FlexAttention is compiled by inductor, slowly, and comes late for that.
TIMES: dict[str, Callable[[Run], None]] = {
    "conv": bench_conv,
    "ssd": bench_ssd,
    "profile ssd": profile_ssd,
    "norm": bench_norm,
    "add norm": bench_add_norm,
    "layer": bench_layer,
    "scan": bench_scan,
    "delta": bench_delta,
    "step M": lambda run: bench_step(run, "M"),
    "step A": lambda run: bench_step(run, "A", "AM"),
    "attention": bench_attention,
    "plain": bench_plain,
}
VARIANTS: dict[str, Callable[[Run], None]] = {
    "variants conv": variants_conv,
    "variants ssd": variants_ssd,
    "variants norm": variants_norm,
    "variants scan": variants_scan,
}
PARTS = {**CHECKS, **TIMES, **VARIANTS}
SIDE_BY_SIDE = 8
"""Checks at a time: they mostly compile."""


def run_parts(names: list[str]) -> int:
    """In a process of its own: rows and ends of parts go to the parent as lines."""
    torch.manual_seed(int(clock.time()))
    run = Run()
    if any(name not in CHECKS for name in names):
        measure_ceilings(run)
    for name in names:
        try:
            PARTS[name](run)
        except Exception as error:
            run.failed.append(f"{name}: {type(error).__name__}: {str(error)[:300]}")
            traceback.print_exc(limit=-4, file=sys.stdout)
            if isinstance(error, torch.AcceleratorError) or "CUDA" in str(error):
                # Nothing that this process does on the device can be trusted from here on.
                run.tell("failed", run.failed)
                os._exit(3)
        run.tell("failed", run.failed)
        run.failed = []
        run.tell("ended", name)
        torch.cuda.empty_cache()
    return 0


class Parent:
    """Starts the processes, shows what they print and keeps what they found."""

    def __init__(self, seconds: float) -> None:
        self.started, self.seconds = clock.perf_counter(), seconds
        self.rows: list[dict[str, Any]] = []
        self.failed: list[str] = []
        self.skipped: list[str] = []

    @property
    def left(self) -> float:
        """Seconds."""
        return self.seconds - (clock.perf_counter() - self.started)

    def child(self, names: list[str]) -> list[str]:
        """Runs parts in one process; those that did not end, the first of which failed."""
        if self.left <= 0:
            self.skipped += names
            return []
        command = [sys.executable, __file__, "--child", ",".join(names)]
        # Also buffered memory of earlier lines must not be lost when a kernel takes the process down.
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        stop = threading.Timer(self.left + 20.0, process.kill)
        stop.start()
        remaining = list(names)
        assert process.stdout is not None
        for line in process.stdout:
            if not line.startswith(TOLD):
                print(line, end="", flush=True)
                continue
            told = json.loads(line[len(TOLD) :])
            if "row" in told:
                self.show(told["row"])
            self.failed += told.get("failed", [])
            if "ended" in told:
                remaining.remove(told["ended"])
        code = process.wait()
        stop.cancel()
        if remaining:
            self.failed.append(f"{remaining[0]}: its process ended with {code}")
        return remaining

    def show(self, row: dict[str, Any]) -> None:
        """One row, at once."""
        self.rows.append(row)
        shown = "  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items() if k != "part")
        print(f"{clock.perf_counter() - self.started:6.1f} s  {row['part']:34s} {shown}", flush=True)

    def run(self, checks: list[str], times: list[str]) -> None:
        """Checks side by side, then times one after another; what crashes takes only itself along."""
        with ThreadPoolExecutor(SIDE_BY_SIDE) as pool:
            list(pool.map(lambda name: self.child([name]), checks))
        while times:
            times = self.child(times)[1:]


def main() -> int:
    parser = argparse.ArgumentParser(description="The Triton kernels on one GPU.")
    parser.add_argument("--check", action="store_true", help="correctness alone")
    parser.add_argument("--variants", action="store_true", help="also other cuts of the same work")
    parser.add_argument("--only", default="", help="parts whose name contains one of these words")
    parser.add_argument("--seconds", type=float, default=150.0, help="no process starts after this long")
    parser.add_argument("--child", default="", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("no CUDA device here: this benchmark measures kernels on a GPU", file=sys.stderr)
        return 2
    if arguments.child:
        return run_parts(arguments.child.split(","))
    import triton

    print(f"{torch.cuda.get_device_name()}; torch {torch.__version__}; Triton {triton.__version__}", flush=True)
    print(f"kernels: {kernels.described(DEVICE)}", flush=True)
    words = [word for word in arguments.only.split(",") if word]
    chosen = {**CHECKS} if arguments.check else {**CHECKS, **TIMES, **(VARIANTS if arguments.variants else {})}
    names = [name for name in chosen if not words or any(word in name for word in words)]
    parent = Parent(arguments.seconds)
    parent.run([name for name in names if name in CHECKS], [name for name in names if name not in CHECKS])
    result = {
        "benchmark": "kernels_gpu",
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "seconds": round(clock.perf_counter() - parent.started, 1),
        "failed": parent.failed,
        "skipped": parent.skipped,
        "rows": parent.rows,
    }
    if "OUT" in os.environ:
        (Path(os.environ["OUT"]) / "kernels_gpu.json").write_text(json.dumps(result, indent=1))
    print(f"failed: {parent.failed or 'nothing'}; left out: {parent.skipped or 'nothing'}")
    print(json.dumps(result))
    return 1 if parent.failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
