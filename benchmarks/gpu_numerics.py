"""500 training steps of AAMM on a GPU against the plain ops on the CPU: the same losses, as far as rounding lets them.

    python benchmarks/gpu_numerics.py                                  # about two minutes
    python benchmarks/gpu_numerics.py --device cpu --steps 20 --seeds 2

The real loop (`longspan.training.loop.train`) trains a model of 0.2 M parameters on random walks in isolated documents,
rows of 128, with its settings as they come: on the GPU kernels and compiled layers. The reference, fp32 on the CPU with
plain ops and nothing compiled, runs beside it in a process of its own. fp32 on the GPU must give the losses of the
reference to 1e-3 (nats, means over 10 steps, of all 500 steps). bf16 must end within the noise of seeds: the losses of
the last 50 steps differ less from those of fp32 with the same seed, on average over seeds, than seeds differ from each
other in fp32 (their standard deviation). Prints each run as it ends, then one JSON line; exits with 1 where a bound is
missed.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from longspan.corpus.packing import Batch
from longspan.foundation.randomness import numpy_generator
from longspan.models.language_model import IGNORE, LanguageModel, ModelConfig
from longspan.ops import kernels
from longspan.training.config import TrainingConfig
from longspan.training.loop import train
from longspan.training.metrics import read_metrics

VOCAB, ROWS, CONTEXT, BRANCHES, LOGGED = 256, 8, 128, 4, 10
TOLERANCE = 1e-3
MODEL = ModelConfig(pattern="AAMM", width=64, heads=2, state=32, mamba_head_dim=32, mlp_width=128)


class Walks:
    """Endless rows of documents of about 60 tokens; every token has a few successors, equally likely."""

    def __init__(self) -> None:
        self.taken = 0
        self.successors = numpy_generator(0, "successors").integers(0, VOCAB, (VOCAB, BRANCHES))

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        generator = numpy_generator(0, "walks", self.taken)
        self.taken += 1
        steps = generator.integers(0, BRANCHES, (ROWS, CONTEXT + 1))
        starts = generator.random((ROWS, CONTEXT + 1)) < 1 / 60
        tokens = np.empty((ROWS, CONTEXT + 1), dtype=np.int32)
        fresh = generator.integers(0, VOCAB, (ROWS, CONTEXT + 1))
        tokens[:, 0] = fresh[:, 0]
        for t in range(1, CONTEXT + 1):
            walked = self.successors[tokens[:, t - 1], steps[:, t]]
            tokens[:, t] = np.where(starts[:, t], fresh[:, t], walked)
        doc_id = starts.cumsum(1).astype(np.int32)
        targets = tokens[:, 1:].copy()
        targets[starts[:, 1:]] = IGNORE
        return Batch(tokens[:, :-1].copy(), targets, doc_id[:, :-1].copy())

    def state_dict(self) -> dict[str, Any]:
        return {"taken": self.taken}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.taken = state["taken"]


def losses(device: str, dtype: Literal["fp32", "bf16"], seed: int, steps: int) -> list[float]:
    """Mean training loss (nats) of every 10 steps."""
    if device == "cpu":
        torch.set_num_threads(1)
    training = TrainingConfig(
        context=CONTEXT,
        batch_tokens=ROWS * CONTEXT,
        steps=steps,
        peak_lr=2e-3,
        warmup=0.04,
        dtype=dtype,
        seed=seed,
        log_every=LOGGED,
        evaluate_every=steps,
        checkpoint_every=steps,
    )
    with tempfile.TemporaryDirectory() as folder:
        train(
            LanguageModel(MODEL, VOCAB, seed),
            training,
            make_batches=Walks,
            validation=lambda: [next(Walks())],
            isolation="full",
            token_bytes=np.ones(VOCAB, dtype=np.int32),
            directory=Path(folder),
            device=device,
        )
        lines = read_metrics(Path(folder) / "metrics.jsonl", "train")
        return [line["loss"] for line in lines if line["step"] % LOGGED == 0]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=300, help="no seed but the first starts later")
    options = parser.parse_args()
    started = time.perf_counter()
    print(f"{kernels.described(torch.device(options.device))} against plain torch on a CPU", flush=True)
    curves: dict[tuple[str, int], list[float]] = {}

    def say(name: str, seed: int, curve: list[float]) -> None:
        curves[name, seed] = curve
        print(
            f"{time.perf_counter() - started:6.1f} s  {name} seed {seed}: {curve[0]:.5f} ... {curve[-1]:.5f}",
            flush=True,
        )

    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as beside:
        reference = beside.submit(losses, "cpu", "fp32", 0, options.steps)
        dtypes: tuple[Literal["fp32", "bf16"], ...] = ("fp32", "bf16") if options.device == "cuda" else ("fp32",)
        for seed in range(options.seeds):
            if seed == 0 or time.perf_counter() - started < options.seconds:
                for dtype in dtypes:
                    say(dtype, seed, losses(options.device, dtype, seed, options.steps))
        say("reference", 0, reference.result())
    last = -(-min(50, options.steps) // LOGGED)
    apart = [abs(a - b) for a, b in zip(curves["fp32", 0], curves["reference", 0], strict=True)]
    found: dict[str, Any] = {"fp32_apart": max(apart), "fp32_apart_at_step": LOGGED * (apart.index(max(apart)) + 1)}
    kept = max(apart) < TOLERANCE
    ends = {key: statistics.fmean(curve[-last:]) for key, curve in curves.items()}
    seeds = [seed for seed in range(options.seeds) if ("bf16", seed) in ends]
    if len(seeds) > 1:
        found["noise_of_seeds"] = statistics.stdev(ends["fp32", seed] for seed in seeds)
        found["bf16_apart"] = [ends["bf16", seed] - ends["fp32", seed] for seed in seeds]
        kept &= abs(statistics.fmean(found["bf16_apart"])) < found["noise_of_seeds"]
    found |= {"kept": kept, "steps": options.steps, "curves": {f"{name} {s}": c for (name, s), c in curves.items()}}
    print(json.dumps(found))
    return 0 if kept else 1


if __name__ == "__main__":
    sys.exit(main())
