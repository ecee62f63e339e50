"""Suffix identification with one prefix pass per question against recomputing the context for each candidate, on CPU.

    python benchmarks/suffix_identification.py
    python benchmarks/suffix_identification.py --contexts 256 1024 --candidates 4 8 --rounds 7

Both ways score the same questions with the same native engine, weights and batch budget; their scores are compared
too. `reuse` computes the context once and expands its state to all candidates; `recompute` passes context + candidate
for every candidate, batched just as well. fp32, width 128, 4 layers, vocabulary 4096, 16-token candidates. The ways
take turns, so that a busy machine slows both alike: read the ratios (medians of per-round ratios; the first round warms
up and is left out). `ideal` counts positions: candidates x (context + suffix) / (context + candidates x suffix). More
is possible, since the context's pass computes neither logits nor likelihoods. Prints a table, then one JSON line.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from longspan.corpus.tokenizer import Tokenizer, TokenizerConfig, train_tokenizer
from longspan.engines.native import NativeEngine
from longspan.foundation.randomness import numpy_generator
from longspan.models.language_model import LanguageModel, ModelConfig

VOCAB, SUFFIX = 4096, 16


def build(pattern: str, tokenizer: Tokenizer) -> NativeEngine:
    config = ModelConfig(pattern=pattern, width=128, heads=4, state=64, mamba_head_dim=32)
    return NativeEngine(
        LanguageModel(config, VOCAB, seed=0), tokenizer, markers=False, isolation="full", fingerprint=pattern
    )


def timed(run: Callable[[], list[Any]]) -> tuple[float, float, list[Any]]:
    wall, cpu = time.perf_counter(), time.process_time()
    result = run()
    return time.perf_counter() - wall, time.process_time() - cpu, result


def measure(engine: NativeEngine, context: int, candidates: int, rounds: int) -> dict[str, Any]:
    questions = max(2, 8192 // context)
    generator = numpy_generator(0, "benchmark", context)
    prefixes = list(generator.integers(0, 256, (questions, context)))
    choices = [list(some) for some in generator.integers(0, 256, (questions, candidates, SUFFIX))]
    whole = [np.concatenate([p, c]) for p, some in zip(prefixes, choices, strict=True) for c in some]

    def reuse() -> list[Any]:
        return [c.sum() for some in engine.score_many(prefixes, choices) for c in some]

    def recompute() -> list[Any]:
        return [nll[-SUFFIX:].sum() for nll in engine.nll(whole)]

    wall, cpu = [], []
    seconds = []
    for turn in range(rounds + 1):
        fast, slow = timed(reuse), timed(recompute)
        np.testing.assert_allclose(fast[2], slow[2], rtol=1e-5)
        if turn:
            wall.append(slow[0] / fast[0])
            cpu.append(slow[1] / fast[1])
            seconds.append(fast[0])
    return {
        "pattern": engine.name,
        "context": context,
        "candidates": candidates,
        "questions_per_second": questions / statistics.median(seconds),
        "ratio_wall": statistics.median(wall),
        "ratio_cpu": statistics.median(cpu),
        "ideal": candidates * (context + SUFFIX) / (context + candidates * SUFFIX),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--patterns", nargs="+", default=["AAAA", "MMMM", "AMAM"])
    parser.add_argument("--contexts", nargs="+", type=int, default=[64, 256, 1024])
    parser.add_argument("--candidates", nargs="+", type=int, default=[4])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    tokenizer = train_tokenizer(TokenizerConfig(vocab_size=258), ["any text will do"])
    print(
        f"{'pattern':8} {'context':>8} {'candidates':>10} {'questions/s':>12} {'x wall':>7} {'x cpu':>7} {'ideal':>6}"
    )
    rows = []
    for pattern in arguments.patterns:
        engine = build(pattern, tokenizer)
        for context in arguments.contexts:
            for candidates in arguments.candidates:
                row = measure(engine, context, candidates, arguments.rounds)
                rows.append(row)
                print(
                    f"{pattern:8} {context:8} {candidates:10} {row['questions_per_second']:12.1f} "
                    f"{row['ratio_wall']:7.2f} {row['ratio_cpu']:7.2f} {row['ideal']:6.2f}",
                    flush=True,
                )
    facts = {"torch": torch.__version__, "machine": platform.machine(), "threads": arguments.threads, "dtype": "fp32"}
    print(json.dumps({"benchmark": "suffix_identification", **facts, "rounds": arguments.rounds, "rows": rows}))


if __name__ == "__main__":
    main()
