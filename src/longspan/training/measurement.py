"""Tokens per second and peak memory, measured so that they mean what the report says."""

from __future__ import annotations

import ctypes
import gc
import resource
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch


class Throughput:
    """Trained positions / wall time between device synchronisations.

    The first `warmup_steps` steps of a process are not counted (allocator, kernel selection, compilation), and neither
    is anything inside `paused()`. `seconds` and `positions` go into the checkpoint, so that a resumed run goes on
    counting where it was.
    """

    def __init__(
        self,
        clock: Callable[[], float],
        synchronize: Callable[[], None],
        warmup_steps: int,
        *,
        seconds: float = 0.0,
        positions: int = 0,
    ) -> None:
        self.seconds = seconds
        self.positions = positions
        self._clock = clock
        self._synchronize = synchronize
        self._warmup = warmup_steps
        self._since: float | None = None
        self._pending = 0
        self._window_seconds = 0.0
        self._window_positions = 0
        self._start()

    def step(self, positions: int) -> None:
        """Count one optimizer step over `positions` positions; no synchronisation once warm."""
        if self._warmup:
            self._warmup -= 1
            self._start()
        else:
            self._pending += positions

    def window(self) -> float | None:
        """Positions per second since the last call, None where nothing was measured. Synchronises."""
        self._stop()
        seconds, positions = self._window_seconds, self._window_positions
        self._window_seconds, self._window_positions = 0.0, 0
        self._start()
        return positions / seconds if positions and seconds > 0 else None

    def overall(self) -> float | None:
        """Positions per second over all that was measured, earlier sessions included."""
        return self.positions / self.seconds if self.positions and self.seconds > 0 else None

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave what happens inside out of the time."""
        self._stop()
        try:
            yield
        finally:
            self._start()

    def _start(self) -> None:
        if self._warmup == 0 and self._since is None:
            self._synchronize()
            self._since = self._clock()

    def _stop(self) -> None:
        if self._since is None:
            return
        self._synchronize()
        elapsed = self._clock() - self._since
        self._since = None
        # Time without a finished step (two pauses in a row) is not training time.
        if self._pending:
            self.seconds += elapsed
            self.positions += self._pending
            self._window_seconds += elapsed
            self._window_positions += self._pending
            self._pending = 0


class PeakMemory:
    """Peak memory from here on: the torch allocator's on CUDA, the process's resident set elsewhere.

    Where the system cannot reset the resident peak (anything but Linux), it is that of the whole process.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.kind = "torch allocator" if device.type == "cuda" else "process RSS"
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        else:
            _reset_resident_peak()

    def bytes(self) -> int:
        """The peak so far."""
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device)
        return _resident_peak()


def _reset_resident_peak() -> None:
    # Memory that an earlier run freed and the allocator kept would count as this run's.
    gc.collect()
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return


def _resident_peak() -> int:
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def device_name(device: torch.device) -> str:
    """What the report calls this device."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"{device.type} ({threads} thread{'' if threads == 1 else 's'})"


def synchronizer(device: torch.device) -> Callable[[], None]:
    """A function that waits until the device has done all it was asked to."""
    if device.type == "cuda":
        return lambda: torch.cuda.synchronize(device)
    return lambda: None
