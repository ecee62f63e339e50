"""Other launches of the delta rule's kernels, each beside the time that its bytes take."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kernels_on_gpu.measuring import BF16, DELTA_HEADS, Run, apart, delta_inputs, documents, kernel_times, normal

KEY_DIM, VALUE_DIM = 64, 128
# By kernel: warps, stages, registers of a thread at most. Kernels do not wait for each other's launches, so that one
# run tries one of each.
LAUNCHES: dict[str, list[tuple[int, int, int | None]]] = {
    "systems": [(4, 1, 168), (4, 1, None)],
    "states": [(4, 3, None), (4, 2, None)],
    "outputs": [(4, 2, None), (4, 1, None)],
    "correction_gradients": [(4, 2, None), (4, 1, None)],
    "state_gradients": [(4, 2, None), (8, 2, None)],
    "mixing_gradients": [(4, 2, None), (8, 2, 128)],
    "system_gradients": [(4, 1, None), (4, 1, 168)],
}
# Tiles of 64 tokens and 64 numbers that each kernel reads and writes for a chunk of one head.
TILES = {
    "systems": 3,
    "states": 8,
    "outputs": 8,
    "correction_gradients": 6,
    "state_gradients": 11,
    "mixing_gradients": 12,
    "system_gradients": 13,
}


def variants_delta(run: Run) -> None:
    """At 8 x 4096, then what was fastest of each kernel in one row of 32,768."""
    from longspan.ops.triton import gated_delta as launched

    usual = launched.CUTS[BF16]
    forward, backward = _calls(8, 4096)
    chunk_heads, tile = 32_768 // usual.chunk * DELTA_HEADS, 64 * 64 * 2
    run.add("delta floors", **{k: run.floor_ms(n * tile * chunk_heads, 0) for k, n in TILES.items()})
    turns = range(len(LAUNCHES["systems"]))
    # Into Triton's cache, side by side.
    with multiprocessing.get_context("spawn").Pool(len(turns)) as pool:
        pool.map(_compile, turns)
    best = {name: (float("inf"), launched.Launch(4, 1)) for name in LAUNCHES}
    known: list[Tensor] | None = None
    try:
        for turn in turns:
            tried = _choose(turn)
            try:
                found = [z.clone() for z in (forward(), *backward())]
                known = known or found
                distance = apart(found, known)
                times = kernel_times(lambda: (forward(), backward()))
            except Exception as error:
                run.add("delta launches failed", turn=turn, error=f"{type(error).__name__}: {str(error)[:200]}")
                continue
            for name, launch in tried.items():
                best[name] = min(best[name], (times[name], launch), key=lambda timed: timed[0])
                run.add(f"delta {name}", ms=times[name], launch=str(tuple(launch)), apart=distance)
        launched.CUTS[BF16] = usual._replace(launches={name: launch for name, (_, launch) in best.items()})
        for shape in ((8, 4096), (1, 32_768)):
            forward, backward = _calls(*shape)
            times = kernel_times(lambda f=forward, b=backward: (f(), b()))
            each = " ".join(f"{key} {ms:.4f}" for key, ms in times.items() if "::" not in key)
            run.add(f"delta {shape[0]}x{shape[1]}, fastest launches", all_ms=sum(times.values()), each=each)
    finally:
        launched.CUTS[BF16] = usual


def _choose(turn: int) -> dict[str, Any]:
    """One launch of every kernel, from now on."""
    from longspan.ops.triton import gated_delta as launched

    tried = {name: launched.Launch(*options[turn]) for name, options in LAUNCHES.items()}
    launched.CUTS[BF16] = launched.CUTS[BF16]._replace(launches=tried)
    return tried


def _compile(turn: int) -> None:
    _choose(turn)
    try:
        forward, backward = _calls(8, 4096)
        forward()
        backward()
        torch.cuda.synchronize()
    except Exception as error:
        print(f"turn {turn}: {type(error).__name__}: {str(error)[:200]}", flush=True)


def _calls(rows: int, time: int) -> tuple[Callable[[], Any], Callable[[], list[Tensor]]]:
    """Forward and backward with documents, without autograd, of q, k and v as the convolution leaves them."""
    from longspan.ops.triton import gated_delta as launched

    *qkv, g, beta = delta_inputs(rows, time, DELTA_HEADS, KEY_DIM, VALUE_DIM)
    sizes = [z.shape[2] * z.shape[3] for z in qkv]

    def by_heads(joined: Tensor) -> list[Tensor]:
        return [z.unflatten(2, (DELTA_HEADS, -1)) for z in joined.split_with_sizes(sizes, -1)]

    joined = torch.cat([z.flatten(2) for z in qkv], -1)
    inputs = launched.Inputs(*by_heads(joined), g, beta, documents(rows, time, 700.0), None, None)
    do, into = normal(rows, time, DELTA_HEADS, VALUE_DIM), launched.Gradients(*by_heads(torch.empty_like(joined)))
    kept = launched.run_forward(inputs)[2]

    def backward() -> list[Tensor]:
        dg, dbeta, _ = launched.run_backward(inputs, kept, do, None, into)
        return [*into, dg, dbeta]

    return lambda: launched.run_forward(inputs)[0], backward
