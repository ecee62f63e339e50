"""Candidates after one long context: computed once and shared, against context and candidate anew, both engines, CPU.

    python benchmarks/shared_context_scoring.py                               # 4 at 32k, 100 at 16k; some minutes
    python benchmarks/shared_context_scoring.py --cases 4x32768 --engines transformers --patterns AM

One model per pattern (width 64, fp32, random weights, 2 heads, head dimension 32; MLPs but in pure Mamba-2), run by the
native engine and, exported, by transformers. `shared` scores all candidates with `score`; `naive` scores context +
candidate as one text with `nll`, for `--naive` of the candidates in each round, and its time is taken as many times as
there are candidates (each is on its own, so that is what all would take). The two take turns; read the ratios (medians
over rounds, of CPU time; one round warms up and is left out). `ideal` counts positions; more is possible, since the
context's pass computes no likelihoods. `difference` is the largest between the log-probabilities of a token both ways.
Prints a table, then one JSON line.
"""

from __future__ import annotations

import argparse
import json
import logging
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from longspan.corpus.tokenizer import Tokenizer, TokenizerConfig, train_tokenizer
from longspan.engines.base import Engine
from longspan.engines.native import NativeEngine
from longspan.engines.opening import open_engine
from longspan.engines.source import ModelSource
from longspan.foundation.randomness import numpy_generator
from longspan.models.interchange import write_folder
from longspan.models.language_model import LanguageModel, ModelConfig

SUFFIX = 24


def build(pattern: str, tokenizer: Tokenizer, folder: Path) -> dict[str, Engine]:
    # Mamba-2 with MLPs and no attention is exported to a class for which transformers keeps no state.
    mlp = "none" if set(pattern) == {"M"} else "swiglu"
    config = ModelConfig(pattern=pattern, width=64, heads=2, state=32, mamba_head_dim=32, mlp=mlp, mlp_width=128)
    model = LanguageModel(config, tokenizer.vocab_size, seed=0)
    write_folder(model, folder / pattern, tokenizer=tokenizer, markers=True, context=2**18)
    source = ModelSource(pretrained=str(folder / pattern), engine="transformers")
    native = NativeEngine(model, tokenizer, markers=True, isolation="full", fingerprint=pattern)
    return {"native": native, "transformers": open_engine(source, "cpu")}


def timed(run: Callable[[], Any]) -> tuple[float, Any]:
    began = time.process_time()
    result = run()
    return time.process_time() - began, result


def measure(engine: Engine, candidates: int, context: int, naive: int, rounds: int) -> dict[str, Any]:
    generator = numpy_generator(0, "benchmark", context, candidates)
    ratios, shared, largest = [], [], 0.0
    for turn in range(rounds + 1):
        prefix = generator.integers(0, 256, context)
        choices = list(generator.integers(0, 256, (candidates, SUFFIX)))
        seconds, scores = timed(lambda prefix=prefix, choices=choices: engine.score(prefix, choices))
        cold_seconds, cold = timed(
            lambda prefix=prefix, choices=choices: [
                engine.nll([np.concatenate([prefix, choice])])[0][-SUFFIX:] for choice in choices[:naive]
            ]
        )
        largest = max(largest, *(float(np.abs(a - b).max()) for a, b in zip(scores, cold, strict=False)))
        if turn:
            shared.append(seconds)
            ratios.append(cold_seconds / naive * candidates / seconds)
    return {
        "candidates": candidates,
        "context": context,
        "shared_seconds": round(statistics.median(shared), 3),
        "ratio": round(statistics.median(ratios), 2),
        "ideal": round(candidates * (context + SUFFIX) / (context + candidates * SUFFIX), 2),
        "difference": largest,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--patterns", nargs="+", default=["AA", "MM", "AM"])
    parser.add_argument("--engines", nargs="+", default=["native", "transformers"])
    parser.add_argument("--cases", nargs="+", default=["4x32768", "100x16384"], help="candidates x context")
    parser.add_argument("--naive", type=int, default=2, help="candidates that go the naive way in a round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    logging.getLogger("transformers").setLevel(logging.ERROR)
    tokenizer = train_tokenizer(TokenizerConfig(vocab_size=258), ["any text will do"])
    print(
        f"{'engine':13} {'pattern':8} {'candidates':>10} {'context':>8} {'shared s':>9} {'ratio':>7} {'ideal':>7}"
        "  difference"
    )
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for pattern in arguments.patterns:
            engines = build(pattern, tokenizer, Path(folder))
            for name in arguments.engines:
                for case in arguments.cases:
                    candidates, context = map(int, case.split("x"))
                    found = measure(engines[name], candidates, context, arguments.naive, arguments.rounds)
                    rows.append({"engine": name, "pattern": pattern, **found})
                    print(
                        f"{name:13} {pattern:8} {candidates:10} {context:8} {found['shared_seconds']:9.2f} "
                        f"{found['ratio']:7.2f} {found['ideal']:7.2f}  {found['difference']:.1e}",
                        flush=True,
                    )
    facts = {"torch": torch.__version__, "machine": platform.machine(), "threads": arguments.threads, "dtype": "fp32"}
    print(json.dumps({"benchmark": "shared_context_scoring", **facts, "rounds": arguments.rounds, "rows": rows}))


if __name__ == "__main__":
    main()
