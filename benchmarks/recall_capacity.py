"""Recall capacity: how many bits of MQAR does a state of N numbers a channel come to hold, and is that in proportion?

    python benchmarks/recall_capacity.py                          # 42 trainings, about 25 min on 4 cores
    python benchmarks/recall_capacity.py --processes 16 --seconds 420

Trains the two Mamba-2 layers of `recall variant=cpu` (width 32, fp32, its recipe) with states of N = 1 to 16, each in
rows near what it may hold, and attention in the longest rows; rows of L hold L/8 or L/4 pairs, of V/2 values. A model
is asked 1 to L/4 pairs, 256 rows each. Two numbers of every training:

- half: the bits asked for, n·log2(V/2), at which half of the answers are right (`<`: fewer than were asked, `>`: more);
- recalled: the most that answers give back, n·(log2 M - h(a) - (1-a)·log2(M-1)) with M = V/2 values and the share a of
  answers right (Fano), over n: no state that holds fewer bits can give as much.

Trainings start in the order of their seeds, as many at a time as there are processes; none is started that would not
end in time. What a size holds is the best of its row lengths, in the median over seeds. Prints one line a training and
a table, and writes JSON (`--out`) after each, those that failed among it with their errors.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from longspan.probes.mqar import half_right

ROWS: dict[int, tuple[int, ...]] = {1: (16, 32), 2: (32, 64), 4: (64, 128), 8: (128, 256), 16: (128, 256), 0: (256,)}
"""State N -> lengths of rows that it is trained in; 0 is attention."""
ASKED = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
ROWS_ASKED = 256


@dataclass(frozen=True)
class Case:
    """One training."""

    state: int
    length: int
    seed: int

    @property
    def vocab_size(self) -> int:
        """V: 33 values, and more only where a row needs them to be distinct."""
        return max(66, self.length + 2)

    def overrides(self, steps: int) -> list[str]:
        """The settings of `recall variant=cpu` that a case changes."""
        sizes = [size for size in ASKED if 4 * size <= self.length]
        probe = f"{{kind: mqar, sizes: {sizes}, lengths: [{self.length}], strings: {ROWS_ASKED}, free_running: false}}"
        return [
            "variant=cpu",
            "pattern=" + ("MM" if self.state else "AA"),
            f"model.state={self.state or 8}",
            f"seed=[{self.seed}]",
            f"corpus.vocab_size={self.vocab_size}",
            f"corpus.length={self.length}",
            f"corpus.pairs=[{self.length // 8}, {self.length // 4}]",
            f"training.context={self.length}",
            f"training.steps={steps}",
            f"training.evaluate_every={steps // 4}",
            f"probes=[{{recall: {probe}}}]",
        ]


def cases(seeds: int) -> list[Case]:
    """All trainings, the first seed of every state and length before the second; the largest first."""
    kinds = [(state, length) for state, lengths in ROWS.items() for length in lengths]
    kinds.sort(key=lambda kind: (-kind[1], -kind[0]))
    found = [Case(state, length, seed) for seed in range(seeds) for state, length in kinds]
    # Attention has nothing to run out of, which two seeds show.
    return [case for case in found if case.state or case.seed < 2]


def recalled(pairs: int, right: float, values: int) -> float:
    """Bits that answers to `pairs` questions of which a share is right give back at least (Fano)."""
    if right <= 1 / values:
        return 0.0
    doubt = 0.0 if right >= 1 else -right * math.log2(right) - (1 - right) * math.log2(1 - right)
    return pairs * (math.log2(values) - doubt - (1 - right) * math.log2(values - 1))


def run(case: Case, steps: int) -> dict[str, Any]:
    """Train, ask and sum up one case."""
    import torch

    from longspan.records.store import RecordStore
    from longspan.study.run import run_study
    from longspan.terminal import Terminal

    torch.set_num_threads(1)
    began = time.perf_counter()
    answers: dict[int, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        runs = Path(folder)
        run_study("recall", case.overrides(steps), runs, until="probe", terminal=Terminal(quiet=True))
        (path,) = runs.glob("jobs/probe-*/records.jsonl")
        state_bits = 0
        for record in RecordStore(path):
            answers.setdefault(record.answer["size"], []).extend(map(float, record.answer["forced"]))
            state_bits = max(state_bits, int(record.answer["state_bits"]))
        (path,) = runs.glob("jobs/train-*/training/metrics.jsonl")
        trained = json.loads(path.read_text().splitlines()[-1])["step"]
    shares = sorted((size, statistics.mean(right)) for size, right in answers.items())
    values = case.vocab_size // 2
    bits, beyond = half_right([(size * math.log2(values), share) for size, share in shares])
    return {
        "state": case.state, "length": case.length, "seed": case.seed, "values": values, "state_bits": state_bits,
        "steps": trained, "seconds": round(time.perf_counter() - began, 1),
        "right": {str(size): round(share, 4) for size, share in shares},
        "half": round(bits, 2), "half_beyond": beyond,
        "recalled": round(max(recalled(size, share, values) for size, share in shares), 2),
    }  # fmt: skip


def in_turn(
    todo: list[Case], steps: int, processes: int, seconds: float
) -> Iterator[tuple[Case, dict[str, Any] | BaseException]]:
    """Results as they come; of a training that failed, why: it says nothing about the others."""
    began, longest = time.perf_counter(), 0.0
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        running: dict[Future[dict[str, Any]], Case] = {}
        while todo or running:
            while todo and len(running) < processes and time.perf_counter() - began + longest < seconds:
                case = todo.pop(0)
                running[pool.submit(run, case, steps)] = case
            if not running:
                break
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                case = running.pop(future)
                if error := future.exception():
                    yield case, error
                    continue
                longest = max(longest, future.result()["seconds"])
                yield case, future.result()


def numbers(state: int) -> int:
    """Numbers in both layers' recurrent state, 64 x N each; the windows of convolutions hold no pairs."""
    return 2 * 64 * state


