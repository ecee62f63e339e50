"""What all parts share: shapes, inputs, and how a time is taken."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

BF16, FP32 = torch.bfloat16, torch.float32
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


@contextmanager
def changed(module: ModuleType, **values: object) -> Iterator[None]:
    """Other values of a module's constants for a while."""
    usual = {name: getattr(module, name) for name in values}
    try:
        for name, value in values.items():
            setattr(module, name, value)
        yield
    finally:
        for name, value in usual.items():
            setattr(module, name, value)


def apart(found: Sequence[Tensor], known: Sequence[Tensor]) -> float:
    """The largest relative distance of two lists of results."""
    pairs = zip(found, known, strict=True)
    return max(float((one.float() - other.float()).norm() / other.float().norm()) for one, other in pairs)


def median_ms(function: Callable[[], object], rep: int = 60) -> float:
    from triton.testing import do_bench

    return float(do_bench(function, warmup=15, rep=rep, return_mode="median"))


def device_ms(function: Callable[[], object]) -> float:
    """Of the device alone: as a CUDA graph, so that a host that starts kernels slowly does not show."""
    from triton.testing import do_bench_cudagraph

    return float(do_bench_cudagraph(function, rep=20, return_mode="median"))


def time_both(
    run: Run, name: str, function: Callable[..., Sequence[Tensor]], leaves: Sequence[Tensor], floor: float, **more: Any
) -> float:
    """Forward alone and forward with backward, as a training step calls them and in a CUDA graph as there."""
    leaves = [z.detach().requires_grad_() for z in leaves]
    slopes = [torch.randn_like(y) for y in function(*leaves)]
    with torch.no_grad():
        forward = device_ms(lambda: function(*leaves))
    both = device_ms(lambda: torch.autograd.grad(list(function(*leaves)), leaves, slopes))
    run.add(name, forward_ms=forward, both_ms=both, floor_ms=floor, of_floor=floor / both, **more)
    return both


def kernel_times(function: Callable[[], object], calls: int = 3) -> dict[str, float]:
    """Which kernel takes how many ms of one call, longest first; after a warm one."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as recording

    function()
    torch.cuda.synchronize()
    with recording(activities=[ProfilerActivity.CUDA]) as trace:
        for _ in range(calls):
            function()
        torch.cuda.synchronize()
    times = {
        e.key: e.self_device_time_total / 1e3 / calls for e in trace.key_averages() if e.self_device_time_total > 0
    }
    return dict(sorted(times.items(), key=lambda item: -item[1]))


def profile(run: Run, name: str, function: Callable[[], object]) -> None:
    """Which kernel takes how long, of one call after a warm one."""
    for key, ms in list(kernel_times(function).items())[:16]:
        run.add(f"profile {name}", ms=ms, kernel=key[:70])


def measure_ceilings(run: Run) -> None:
    source = torch.empty(1 << 30, dtype=torch.uint8, device=DEVICE).random_()
    target = torch.empty_like(source)
    copy = median_ms(lambda: target.copy_(source))
    run.bytes_per_second = 2 * source.numel() / copy * 1e3
    a, b = normal(8192, 8192), normal(8192, 8192)
    product = median_ms(lambda: a @ b)
    run.flops_per_second = 2 * 8192**3 / product * 1e3
    run.add("ceilings", copy_TB_s=run.bytes_per_second / 1e12, matmul_TFLOP_s=run.flops_per_second / 1e12)


def normal(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
    return torch.randn(shape, device=DEVICE).to(dtype)


def documents(rows: int, time: int, mean: float) -> Tensor:
    return (torch.rand(rows, time, device=DEVICE) < 1.0 / mean).cumsum(1).int()


def token_spreads(rows: int, time: int, vocab: int) -> dict[str, Tensor]:
    """All tokens as likely, and as often as in text: in proportion to one over their rank."""
    ranks = torch.arange(1, vocab + 1, device=DEVICE)
    drawn = torch.multinomial(1.0 / ranks, rows * time, replacement=True)
    return {"even": torch.randint(0, vocab, (rows, time), device=DEVICE), "as in text": drawn.view(rows, time)}


def ssd_inputs(rows: int, time: int, heads: int, head_dim: int, state: int, dtype: torch.dtype = BF16) -> list[Tensor]:
    return [
        normal(rows, time, heads, head_dim, dtype=dtype),
        F.softplus(normal(rows, time, heads, dtype=FP32) - 3.0),
        -torch.rand(heads, device=DEVICE) * 15 - 1,
        normal(rows, time, 1, state, dtype=dtype),
        normal(rows, time, 1, state, dtype=dtype),
        normal(heads, dtype=FP32),
    ]


def scan_inputs(rows: int, time: int, channels: int, state: int, dtype: torch.dtype = BF16) -> list[Tensor]:
    return [
        normal(rows, time, channels, dtype=dtype),
        F.softplus(normal(rows, time, channels, dtype=FP32) - 3.0),
        -torch.rand(channels, state, device=DEVICE) * 15 - 1,
        normal(rows, time, state, dtype=dtype),
        normal(rows, time, state, dtype=dtype),
        normal(channels, dtype=FP32),
    ]


def delta_inputs(rows: int, time: int, heads: int, key_dim: int, value_dim: int, dtype: torch.dtype = BF16):
    return [
        normal(rows, time, heads, key_dim, dtype=dtype),
        normal(rows, time, heads, key_dim, dtype=dtype),
        normal(rows, time, heads, value_dim, dtype=dtype),
        -F.softplus(normal(rows, time, heads, dtype=FP32) - 3.0) * 4.0,
        torch.sigmoid(normal(rows, time, heads, dtype=FP32)),
    ]


def mamba2_layer() -> Any:
    from longspan.models.mixers.mamba2 import Mamba2, Mamba2Settings

    mixer = Mamba2(WIDTH, Mamba2Settings(state=STATE, mamba_head_dim=HEAD_DIM))
    mixer.init_weights(torch.Generator().manual_seed(0))
    return mixer.to(DEVICE)


def summed_and_normed(x: Tensor, branch: Tensor, weight: Tensor) -> list[Tensor]:
    """As plain ops."""
    total = x + branch
    return [total, (F.rms_norm(total, total.shape[-1:], eps=1e-5) * weight).to(branch.dtype)]


def streamed(x: Tensor, branch: Tensor, weight: Tensor) -> list[Tensor]:
    """The norm of the sum, of a stream that begins with `x`."""
    from longspan.ops.triton.residual import add_to_stream, begin_stream

    near, rest, _ = begin_stream(x, weight, 1e-5, branch.dtype)
    return [add_to_stream(near, rest, branch, weight, 1e-5)[2]]
