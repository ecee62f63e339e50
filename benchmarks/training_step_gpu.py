"""One training step on one GPU against transformers at the same shapes: tokens/s, share of the matrix rate, memory.

    python benchmarks/training_step_gpu.py                            # most important first, about seven minutes
    python benchmarks/training_step_gpu.py --only "A 8x4096" --seconds 120
    python benchmarks/training_step_gpu.py --device cpu --only "A 8x4096"     # tiny shapes, not compiled: does it run

A step is forward, backward, clipping to norm 1 and fused AdamW under bf16 autocast with fp32 parameters. `A` is the
109.5 M Llama shape (768 x 12, SwiGLU 2048, tied vocabulary of 32,000), `M` Mamba-2 of 768 x 24 without MLP, `AM` six
pairs of both with a narrower MLP, `D` 12 Gated DeltaNets with such a one; `small` are the shapes of the study
hybrid-patterns (384 x 8, vocabulary 49,152, rows of 512). Ours keep documents of about 700 tokens apart (400 in rows of
512), the same ones in 1 row of 32,768 tokens as in 8 of 4,096; theirs see whole rows, which is less to do in every
layer but attention. `compiled` is each side's `torch.compile`: ours as `train` does it, theirs of the whole model;
`graph` is forward and backward as one CUDA graph, as in `train`. transformers' Mamba2 runs without the compiled extras
it asks for, on its own fallback. First the rate of an 8192-cubed bf16 product is measured; `share` is a step's FLOPs
(docs/numbers.md) over its time and that rate. Times are medians of CUDA events over steps in a row; `first` is what the
first step took, compiling included (shorter where the compiler's cache knows the shape); `peak` is the allocator's.
`train` is the real loop with its feed, metrics and checkpoints. A profile says what a step spends on each kernel; where
a shape has two, the kernels that differ follow in the end; `in turn` takes two lengths by turns. A part that fails says
so and the next one runs; parts that would start after `--seconds` are named. The last line is one JSON object, which
also goes to $OUT/training_step_gpu.json where OUT is set.
"""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from longspan.corpus.packing import Batch
from longspan.foundation.randomness import numpy_generator
from longspan.models.budget import count_parameters, training_flops_per_token
from longspan.models.language_model import LanguageModel, ModelConfig
from longspan.ops import kernels
from longspan.training.compilation import compile_layers
from longspan.training.config import TrainingConfig
from longspan.training.feeding import Fed
from longspan.training.loop import train
from longspan.training.metrics import read_metrics
from longspan.training.micro_steps import PLAIN_STEPS, CudaRecorder, GraphedMicroSteps, PlainMicroSteps
from longspan.training.optimizer import clip_gradients
from longspan.training.precision import autocast_for
from parts import Parts
from training_peers import llama, mamba2

SHAPES = {
    "A": ModelConfig(pattern="A" * 12, width=768, heads=12, mlp_width=2048),
    "M": ModelConfig(pattern="M" * 24, width=768, heads=12, state=128, mlp="none"),
    "AM": ModelConfig(pattern="AM" * 6, width=768, heads=12, state=128, mlp_width=1536),
    "D": ModelConfig(pattern="D" * 12, width=768, heads=12, mlp_width=1536),
    **{
        f"small {letters}": ModelConfig(
            pattern=letters * (8 // len(letters)), width=384, heads=8, state=64, mamba_head_dim=64, mlp_width=400
        )
        for letters in ("A", "M", "AM")
    },
}
TINY = {
    name: ModelConfig(
        pattern=config.pattern[:2], width=64, heads=2, state=16, mamba_head_dim=32, delta_head_dim=48, mlp_width=64
    )
    for name, config in SHAPES.items()
}
STEPS, LOOP_STEPS, ROUNDS = 8, 60, 15
PIECE = 4096


class Run(Parts):
    """What is measured and printed on the way.

    Attributes:
        profiles: of each shape, by the name of the step: milliseconds and launches by kernel.
    """

    def __init__(self, device: str, seconds: float) -> None:
        super().__init__("training_step_gpu", device, seconds)
        self.shapes = SHAPES if self.cuda else TINY
        self.profiles: dict[str, dict[str, dict[str, tuple[float, int]]]] = {}
        self.flops_per_second = float("nan")

    @property
    def cuda(self) -> bool:
        return self.device.type == "cuda"

    def vocab(self, name: str) -> int:
        return 100 if not self.cuda else 49_152 if name.startswith("small") else 32_000


def milliseconds(run: Run, step: Callable[[], object], steps: int = STEPS) -> tuple[float, float]:
    """Median of a step's time on the device, and the shortest that the host took for one (far ahead, it waits)."""
    step()
    run.now()
    if not run.cuda:
        started = time.perf_counter()
        step()
        return (time.perf_counter() - started) * 1e3, (time.perf_counter() - started) * 1e3
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(steps + 1)]
    hosts = []
    marks[0].record()
    for mark in marks[1:]:
        started = time.perf_counter()
        step()
        mark.record()
        hosts.append((time.perf_counter() - started) * 1e3)
    run.now()
    times = [before.elapsed_time(after) for before, after in itertools.pairwise(marks)]
    return statistics.median(times), min(hosts)