def summary(found: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """What every state holds: the best of its row lengths for each seed, then the median over seeds."""
    table = []
    for state in sorted({each["state"] for each in found}):
        best: dict[int, dict[str, Any]] = {}
        for each in found:
            if each["state"] == state:
                kept = best.setdefault(each["seed"], each)
                best[each["seed"]] = max(kept, each, key=lambda one: float(one["recalled"]))
        row: dict[str, Any] = {"state": state, "seeds": len(best)}
        for name in ("half", "recalled"):
            values = sorted(float(each[name]) for each in best.values())
            row[name] = [statistics.median(values), values[0], values[-1]]
        row["above"] = sum(each["half_beyond"] == 1 for each in best.values())
        if state:
            row["numbers"] = numbers(state)
            row["recalled_per_number"] = row["recalled"][0] / numbers(state)
            row["recalled_of_bits"] = row["recalled"][0] / (32 * numbers(state))
        table.append(row)
    return table


def show(table: Sequence[dict[str, Any]]) -> None:
    """The table for people."""
    print(f"\n{'N':>4}{'seeds':>7}{'numbers':>9}{'half at bits [lowest, highest]':>34}{'bits recalled':>28}"
          f"{'bits a number':>15}")  # fmt: skip
    for row in table:
        shown = {name: f"{row[name][0]:.1f} [{row[name][1]:.1f}, {row[name][2]:.1f}]" for name in ("half", "recalled")}
        beyond = f" ({row['above']} above)" if row["above"] else ""
        print(f"{row['state'] or 'attn':>4}{row['seeds']:>7}{row.get('numbers', 0):>9}{shown['half'] + beyond:>34}"
              f"{shown['recalled']:>28}{row.get('recalled_per_number', 0):>15.3f}")  # fmt: skip
    fitted = [row for row in table if row["state"] and row["recalled"][0] > 0]
    if len(fitted) > 2:
        logs = [(math.log(row["numbers"]), math.log(row["recalled"][0])) for row in fitted]
        slope, _ = statistics.linear_regression(*zip(*logs, strict=True))
        print(f"bits recalled grow with the state to the power {slope:.2f} (1: in proportion)")


def say(result: dict[str, Any]) -> None:
    who = f"N={result['state']}" if result["state"] else "attention"
    mark = {-1: "<", 0: "", 1: ">"}[result["half_beyond"]]
    found = f"half at {mark}{result['half']:.1f} bits, recalled {result['recalled']:.1f}"
    took = f"{result['steps']} steps in {result['seconds']:.0f} s"
    print(f"{who:<10} rows of {result['length']:<4} seed {result['seed']}: {found}, {took}", flush=True)


def main() -> None:
    """Run the sweep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--seconds", type=float, default=math.inf, help="no training starts that would end later")
    parser.add_argument("--steps", type=int, default=4000, help="at least 600, the warm-up twice")
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--out", type=Path, default=Path("recall_capacity.json"))
    options = parser.parse_args()
    # Processes that this one starts inherit both: one thread each, and no GPU.
    os.environ |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    found: list[dict[str, Any]] = []
    failed: list[dict[str, Any]] = []
    for case, result in in_turn(cases(options.seeds), options.steps, options.processes, options.seconds):
        if isinstance(result, BaseException):
            failed.append({**asdict(case), "error": str(result) or type(result).__name__})
            print(f"failed: {failed[-1]}", flush=True)
        else:
            found.append(result)
            say(result)
        options.out.write_text(json.dumps({"benchmark": "recall_capacity", "steps": options.steps, "cases": found,
                                           "failed": failed, "summary": summary(found)}))  # fmt: skip
    show(summary(found))


if __name__ == "__main__":
    main()
