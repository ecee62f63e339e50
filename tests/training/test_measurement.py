"""Tokens per second, with a clock that the test turns."""

from __future__ import annotations

import torch

from longspan.training.measurement import PeakMemory, Throughput


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def throughput(clock: Clock, warmup: int = 0, **earlier: float) -> Throughput:
    return Throughput(clock, lambda: None, warmup, **earlier)  # type: ignore[arg-type]


def test_every_step_since_the_last_line_counts() -> None:
    clock = Clock()
    meter = throughput(clock)
    for _ in range(5):
        clock.now += 2.0
        meter.step(100)
    assert meter.window() == 50.0
    clock.now += 1.0
    meter.step(100)
    assert meter.window() == 100.0
    assert meter.overall() == 600 / 11


def test_warmup_steps_are_left_out() -> None:
    clock = Clock()
    meter = throughput(clock, warmup=2)
    for seconds in (50.0, 20.0, 1.0, 1.0):
        clock.now += seconds
        meter.step(10)
    assert meter.window() == 10.0
    assert (meter.positions, meter.seconds) == (20, 2.0)


def test_evaluation_and_checkpoints_are_left_out() -> None:
    clock = Clock()
    meter = throughput(clock)
    clock.now += 1.0
    meter.step(10)
    with meter.paused():
        clock.now += 1000.0
    with meter.paused():
        clock.now += 1000.0
    clock.now += 1.0
    meter.step(10)
    assert meter.window() == 10.0


def test_a_pause_during_warmup_does_not_start_the_clock() -> None:
    clock = Clock()
    meter = throughput(clock, warmup=2)
    meter.step(10)
    with meter.paused():
        clock.now += 9.0
    clock.now += 5.0
    meter.step(10)
    assert meter.window() is None
    assert meter.overall() is None


def test_a_resumed_run_goes_on_counting_where_it_was() -> None:
    clock = Clock()
    meter = throughput(clock, warmup=1, seconds=10.0, positions=1000)
    clock.now += 99.0
    meter.step(50)
    clock.now += 5.0
    meter.step(500)
    assert meter.window() == 100.0
    assert meter.overall() == 100.0


def test_the_device_is_waited_for_at_both_ends_of_a_window_only() -> None:
    waits = []
    meter = Throughput(Clock(), lambda: waits.append(1), 0)
    for _ in range(20):
        meter.step(1)
    assert len(waits) == 1
    meter.window()
    assert len(waits) == 3


def test_peak_memory_names_what_it_measured() -> None:
    memory = PeakMemory(torch.device("cpu"))
    before = memory.bytes()
    block = torch.ones(64 * 2**20 // 4)
    assert memory.kind == "process RSS"
    assert memory.bytes() - before > 0.8 * block.nbytes
