"""How fast stored answers are scored again: `longspan rescore` over many LongBench-v2 records, one process on a CPU.

    python benchmarks/rescoring_cpu.py
    python benchmarks/rescoring_cpu.py --records 20000 --scorers robust

Writes records with replies of about 400 characters (9 in 10 in the official form, the others without an answer, whose
cause is then looked for), and runs the command for each rule in a process of its own: start, reading, checking every
key, scoring, intervals and printing included. Prints a table, then one JSON line.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from longspan.foundation.files import canonical_json
from longspan.records.store import RECORDS, Record

PROTOCOL = {"kind": "longbench_v2", "recorded": "longbench", "variant": "direct", "context": 8192}


def write(path: Path, count: int) -> None:
    with path.open("w", encoding="utf-8") as file:
        for number in range(count):
            letter = "ABCD"[number * 7 % 4]
            end = f"The correct answer is ({letter})." if number % 10 else "it cannot be told from what is here"
            reply = "".join(f"Passage {number + n} says that {n} of them left. " for n in range(9)) + end
            answer = {"id": str(number), "gold": "ABCD"[number % 4], "response": reply, "context": 8192, "copy": 1}
            record = Record.make(
                probe="longbench_v2",
                protocol=PROTOCOL,
                item=str(number),
                subject=f"model-{number % 20}",
                seed=0,
                fingerprint="benchmark",
                answer=answer,
            )
            file.write(canonical_json(record.model_dump()) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=int, default=100_000)
    parser.add_argument("--scorers", nargs="+", default=["official", "earlier", "robust"])
    options = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder) / RECORDS, options.records)
        for scorer in options.scorers:
            before = resource.getrusage(resource.RUSAGE_CHILDREN)
            began = time.perf_counter()
            command = [sys.executable, "-m", "longspan.cli", "rescore", folder, "--scorer", scorer, "--json"]
            result = subprocess.run(command, check=True, capture_output=True, text=True)
            wall = time.perf_counter() - began
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
            assert json.loads(result.stdout)["records"] == options.records
            rows.append(
                {"scorer": scorer, "wall_seconds": wall, "cpu_seconds": cpu, "per_second": options.records / wall}
            )
    print(f"{'scorer':<10} {'wall s':>8} {'CPU s':>8} {'records/s':>12}")
    for row in rows:
        print(f"{row['scorer']:<10} {row['wall_seconds']:>8.2f} {row['cpu_seconds']:>8.2f} {row['per_second']:>12,.0f}")
    print(json.dumps({"records": options.records, "python": platform.python_version(), "rows": rows}))


if __name__ == "__main__":
    main()
