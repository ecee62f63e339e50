"""Other cuts of the same work; which is best may differ from card to card."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kernels_on_gpu.delta_variants import variants_delta
from kernels_on_gpu.measuring import (
    BF16,
    CONVOLVED,
    DEVICE,
    FP32,
    HEAD_DIM,
    HEADS,
    INNER,
    PROJECTED,
    SHAPES,
    STATE,
    WIDTH,
    Run,
    apart,
    changed,
    device_ms,
    documents,
    kernel_times,
    median_ms,
    normal,
    scan_inputs,
    ssd_inputs,
)
from longspan.ops.selective_scan import selective_scan


def variants_ssd(run: Run) -> None:
    """The scan at four shapes, then how its rows and states are cut, kernel by kernel."""
    from longspan.ops.triton import ssd_launches as launched

    usual = launched.CUTS[BF16]
    for shape in ((32, 2048), (4, 16_384), (8, 4096), (1, 32_768)):
        forward, backward = _ssd_calls(*shape)
        run.add(f"ssd {shape[0]}x{shape[1]}", forward_ms=device_ms(forward), backward_ms=device_ms(backward))
    for shape in ((4, 16_384), (1, 32_768)):
        forward, backward = _ssd_calls(*shape, mean=1e9)
        name = f"ssd {shape[0]}x{shape[1]} whole rows"
        run.add(name, forward_ms=device_ms(forward), backward_ms=device_ms(backward))
    changes: list[dict[str, Any]] = [
        {},
        {"SEGMENT_PROGRAMS": 528},
        {"states": usual.states._replace(registers=128)},
    ]
    calls = {shape: _ssd_calls(*shape) for shape in ((1, 32_768), (8, 4096))}
    expected: dict[tuple[int, int], list[Tensor]] = {}
    for change in changes:
        cut = {key: value for key, value in change.items() if key in usual._fields}
        rest = {key: value for key, value in change.items() if key not in cut}
        try:
            with changed(launched, CUTS={**launched.CUTS, BF16: usual._replace(**cut)}, **rest):
                for shape, (forward, backward) in calls.items():
                    found = [z.clone() for z in (forward()[0], *backward())]
                    off = apart(found, expected.setdefault(shape, found))
                    times = kernel_times(lambda f=forward, b=backward: (f(), b()))
                    each = " ".join(f"{key} {ms:.4f}" for key, ms in times.items() if "::" not in key)
                    name = f"ssd cut {shape[0]}x{shape[1]}"
                    run.add(name, all_ms=sum(times.values()), apart=off, each=each, change=str(change))
        except Exception as error:
            run.add("ssd cut failed", change=str(change), error=f"{type(error).__name__}: {str(error)[:200]}")


def _ssd_calls(rows: int, time: int, mean: float = 700.0) -> tuple[Callable[[], Any], Callable[[], list[Tensor]]]:
    """Forward and backward with documents of `mean` tokens, without autograd."""
    from longspan.ops.triton import ssd_launches as launched

    leaves = ssd_inputs(rows, time, HEADS, HEAD_DIM, STATE)
    inputs = launched.Inputs(*leaves, None, documents(rows, time, mean), None, None)
    dy = normal(rows, time, HEADS, HEAD_DIM)
    into, ddt = launched.Gradients.like(inputs), torch.empty_like(inputs.dt)
    kept = launched.run_forward(inputs)[2]

    def backward() -> list[Tensor]:
        of_heads, _ = launched.run_backward(inputs, kept, dy, None, into, ddt)
        return [*into, ddt, of_heads]

    return lambda: launched.run_forward(inputs), backward


def variants_scan(run: Run) -> None:
    """Sizes of the Mamba-1 scan."""
    from longspan.ops.triton import selective_scan as launched

    usual = launched.CHUNK, launched.SEGMENT, launched.CHANNELS
    for rows, time in SHAPES:
        leaves = [z.requires_grad_() for z in scan_inputs(rows, time, INNER, 16)]
        doc, slope = documents(rows, time, 700.0), normal(rows, time, INNER)
        scan = lambda v=leaves, d=doc: selective_scan(*v, doc_BT=d)[0]  # noqa: E731
        for sizes in (usual, (16, 16, 32), (8, 32, 32), (8, 16, 32), (8, 32, 16), (4, 64, 32), (8, 64, 32)):
            with changed(launched, **dict(zip(("CHUNK", "SEGMENT", "CHANNELS"), sizes, strict=True))):
                both = median_ms(lambda f=scan, v=leaves, s=slope: torch.autograd.grad(f(), v, s), rep=30)
                run.add(f"scan cut {rows}x{time}", both_ms=both, chunk_segment_channels=str(sizes))


def variants_conv(run: Run) -> None:
    """Tokens and channels of a program, and its warps, where the input lies as `in_proj` leaves it."""
    from longspan.ops.triton import causal_conv as launched

    x = spread(8, 4096)[..., INNER : INNER + CONVOLVED]
    weight, bias, dx = normal(CONVOLVED, 4, dtype=FP32), normal(CONVOLVED, dtype=FP32), torch.empty_like(x)
    y, doc = normal(8, 4096, CONVOLVED), documents(8, 4096, 700.0)
    run.add(
        "conv floors, 32,768 tokens",
        forward_ms=run.floor_ms(2 * x.numel() * 2, 0),
        backward_ms=run.floor_ms(3 * x.numel() * 2, 0),
    )
    known = None
    for tile in (
        (64, 256, 2, 3),
        (64, 128, 1, 3),
        (64, 256, 2, 4),
        (32, 256, 2, 3),
        (64, 256, 4, 3),
        (96, 128, 1, 3),
    ):
        with changed(launched, FORWARD=launched.Tile(*tile), BACKWARD=launched.Tile(*tile)):
            found = [launched.run_forward(x, weight, bias, doc, True)]
            found += [*launched.run_backward(dx, y, x, weight, bias, doc, True), dx.clone()]
            known = known or found
            forward = device_ms(lambda: launched.run_forward(x, weight, bias, doc, True))
            backward = device_ms(lambda: launched.run_backward(dx, y, x, weight, bias, doc, True))
            run.add("conv tile", forward_ms=forward, backward_ms=backward, apart=apart(found, known), tile=str(tile))


def spread(rows: int, time: int) -> Tensor:
    """(B, T, K) with every row at the begin of a line of memory."""
    return normal(rows, time, -(-PROJECTED // 64) * 64)[..., :PROJECTED]


def variants_norm(run: Run) -> None:
    """Warps of a row, programs and rows in flight of the backward, of the gated norm and of that of a sum."""
    from longspan.ops.triton import residual
    from longspan.ops.triton import rms_norm as launched

    y, z, weight = normal(8, 4096, INNER), spread(8, 4096)[..., :INNER], normal(INNER, dtype=FP32)
    dy, dz = torch.empty_like(y).view(-1, INNER), spread(8, 4096)[..., :INNER].flatten(0, 1)
    x, branch, scale = normal(8, 4096, WIDTH), normal(8, 4096, WIDTH), normal(WIDTH, dtype=FP32)
    out = torch.empty_like(x), torch.empty_like(x)
    for warps, programs, ahead in (
        (4, 528, 3),
        (4, 528, 4),
        (2, 528, 3),
        (8, 528, 3),
        (4, 264, 4),
    ):
        of = lambda _, warps=warps: warps  # noqa: E731
        with changed(launched, warps_of=of, PROGRAMS=programs, AHEAD=ahead), changed(residual, warps_of=of):
            run.add(
                "norms of 32,768 tokens",
                gated_forward_ms=device_ms(lambda: launched.run_forward(y, z, weight, 1e-5, BF16)),
                gated_backward_ms=device_ms(lambda: launched.run_backward(y, y, z, weight, 1e-5, dy, dz)),
                stream_forward_ms=device_ms(lambda: residual.run_forward(x, branch, branch, scale, 1e-5, BF16)),
                stream_backward_ms=device_ms(lambda: residual.run_backward(x, branch, x, branch, scale, 1e-5, out)),
                warps=warps,
                programs=programs,
                ahead=ahead,
            )


def variants_sums(run: Run) -> None:
    """What the programs of a layer's backward leave, added up: torch's kernel and ours, in several tiles."""
    from longspan.ops.triton import sums as launched

    usual = launched.ROWS, launched.COLUMNS, launched.STAGES
    for shape in ((1, 528, INNER), (1, 792, WIDTH), (1, 256, 5 * CONVOLVED), (3, 512, HEADS)):
        values = normal(*shape, dtype=FP32)
        name = "sums " + "x".join(map(str, shape))
        run.add(name, torch_ms=device_ms(lambda v=values: v.sum(1)), floor_ms=run.floor_ms(values.numel() * 4, 0))
        for tile in (usual, (128, 32, 4), (128, 32, 2), (64, 32, 1)):
            with changed(launched, **dict(zip(("ROWS", "COLUMNS", "STAGES"), tile, strict=True))):
                run.add(name, ms=device_ms(lambda v=values: launched.add_up(v)), tile=str(tile))


def variants_loss(run: Run) -> None:
    """Words at a time, warps of a token and parts in flight, for vocabularies of 32,000 and 49,152."""
    from longspan.ops.triton import cross_entropy as launched

    for tokens, vocab in ((16_384, 32_000), (16_384, 49_152)):
        logits, chosen = normal(tokens, vocab), torch.randint(0, vocab, (tokens,), device=DEVICE)
        counted = torch.ones(tokens, dtype=torch.bool, device=DEVICE)
        for cut in ((4096, 8, 4), (8192, 8, 3), (8192, 8, 4), (8192, 16, 3), (4096, 16, 3), (2048, 8, 4), (4096, 4, 4)):
            with changed(launched, CUTS=dict.fromkeys(launched.CUTS, launched.Cut(*cut))):
                ms = device_ms(lambda z=logits, c=chosen, n=counted: launched.softmax_errors(z, c, n, None))
                floor = run.floor_ms(2 * logits.numel() * 2, 0)
                run.add(f"errors {tokens}x{vocab}", ms=ms, floor_ms=floor, block_warps_stages=str(cut))


VARIANTS: dict[str, Callable[[Run], None]] = {
    "variants conv": variants_conv,
    "variants norm": variants_norm,
    "variants sums": variants_sums,
    "variants ssd": variants_ssd,
    "variants loss": variants_loss,
    "variants scan": variants_scan,
    "variants delta": variants_delta,
}