def documents(rows: int, length: int, seed: int) -> Tensor:
    """(rows, length) ids on the CPU: documents of about 700 tokens, or 400 where rows are short.

    A document ends at each multiple of `PIECE` tokens, as where rows of that length end: as many tokens hold the same
    documents however long their rows are.
    """
    generator = torch.Generator().manual_seed(seed)
    starts = torch.rand(rows * length, generator=generator) < 1 / (700 if length > 1000 else 400)
    starts[:: min(length, PIECE)] = True
    return starts.view(rows, length).cumsum(1).int()


def measure(run: Run, name: str, shape: str, rows: int, length: int, step: Callable[[], object]) -> None:
    """Adds a row for a step, whose FLOPs are those of our model of that shape."""
    started = time.perf_counter()
    step()
    run.now()
    first = time.perf_counter() - started
    step()
    if run.cuda:
        torch.cuda.reset_peak_memory_stats()
    ms, host = milliseconds(run, step)
    peak = torch.cuda.max_memory_allocated() / 2**30 if run.cuda else float("nan")
    rate = rows * length / ms * 1e3
    flops = training_flops_per_token(run.shapes[shape], run.vocab(shape), length)
    share = rate * flops / run.flops_per_second
    run.add(name, tok_s=round(rate), ms=ms, host_ms=host, share=share, first_s=first, peak_GiB=peak)


