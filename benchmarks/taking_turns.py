"""How the CPU benchmarks measure: subjects take turns, so that a busy machine slows all of them alike."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn


@dataclass
class Subject:
    """Something to time, which says how many tokens it took in, and the subjects it is compared with."""

    name: str
    run: Callable[[], int]
    against: tuple[str, ...] = ()
    parameters: int = 0
    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    tokens: int = 0


def training(
    name: str,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    loss: Callable[[], Tensor],
    tokens: int,
    against: tuple[str, ...] = (),
) -> Subject:
    """A step of training on so many tokens."""

    def step() -> int:
        loss().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return tokens

    return Subject(name, step, against, count(model))


def measure(subjects: list[Subject], rounds: int) -> None:
    """One run of every subject a round, in seconds of wall and CPU time; the first round warms up and is left out."""
    for turn in range(rounds + 1):
        for subject in subjects:
            gc.collect()
            cpu, wall = time.process_time(), time.perf_counter()
            subject.tokens = subject.run()
            elapsed = time.perf_counter() - wall, time.process_time() - cpu
            if turn:
                subject.wall.append(elapsed[0])
                subject.cpu.append(elapsed[1])


def ratio(fast: list[float], slow: list[float]) -> float:
    """Median over rounds."""
    return round(statistics.median(b / a for a, b in zip(fast, slow, strict=True)), 3)


def rows_of(subjects: list[Subject], threads: int) -> list[dict[str, Any]]:
    """What the table shows and the JSON line holds."""
    by_name = {subject.name: subject for subject in subjects}
    rows = []
    for s in subjects:
        rates = sorted(s.tokens / seconds for seconds in s.wall)
        others = {name: by_name[name] for name in s.against if name in by_name}
        rows.append(
            {
                "subject": s.name,
                "parameters": s.parameters,
                "tokens_per_second": round(statistics.median(rates), 1),
                "lowest": round(rates[0], 1),
                "highest": round(rates[-1], 1),
                "cpu_share": round(sum(s.cpu) / sum(s.wall) / threads, 3),
                "speedup": {name: ratio(s.wall, other.wall) for name, other in others.items()},
                "speedup_cpu_time": {name: ratio(s.cpu, other.cpu) for name, other in others.items()},
            }
        )
    return rows


def show(title: str, rows: list[dict[str, Any]]) -> None:
    """The table."""
    print(f"\n{title}")
    print(f"  {'subject':<34}{'tok/s':>9}{'lowest':>9}{'highest':>9}{'CPU got':>9}  faster than (wall, CPU time)")
    for row in rows:
        faster = ", ".join(
            f"{name} {value:.2f}x ({row['speedup_cpu_time'][name]:.2f}x)" for name, value in row["speedup"].items()
        )
        print(
            f"  {row['subject']:<34}{row['tokens_per_second']:>9,.0f}{row['lowest']:>9,.0f}{row['highest']:>9,.0f}"
            f"{row['cpu_share']:>8.0%}  {faster}",
            flush=True,
        )


def count(model: torch.nn.Module) -> int:
    """Parameters."""
    return sum(p.numel() for p in model.parameters())
