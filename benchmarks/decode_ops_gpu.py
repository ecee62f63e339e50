"""The ops of one decoded token alone, in other cuts too, and the attention of a long prompt's last part.

Of `decode_gpu.py`, which says how to run them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from longspan.ops.attention import attention
from longspan.ops.decode_attention import decode_attention
from parts import Parts

BF16 = torch.bfloat16


def relative(found: Tensor, expected: Tensor) -> float:
    """The norm of a difference over that of what was expected."""
    return float((found.float() - expected.float()).norm() / expected.float().norm())


@torch.no_grad()
def attention_alone(run: Parts) -> None:
    """The kernel of one token against SDPA, and other cuts of the same work."""
    from longspan.ops.triton import decode_attention as launched

    shapes = [(1, 12, 12, 64, 131_072), (1, 32, 8, 128, 131_072), (64, 12, 12, 64, 8192), (16, 32, 8, 128, 8192)]
    for rows, heads, groups, size, keys in shapes:
        q = torch.randn(rows, heads, size, device=run.device).to(BF16)
        k, v = (torch.randn(rows, keys + 64, groups, size, device=run.device).to(BF16) for _ in range(2))
        newest = torch.tensor([keys - 1], device=run.device)
        first = torch.zeros(rows, dtype=torch.int32, device=run.device)
        floor = (k[:, :keys].numel() + v[:, :keys].numel()) * 2 / run.bytes_per_second
        name = f"attention {rows}x{heads}/{groups}x{size} {keys}"
        found = decode_attention(q, k, v, newest, first)
        live = k[:, :keys], v[:, :keys]
        expected = attention(q[:, None], *live, q_offset=keys - 1)[:, 0]
        error = relative(found, expected)
        # Replayed: launches of single calls would cost more than what they do.
        sdpa = replayed(run, partial(attention, q[:, None], *live, q_offset=keys - 1))
        ours = replayed(run, partial(decode_attention, q, k, v, newest, first))
        run.add(name, ms=1e3 * ours, floor_ms=1e3 * floor, of_floor=floor / ours, sdpa_ms=1e3 * sdpa, error=error)
        best: list[tuple[float, str]] = []
        for cut, shares in cuts(rows):
            try:
                given = (q, k, v, newest, first, None, None, None, cut, shares)
                off = relative(launched.run_attention(*given), expected)
                seconds = replayed(run, partial(launched.run_attention, *given))
                best.append((seconds, f"{tuple(cut)} shares {shares} error {off:.1e}"))
            except Exception as error:
                run.add(f"{name} cut failed", cut=str(cut), error=f"{type(error).__name__}: {str(error)[:80]}")
            if run.elapsed > run.seconds:
                break
        best.sort()
        for seconds, cut_name in best[:6]:
            run.add(f"{name} cut", ms=1e3 * seconds, of_floor=floor / seconds, cut=cut_name)


def replayed(run: Parts, call: Callable[[], object], calls: int = 10) -> float:
    """Seconds of a call, of so many in one graph."""
    if run.device.type != "cuda":
        return run.median_seconds(call, 3)
    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            call()
    return run.median_seconds(graph.replay, 5) / calls


def cuts(rows: int) -> Iterator[tuple[Any, int | None]]:
    """Block, warps and stages; and shares where they are not the usual ones."""
    from longspan.ops.triton.decode_attention import Cut

    blocks = [(64, 4, 3), (64, 4, 2), (128, 4, 3)]
    yield from ((Cut(*cut), None) for cut in blocks)
    if rows == 1:
        yield Cut(64, 4, 3), 32


@torch.no_grad()
def mamba2_alone(run: Parts) -> None:
    """The step of a layer between its projections, other cuts."""
    from longspan.ops.mamba2_step import mamba2_step
    from longspan.ops.triton import mamba2_step as launched

    heads, size, state = 24, 64, 128
    channels = heads * size + 2 * state
    for rows in (1, 256):
        wide = torch.randn(rows, channels + heads, device=run.device).to(BF16)
        xBC, dt = wide.split([channels, heads], dim=1)
        given = [
            torch.randn(channels, 4, device=run.device).to(BF16),
            torch.randn(channels, device=run.device).to(BF16),
        ]
        given += [torch.rand(heads, device=run.device) for _ in range(3)]
        tail = torch.zeros(rows, 3, channels, device=run.device, dtype=BF16)
        scan = torch.zeros(rows, heads, size, state, device=run.device)
        floor = 2 * (scan.numel() * 4 + tail.numel() * 2) / run.bytes_per_second
        usual = launched.STATE_ROWS, launched.WARPS
        for launched.STATE_ROWS, launched.WARPS in ((32, 4), (16, 4), (64, 4), (64, 8), (32, 2), (16, 2), (8, 2)):
            seconds = run.median_seconds(partial(mamba2_step, xBC, dt, *given, tail, scan))
            cut = f"rows {launched.STATE_ROWS} warps {launched.WARPS}"
            run.add(f"mamba2 step x{rows}", ms=1e3 * seconds, floor_ms=1e3 * floor, cut=cut)
        launched.STATE_ROWS, launched.WARPS = usual


@torch.no_grad()
def prefill_attention(run: Parts) -> None:
    """The last 8,192 queries of a cache: torch's kernel with its own mask, and two parts joined."""
    heads, groups, size, time = 32, 8, 128, 8192
    for keys in (32_768, 131_072):
        q = torch.randn(1, time, heads, size, device=run.device).to(BF16)
        k, v = (torch.randn(1, keys, groups, size, device=run.device).to(BF16) for _ in range(2))
        flops = 4 * heads * size * time * (keys - time / 2)

        def measured(name: str, call: Callable[[], Tensor], keys: int = keys, flops: float = flops) -> Tensor:
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            y = call()
            extra = (torch.cuda.max_memory_allocated() - before) / 2**30
            seconds = run.median_seconds(call, 4)
            run.add(f"prefill {keys} {name}", ms=1e3 * seconds, TFLOP_s=flops / seconds / 1e12, extra_GiB=extra)
            return y

        ours = measured("lower right", partial(attention, q, k, v, q_offset=keys - time))
        try:
            joined = measured("cudnn, two parts", partial(two_parts, q, k, v))
            error = float((joined.float() - ours.float()).norm() / ours.float().norm())
            run.add(f"prefill {keys} difference", error=error)
        except Exception as error:
            run.add(f"prefill {keys} two parts failed", error=f"{type(error).__name__}: {str(error)[:200]}")


def two_parts(q_BTHP: Tensor, k_BSGP: Tensor, v_BSGP: Tensor) -> Tensor:
    """The newest keys with a mask, the others without, both by cuDNN, joined by their sums."""
    time = q_BTHP.shape[1]
    q, k, v = (each.transpose(1, 2) for each in (q_BTHP, k_BSGP, v_BSGP))
    parts = []
    for keys, causal in ((slice(0, -time), False), (slice(-time, None), True)):
        y, sums, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(
            q, k[:, :, keys], v[:, :, keys], None, True, 0.0, causal, False
        )
        parts.append((y, sums.view(*y.shape[:3], 1).float()))
    share = torch.sigmoid(parts[0][1] - parts[1][1])
    return torch.lerp(parts[1][0].float(), parts[0][0].float(), share).to(q.dtype).transpose(1, 2)