def profile(run: Run, shape: str, name: str, step: Callable[[], object], top: int = 24) -> None:
    """Prints what a step spends on each kernel."""
    if not run.cuda:
        return
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        step()
        step()
        run.now()
    spent: dict[str, tuple[float, int]] = {}
    for event in profiler.key_averages():
        ms, count = spent.get(event.key[:100], (0.0, 0))
        spent[event.key[:100]] = (ms + event.self_device_time_total / 2e3, count + event.count // 2)
    longest = sorted(((ms, count, kernel) for kernel, (ms, count) in spent.items()), reverse=True)
    run.add(f"profile of {name}", busy_ms=sum(ms for ms, _, _ in longest), kernels=sum(n for _, n, _ in longest))
    for ms, count, kernel in longest[:top]:
        print(f"          {ms:7.3f} ms {count:4d} x  {kernel}", flush=True)
    run.rows[-1]["longest"] = longest[:60]
    run.profiles.setdefault(shape, {})[name] = spent


def compare_profiles(run: Run, top: int = 16) -> None:
    """Of shapes profiled more than once: which kernels take another time than in the first profile, most first."""
    for first, *others in (list(each.items()) for each in run.profiles.values()):
        for name, spent in others:
            print(f"{name}, against {first[0]}: ms and launches of a step", flush=True)
            both = [(*spent.get(k, (0.0, 0)), *first[1].get(k, (0.0, 0)), k) for k in {**spent, **first[1]}]
            for ms, count, before, times, kernel in sorted(both, key=lambda row: -abs(row[0] - row[2]))[:top]:
                print(
                    f"  {ms - before:+7.3f}  {ms:7.3f} {count:4d} x  {before:7.3f} {times:4d} x  {kernel}", flush=True
                )


# Subjects


def own_step(
    run: Run, shape: str, rows: int, length: int, compiled: bool = True, graphed: bool = True
) -> Callable[[], None]:
    """A step of a new model of that shape."""
    vocab = run.vocab(shape)
    model = LanguageModel(run.shapes[shape], vocab, seed=0, device=run.device)
    model.train()
    if compiled and run.cuda:
        compile_layers(model)
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(model.parameter_groups(0.1), lr=1e-4, betas=(0.9, 0.95), fused=True)
    autocast = autocast_for("bf16", run.device)
    tokens = torch.randint(0, vocab, (rows, length), device=run.device)

    def fed(seed: int) -> Fed:
        """Made ahead, as the loop's feed makes it."""
        segments = model.segments(tokens, documents(rows, length, seed), keep_ids=run.cuda)
        with autocast():
            model.prepare(segments, tokens)
        return Fed(cast("Batch", None), tokens, tokens, segments, tokens.numel())

    # The graph takes the batch it is captured with for its own place.
    place, ready = fed(4), [fed(seed) for seed in range(4)]
    micro: PlainMicroSteps | GraphedMicroSteps = PlainMicroSteps(model.loss, autocast, run.device)
    if graphed and run.cuda:
        record = CudaRecorder(run.device)
        micro = GraphedMicroSteps(micro, parameters, record=record, quiet=nullcontext, demanded=True)
    turns = 0

    def step() -> None:
        nonlocal turns
        micro.run(place if turns <= PLAIN_STEPS else ready[turns % 4], tokens.numel(), first=True)
        clip_gradients(optimizer, parameters, 1.0)
        optimizer.step()
        micro.clear(optimizer)
        turns += 1

    return step


def own(
    run: Run, shape: str, rows: int, length: int, compiled: bool, profiled: bool = False, graphed: bool = True
) -> None:
    step = own_step(run, shape, rows, length, compiled, graphed)
    kind = f"{'compiled' if compiled else 'eager'}{', graph' if graphed else ''}"
    name = f"{shape} {rows}x{length} ours {kind}"
    measure(run, name, shape, rows, length, step)
    if profiled:
        profile(run, shape, name, step)


def in_turn(run: Run, shape: str, short: tuple[int, int], long: tuple[int, int]) -> None:
    """How much longer a step over long rows takes, each round of both at one temperature of the card."""
    steps = [own_step(run, shape, *size) for size in (short, long)]
    for step in steps * (PLAIN_STEPS + 2):
        step()
    times = [[milliseconds(run, step, 3)[0] for step in steps] for _ in range(ROUNDS if run.cuda else 1)]
    more = [after / before - 1 for before, after in times]
    (rows, length), (ms, long_ms) = long, (statistics.median(each) for each in zip(*times, strict=True))
    run.add(f"{shape} {rows}x{length} in turn", ms=long_ms, short_ms=ms, more=statistics.median(more))
    run.rows[-1]["rounds"] = more
    print(f"          rounds from {min(more):+.2%} to {max(more):+.2%}", flush=True)


def theirs(run: Run, shape: str, rows: int, length: int, compiled: bool) -> None:
    vocab = run.vocab(shape)
    with torch.device(run.device):
        model = llama(run.shapes[shape], vocab) if shape.endswith("A") else mamba2(run.shapes[shape], vocab)
    model.train()
    parameters = list(model.parameters())
    called: Any = torch.compile(model, dynamic=False) if compiled and run.cuda else model
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    tokens = torch.randint(0, vocab, (rows, length), device=run.device)

    def step() -> None:
        with torch.autocast(run.device.type, dtype=torch.bfloat16):
            loss = called(tokens, labels=tokens, shift_labels=tokens, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    kind = type(model).__name__.removesuffix("ForCausalLM")
    name = f"{shape} {rows}x{length} transformers {kind} {'compiled' if compiled else 'eager'}"
    measure(run, name, shape, rows, length, step)


# The loop


class RandomRows:
    """Endless random rows of documents, some of which come round again, so that drawing them costs little."""

    def __init__(self, rows: int, length: int, vocab: int) -> None:
        self.rows, self.length, self.vocab, self.taken = rows, length, vocab, 0
        self.kept: dict[int, Batch] = {}

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        number = self.taken % 16
        self.taken += 1
        if number not in self.kept:
            generator = numpy_generator(0, "rows", number)
            tokens = generator.integers(0, self.vocab, (self.rows, self.length + 1)).astype(np.int32)
            doc_id = documents(self.rows, self.length, number).numpy()
            self.kept[number] = Batch(tokens[:, :-1].copy(), tokens[:, 1:].copy(), doc_id)
        return self.kept[number]

    def state_dict(self) -> dict[str, Any]:
        return {"taken": self.taken}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.taken = state["taken"]


def loop(run: Run, shape: str, rows: int, length: int) -> None:
    steps, vocab = LOOP_STEPS if run.cuda else 6, run.vocab(shape)
    training = TrainingConfig(
        context=length,
        batch_tokens=rows * length,
        steps=steps,
        peak_lr=1e-4,
        log_every=10,
        evaluate_every=steps,
        checkpoint_every=steps,
    )
    with tempfile.TemporaryDirectory() as folder:
        result = train(
            LanguageModel(run.shapes[shape], vocab, seed=0),
            training,
            make_batches=lambda: RandomRows(rows, length, vocab),
            validation=lambda: [next(RandomRows(rows, length, vocab))],
            isolation="full",
            token_bytes=np.ones(vocab, dtype=np.int32),
            directory=Path(folder),
            device=run.device,
        )
        first = [line.get("first_step_seconds") for line in read_metrics(Path(folder) / "metrics.jsonl")]
    run.add(
        f"{shape} {rows}x{length} train",
        tok_s=round(result.tokens_per_second or 0),
        overall=round(result.tokens_per_second_overall or 0),
        first_s=next((seconds for seconds in first if seconds), float("nan")),
        peak_GiB=result.peak_memory_bytes / 2**30,
    )


# The order


def parts(run: Run) -> dict[str, Callable[[], None]]:
    """By name, most important first."""
    short, long, small = ((8, 4096), (1, 32_768), (128, 512)) if run.cuda else ((2, 160), (1, 320), (4, 64))

    def without(shape: str, size: tuple[int, int]) -> Callable[[], None]:
        return lambda: own(run, shape, *size, True, graphed=False)

    return {
        "A 8x4096 ours graph": lambda: own(run, "A", *short, True),
        "A 8x4096 theirs compiled": lambda: theirs(run, "A", *short, True),
        "M 8x4096 ours graph": lambda: own(run, "M", *short, True, True),
        "AM 8x4096 ours graph": lambda: own(run, "AM", *short, True, True),
        "A 1x32768 ours graph": lambda: own(run, "A", *long, True),
        "M 1x32768 ours graph": lambda: own(run, "M", *long, True, True),
        "A 1x32768 theirs eager": lambda: theirs(run, "A", *long, False),
        **{f"small {p} ours graph": lambda p=p: own(run, f"small {p}", *small, True) for p in ("M", "A", "AM")},
        "D 8x4096 ours graph": lambda: own(run, "D", *short, True, True),
        "D 1x32768 ours graph": lambda: own(run, "D", *long, True, True),
        "D 8x4096 ours no graph": without("D", short),
        "A 8x4096 theirs eager": lambda: theirs(run, "A", *short, False),
        "AM 1x32768 ours graph": lambda: own(run, "AM", *long, True, True),
        **{f"{p} lengths in turn": lambda p=p: in_turn(run, p, short, long) for p in ("M", "AM")},
        "M 8x4096 train": lambda: loop(run, "M", *short),
        "A 8x4096 train": lambda: loop(run, "A", *short),
        "A 8x4096 ours no graph": without("A", short),
        "M 8x4096 ours no graph": without("M", short),
        "small M 128x512 ours no graph": without("small M", small),
        "A 1x32768 theirs compiled": lambda: theirs(run, "A", *long, True),
        "small A theirs compiled": lambda: theirs(run, "small A", *small, True),
        "small A 128x512 ours no graph": without("small A", small),
        "M 8x4096 theirs eager": lambda: theirs(run, "M", *short, False),
        "A 8x4096 ours eager": lambda: own(run, "A", *short, False, graphed=False),
        "A 1x32768 ours eager": lambda: own(run, "A", *long, False, graphed=False),
        "small M train": lambda: loop(run, "small M", *small),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="parts whose name contains one of these, with commas between")
    parser.add_argument("--seconds", type=float, default=420, help="no part starts after this long")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    options = parser.parse_args()
    run = Run(options.device, options.seconds)
    print(f"{kernels.described(run.device)}, torch {torch.__version__}, {os.cpu_count()} CPU cores", flush=True)
    for shape, config in run.shapes.items():
        print(f"  {shape}: {config.pattern}, {count_parameters(config, run.vocab(shape)).total / 1e6:.1f} M parameters")
    if run.cuda:
        a, b = (torch.randn(8192, 8192, device=run.device, dtype=torch.bfloat16) for _ in range(2))
        run.flops_per_second = 2 * 8192**3 / milliseconds(run, lambda: a @ b, 20)[0] * 1e3
        run.add("matrix product 8192", TFLOP_s=run.flops_per_second / 1e12, card=torch.cuda.get_device_name())
        del a, b
    run.run(parts(run), options.only)
    compare_profiles(run)
    return run.finish()


if __name__ == "__main__":
    raise SystemExit(main())
