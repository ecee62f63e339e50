"""The Triton kernels on one GPU: are they right, how fast are they, how far from what the chip allows.

    python benchmarks/kernels_gpu.py                       # everything, most important first, about three minutes
    python benchmarks/kernels_gpu.py --check               # correctness alone
    python benchmarks/kernels_gpu.py --only conv,ssd --seconds 60

First the two ceilings of this card are measured: a copy of 2 GiB (bytes read plus bytes written) and an 8192-cubed bf16
product. Kernels are checked against the plain ops in fp64 over the same rounded inputs, on fresh random documents, with
every allocation poisoned beforehand, twice for the same bits. Times are medians at 65,536 tokens in bf16, of calls that
follow each other in a CUDA graph (whole layers and steps: of CUDA events, `do_bench`); `floor` is the larger of fewest
bytes over the copy's rate and operations over the product's. A part that fails says so and the next one runs; parts
that would start after `--seconds` are left out and named. Prints a table and, as its last line, one JSON object, which
also goes to $OUT/kernels_gpu.json where OUT is set.
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
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from kernels_on_gpu.checks import CHECKS
from kernels_on_gpu.measuring import DEVICE, TOLD, Run, measure_ceilings
from kernels_on_gpu.times import TIMES
from kernels_on_gpu.variants import VARIANTS
from longspan.ops import kernels

PARTS: dict[str, Callable[[Run], None]] = {**CHECKS, **TIMES, **VARIANTS}
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
