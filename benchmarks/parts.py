"""How the long GPU benchmarks run: part after part, each shown when it is there, a failure told and passed over."""

from __future__ import annotations

import gc
import json
import os
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch


class Parts:
    """What is measured and printed on the way.

    Attributes:
        device: where it runs.
        bytes_per_second: of a copy of 1 GiB, read and written, measured by `ceiling`.
    """

    def __init__(self, name: str, device: str, seconds: float) -> None:
        self.name, self.device, self.seconds = name, torch.device(device), seconds
        self.started = time.perf_counter()
        self.rows: list[dict[str, Any]] = []
        self.failed: list[str] = []
        self.skipped: list[str] = []
        self.bytes_per_second = float("nan")

    @property
    def elapsed(self) -> float:
        return time.perf_counter() - self.started

    def add(self, part: str, **values: Any) -> None:
        """One row, shown at once."""
        self.rows.append({"part": part, **values})
        shown = "  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in values.items())
        print(f"{self.elapsed:6.1f} s  {part:36s} {shown}", flush=True)

    def run(self, parts: Mapping[str, Callable[[], None]], only: str = "") -> None:
        """Every part that `only` names (words of which one is in its name), until the time is up."""
        words = [word for word in only.split(",") if word]
        for name, part in parts.items():
            if words and not any(word in name for word in words):
                continue
            if self.elapsed > self.seconds:
                self.skipped.append(name)
                continue
            try:
                part()
            except Exception as error:
                self.failed.append(f"{name}: {type(error).__name__}: {str(error)[:300]}")
                print(f"{self.elapsed:6.1f} s  {name} FAILED", flush=True)
                print("".join(traceback.format_exc().splitlines(keepends=True)[-9:]), flush=True)
            self.forget()

    def forget(self) -> None:
        """Frees what no part holds any more, and begins a new peak of memory."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def ceiling(self) -> None:
        """The rate at which the device copies memory, bytes read plus bytes written."""
        size = 1 << (30 if self.device.type == "cuda" else 24)
        source = torch.zeros(size, dtype=torch.uint8, device=self.device)
        target = torch.empty_like(source)
        self.bytes_per_second = 2 * size / self.median_seconds(lambda: target.copy_(source), 20)
        self.add("copy", TB_per_s=self.bytes_per_second / 1e12)

    def now(self) -> float:
        """After all that the device was asked to do."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def median_seconds(self, function: Callable[[], object], repeats: int = 10, inner: int = 1) -> float:
        """Of `repeats` times `inner` calls, by events on the device where it has them; the first two are left out."""
        times = []
        for _ in range(repeats + 2):
            if self.device.type == "cuda":
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                start.record()
                for _ in range(inner):
                    function()
                end.record()
                end.synchronize()
                times.append(start.elapsed_time(end) / 1e3 / inner)
            else:
                began = self.now()
                for _ in range(inner):
                    function()
                times.append((self.now() - began) / inner)
        return sorted(times[2:])[repeats // 2]

    def finish(self) -> int:
        """The summary and the JSON line; the exit status."""
        on_gpu = self.device.type == "cuda"
        result = {
            "benchmark": self.name,
            "device": torch.cuda.get_device_name() if on_gpu else "cpu",
            "torch": torch.__version__,
            "seconds": round(self.elapsed, 1),
            "failed": self.failed,
            "skipped": self.skipped,
            "rows": self.rows,
        }
        if "OUT" in os.environ:
            (Path(os.environ["OUT"]) / f"{self.name}.json").write_text(json.dumps(result, indent=1))
        print(f"failed: {self.failed or 'nothing'}; left out for time: {self.skipped or 'nothing'}")
        print(json.dumps(result))
        return 1 if self.failed else 0
