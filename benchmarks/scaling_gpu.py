"""Training with several GPUs of one host against one of them: tokens/s, efficiency, exposed communication, losses.

    python benchmarks/scaling_gpu.py                                   # 1 and 2 GPUs, about three minutes
    python benchmarks/scaling_gpu.py --processes 4 --compile no
    python benchmarks/scaling_gpu.py --only "fp32.*(1 process|fsdp)" --layers 4     # parts whose names match
    python benchmarks/scaling_gpu.py --device cpu --width 64 --layers 2 --rows 2 --context 64 --vocab 500 --steps 12

The real training loop (`longspan.training.loop.train`) trains a hybrid of about 130 M parameters on random tokens, one
document per row, 8 × 4096 positions per GPU and step, bf16 autocast, fused AdamW: with one GPU while the others idle,
then with all of them under DDP and FSDP2, replaying CUDA graphs as one does, and without graphs (`--graph no`: one and
all without); under FSDP2 also with all layers as one piece, which hides less of what is sent, and gathering each layer
again for its backward pass, as larger models do. Tokens/s is the median over windows of 5 steps after 3 warm-up steps;
efficiency is tokens/s with all over (processes × tokens/s with one). `exposed` is the time per step in which a NCCL
kernel ran and no other kernel did, from a profile of 3 steps on rank 0, which also says on which kernels a process
spends more or less than one alone. Last, the same global batches (fp32, short rows) give the same losses with one GPU
(which accumulates) and with all, also where all accumulate. Each part prints as soon as it is measured; the last line
is one JSON object.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import queue
import re
import shutil
import tempfile
import time
import traceback
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.multiprocessing as multiprocessing

from longspan.corpus.packing import Batch
from longspan.foundation.progress import Progress
from longspan.foundation.randomness import numpy_generator
from longspan.models.budget import training_flops_per_token
from longspan.models.language_model import LanguageModel, ModelConfig
from longspan.training import distributed
from longspan.training.config import TrainingConfig
from longspan.training.loop import train
from longspan.training.metrics import read_metrics
from longspan.training.ranks import ALONE, Ranks, joined

PROFILED_FROM, PROFILED_STEPS = 20, 3
CHECKED_ROWS, CHECKED_CONTEXT, CHECKED_STEPS = 2, 512, 8


class RandomRows:
    """Endless random rows; row k of the stream is the same however many a batch takes."""

    def __init__(self, rows: int, context: int, vocab: int) -> None:
        self.rows, self.context, self.vocab, self.taken = rows, context, vocab, 0
        self.kept: dict[int, np.ndarray] = {}

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        tokens = np.stack([self._row(self.taken + i) for i in range(self.rows)])
        self.taken += self.rows
        return Batch(tokens[:, :-1], tokens[:, 1:], np.zeros_like(tokens[:, 1:]))

    def _row(self, number: int) -> np.ndarray:
        # A few hundred rows come round again, so that drawing them costs no time in the measured steps.
        number %= 256
        if number not in self.kept:
            generator = numpy_generator(0, "rows", number)
            self.kept[number] = generator.integers(0, self.vocab, self.context + 1).astype(np.int32)
        return self.kept[number]

    def state_dict(self) -> dict[str, Any]:
        return {"taken": self.taken}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.taken = state["taken"]


def model_config(options: argparse.Namespace) -> ModelConfig:
    pattern = ("AM" * options.layers)[: options.layers]
    heads = max(1, options.width // 64)
    return ModelConfig(pattern=pattern, width=options.width, heads=heads, mlp="swiglu", mlp_width=2 * options.width)


# One run


class Profiled:
    """A report that passes on what rank 0 is told, and profiles a few of its steps."""

    def __init__(self, wanted: bool) -> None:
        self.calls, self.profiler, self.milliseconds = 0, None, None
        self.wanted = wanted

    def __call__(self, progress: Progress, /) -> None:
        if progress.message:
            print(f"  {progress.message}", flush=True)
        if not self.wanted or progress.stage != "train":
            return
        if self.calls == PROFILED_FROM:
            self.profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA])
            self.profiler.start()
        elif self.calls == PROFILED_FROM + PROFILED_STEPS and self.profiler is not None:
            torch.cuda.synchronize()
            self.profiler.stop()
            self.milliseconds = communication(self.profiler)
            self.profiler = None
        self.calls += 1


def communication(profiler: Any) -> dict[str, Any]:
    """Milliseconds per step of NCCL kernels, and of those moments in which nothing else ran; kernel → milliseconds."""
    nccl, others = [], []
    kernels: dict[str, float] = defaultdict(float)
    for event in profiler.events():
        # Annotations span whole phases and would hide what stands idle inside.
        annotation = getattr(event, "is_user_annotation", False) or event.name.startswith(("nccl:", "FSDP::"))
        if annotation or event.device_type != torch.autograd.DeviceType.CUDA:
            continue
        span = (event.time_range.start, event.time_range.end)
        (nccl if event.name.startswith("nccl") else others).append(span)
        kernels[event.name[:90]] += (span[1] - span[0]) / 1e3 / PROFILED_STEPS
    busy = union(others)
    total = length(union(nccl))
    both = length(union(nccl)) + length(busy) - length(union(nccl + others))
    scale = 1e3 * PROFILED_STEPS
    return {
        "nccl_ms": total / scale,
        "exposed_ms": (total - both) / scale,
        "compute_ms": length(busy) / scale,
        "kernels": kernels,
    }


def union(spans: list[tuple[float, float]]) -> list[tuple[float, float]]:
    joint: list[tuple[float, float]] = []
    for start, end in sorted(spans):
        if joint and start <= joint[-1][1]:
            joint[-1] = (joint[-1][0], max(end, joint[-1][1]))
        else:
            joint.append((start, end))
    return joint


def length(spans: list[tuple[float, float]]) -> float:
    return sum(end - start for start, end in spans)


def run(
    config: ModelConfig, options: argparse.Namespace, device: torch.device, ranks: Ranks, **settings: Any
) -> dict[str, Any]:
    """One training run in a folder of its own: rates, memory, losses."""
    training = TrainingConfig(
        **{
            "peak_lr": 3e-4,
            "warmup": 2,
            "evaluate_every": 100_000,
            "checkpoint_every": 100_000,
            "log_every": 5,
            "context": options.context,
            "steps": options.steps,
            "compile": {"auto": "auto", "yes": True, "no": False}[options.compile],
            "graph": {"auto": "auto", "no": False}[options.graph],
            **settings,
        }
    )
    began = time.perf_counter()
    place = "/dev/shm" if Path("/dev/shm").is_dir() else None
    folder = ranks.on_first(lambda: tempfile.mkdtemp(prefix="scaling-", dir=place))
    model = LanguageModel(config, options.vocab, 0)
    report = Profiled(device.type == "cuda" and ranks.is_first and training.log_every == 5)
    result = train(
        model,
        training,
        make_batches=lambda: RandomRows(training.rows, training.context, options.vocab),
        validation=lambda: iter([next(RandomRows(1, training.context, options.vocab))]),
        isolation="full",
        token_bytes=np.ones(options.vocab, np.int32),
        directory=Path(folder),
        device=device,
        report=report,
        ranks=ranks,
    )
    losses = ranks.on_first(lambda: [line["loss"] for line in read_metrics(Path(folder) / "metrics.jsonl", "train")])
    ranks.on_first(lambda: shutil.rmtree(folder))
    found = {
        "tokens_per_second": result.tokens_per_second,
        "peak_memory_gib": round(result.peak_memory_bytes / 2**30, 2),
        "losses": losses,
        "seconds": round(time.perf_counter() - began, 1),
        **(report.milliseconds or {}),
    }
    del model
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return found


# The parts, in the order of their importance


def work(rank: int, options: argparse.Namespace, meeting: str, results: Any) -> None:
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // options.processes))
    device = torch.device(options.device, rank) if options.device == "cuda" else torch.device(options.device)
    size, config = options.processes, model_config(options)
    per_gpu = options.rows * options.context

    def part(name: str, ranks: Ranks, measure: Callable[[], dict[str, Any]], everybody: bool = False) -> None:
        if not re.search(options.only, name):
            return
        # Alone is rank 0, while the others wait below; `everybody` is each for itself.
        if rank == 0 or ranks.size > 1 or everybody:
            try:
                found = measure()
            except Exception:
                found = {"error": traceback.format_exc().splitlines()[-12:]}
            if rank == 0:
                results.put((name, found))
            elif "error" in found:
                print(f"rank {rank}: {name}:", *found["error"], sep="\n  ", flush=True)
        group.on_first(lambda: None)

    with joined(rank, size, device, meeting=f"file://{meeting}") as group:
        sharing = {kind: Ranks(rank, size, kind) for kind in ("ddp", "fsdp")}  # type: ignore[arg-type]

        def timed(ranks: Ranks, **settings: Any) -> dict[str, Any]:
            return run(config, options, device, ranks, batch_tokens=per_gpu * ranks.size, **settings)

        def checked(ranks: Ranks, accumulation: int = 1, **more: Any) -> dict[str, Any]:
            """The same rows in the same steps; one process accumulates what several share."""
            accumulation *= size // ranks.size
            tokens = CHECKED_ROWS * CHECKED_CONTEXT * ranks.size * accumulation
            settings = {"batch_tokens": tokens, "context": CHECKED_CONTEXT, "accumulation": accumulation}
            settings |= {"dtype": "fp32", "steps": CHECKED_STEPS, "log_every": 1, "compile": False, "warmup": 2}
            return run(config, options, device, ranks, **settings, **more)

        def with_limits(work: Callable[[], dict[str, Any]], unit: int, gathered: int) -> dict[str, Any]:
            """Under other limits of FSDP2, in bytes."""
            before = distributed.UNIT_BYTES, distributed.GATHERED_BYTES
            distributed.UNIT_BYTES, distributed.GATHERED_BYTES = unit, gathered
            try:
                return work()
            finally:
                distributed.UNIT_BYTES, distributed.GATHERED_BYTES = before

        def sparing(work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
            """As models above the limit are trained: what is gathered is given back after each forward pass."""
            return with_limits(work, distributed.UNIT_BYTES, 0)

        def warmed_up() -> dict[str, Any]:
            """Every rank by itself, at once: kernels and layers are compiled before anybody waits for another."""
            return run(config, options, device, ALONE, batch_tokens=per_gpu, steps=3, warmup=1)

        part("every process for itself, 3 steps", ALONE, warmed_up, everybody=True)
        part("1 process", ALONE, lambda: timed(ALONE))
        fsdp = sharing["fsdp"]
        part(f"{size} processes, fsdp", fsdp, lambda: timed(fsdp))
        part(f"{size} processes, fsdp, one piece", fsdp, lambda: with_limits(lambda: timed(fsdp), 2**40, 2**40))
        part(f"{size} processes, ddp", sharing["ddp"], lambda: timed(sharing["ddp"]))
        part(f"{size} processes, fsdp, gathered twice", fsdp, lambda: sparing(lambda: timed(fsdp)))
        for kind, ranks in sharing.items():
            part(f"{size} processes, {kind}, no graph", ranks, lambda ranks=ranks: timed(ranks, graph=False))
        part("fp32 losses, 1 process", ALONE, lambda: checked(ALONE))
        for kind, ranks in sharing.items():
            part(f"fp32 losses, {size} processes, {kind}", ranks, lambda ranks=ranks: checked(ranks))
        part(f"fp32 losses, {size} processes, fsdp, gathered twice", fsdp, lambda: sparing(lambda: checked(fsdp)))
        part("fp32 losses, accumulating, 1 process", ALONE, lambda: checked(ALONE, 3))
        for kind, ranks in sharing.items():
            name = f"fp32 losses, accumulating, {size} processes, {kind}"
            part(name, ranks, lambda ranks=ranks: checked(ranks, 3))
        if rank == 0:
            results.put((None, {}))


def show(name: str, found: dict[str, Any], whole: dict[str, dict[str, Any]], options: argparse.Namespace) -> None:
    if "error" in found:
        print(f"{name}: FAILED\n  " + "\n  ".join(found["error"]), flush=True)
        return
    alone = whole.get(re.sub(r"\d+ process.*", "1 process", name), {})
    words = [f"{found['seconds']:.0f} s in all"]
    if name.startswith("fp32"):
        words.insert(0, f"losses {', '.join(f'{loss:.6f}' for loss in found['losses'])}")
        if "losses" in alone and alone is not found:
            found["largest_difference"] = max(abs(a - b) for a, b in zip(found["losses"], alone["losses"], strict=True))
            words.insert(0, f"largest difference {found['largest_difference']:.2e}")
    else:
        if not found["tokens_per_second"]:
            print(f"{name}: {found['seconds']:.0f} s", flush=True)
            return
        rate = found["tokens_per_second"]
        words.insert(0, f"{rate:,.0f} tok/s, peak {found['peak_memory_gib']:.2f} GiB per process")
        if "tokens_per_second" in alone and alone is not found and alone["tokens_per_second"]:
            found["efficiency"] = rate / (options.processes * alone["tokens_per_second"])
            words.insert(1, f"efficiency {found['efficiency']:.1%}")
        if "nccl_ms" in found:
            words.insert(2, f"NCCL {found['nccl_ms']:.2f} ms a step, {found['exposed_ms']:.2f} ms of it exposed")
            words.insert(3, f"other kernels {found['compute_ms']:.2f} ms")
    print(f"{name}: " + "; ".join(words), flush=True)
    if {"kernels"} <= found.keys() & alone.keys() and alone is not found:
        compare(found["kernels"], alone["kernels"])


def compare(found: dict[str, float], alone: dict[str, float], top: int = 14) -> None:
    """Prints the kernels that take another time than with one process, the largest difference first."""
    more = {kernel: found.get(kernel, 0.0) - alone.get(kernel, 0.0) for kernel in {**found, **alone}}
    for kernel in sorted(more, key=lambda kernel: -abs(more[kernel]))[:top]:
        print(f"    {more[kernel]:+7.3f} ms, {found.get(kernel, 0.0):7.3f} in all: {kernel}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--rows", type=int, default=8, help="per process and step")
    parser.add_argument("--context", type=int, default=4096)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--vocab", type=int, default=32_000)
    parser.add_argument("--steps", type=int, default=63)
    parser.add_argument("--compile", choices=["auto", "yes", "no"], default="auto", help="auto: on GPUs")
    parser.add_argument("--graph", choices=["auto", "no"], default="auto", help="auto: where there can be one")
    parser.add_argument("--only", default="", help="a regular expression: parts whose names have it; default: all")
    parser.add_argument("--seconds", type=float, default=200, help="stop then, whatever is missing")
    options = parser.parse_args()
    began = time.monotonic()
    config = model_config(options)
    parameters = sum(p.numel() for p in LanguageModel(config, options.vocab, device="meta").parameters())
    hardware = torch.cuda.get_device_name(0) if options.device == "cuda" else "cpu"
    flops = training_flops_per_token(config, options.vocab, options.context)
    print(
        f"{hardware}, torch {torch.__version__}, {config.pattern} of width {options.width}, {parameters / 1e6:.1f} M "
        f"parameters, {flops / 1e9:.2f} GFLOP a token, {options.rows} × {options.context} positions per process and "
        f"step, layers compiled: {options.compile}",
        flush=True,
    )
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    found: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        workers = [
            context.Process(target=work, args=(rank, options, f"{folder}/meeting", results), daemon=True)
            for rank in range(options.processes)
        ]
        for worker in workers:
            worker.start()
        while any(worker.is_alive() for worker in workers) or not results.empty():
            left = options.seconds - (time.monotonic() - began)
            try:
                name, result = results.get(timeout=min(1.0, max(0.01, left)))
            except queue.Empty:
                if left <= 0:
                    print(f"stopped after {options.seconds:.0f} s", flush=True)
                    break
                continue
            if name is None:
                break
            found[name] = result
            show(name, result, found, options)
        for worker in workers:
            worker.join(timeout=5)
            worker.kill()
    outcome = {
        "benchmark": "scaling_gpu",
        "torch": torch.__version__,
        "device": hardware,
        "parameters": parameters,
        **{key: getattr(options, key) for key in ("processes", "rows", "context", "width", "layers", "vocab")},
        "compile": options.compile,
        "seconds": round(time.monotonic() - began, 1),
        "parts": found,
    }
    if place := os.environ.get("OUT"):
        Path(place, "scaling_gpu.json").write_text(json.dumps(outcome, indent=1))
    print("\n" + json.dumps(outcome))


if __name__ == "__main__":
    main()
