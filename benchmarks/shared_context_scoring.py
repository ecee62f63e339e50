"""What long prompts share, computed once against anew: candidates of a context, contexts of a sweep; engines on a CPU.

    python benchmarks/shared_context_scoring.py                               # 4 at 32k, 100 at 16k; some minutes
    python benchmarks/shared_context_scoring.py --cases 4x32768 --engines transformers --patterns AM
    python benchmarks/shared_context_scoring.py --cases --patterns AM         # the sweeps alone

One model per pattern (`--width` 64, fp32, random weights, heads of 32; MLPs but in pure Mamba-2), run by the native
engine and, exported, by transformers, on `--device` cpu (times are CPU time) or cuda (wall time). `shared` scores all
candidates with `score`; `naive` scores context + candidate as one text with `nll`, for `--naive` of the candidates in
each round, and its time is taken as many times as there are candidates (each is on its own, so that is what all would
take). The two take turns; read the ratios (medians over rounds; one round warms up and is left out). `ideal` counts
positions; more is possible, since the context's pass computes no likelihoods. `difference` is the largest between the
log-probabilities of a token both ways.

A sweep shows one document, its middle cut out, at growing contexts (`--sweep`), asks each for the likelihood of four
letters (`letters`) and for a reply of 4 tokens too (`both`); each prompt of the second is the beginning of one of the
first. `shared` is one call for all, `naive` one for each. The ideal counts prompt tokens, `computed` those that went
through; attention's cost also depends on where a token stands, and most of what is shared stands near the beginning,
so that with attention `letters` save less than they share (transformers also computes what its mask hides).
Prints two tables, then one JSON line.
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
from longspan.engines.base import Engine, Sampling
from longspan.engines.native import NativeEngine
from longspan.engines.opening import open_engine
from longspan.engines.source import ModelSource
from longspan.foundation.randomness import numpy_generator
from longspan.models.interchange import write_folder
from longspan.models.language_model import LanguageModel, ModelConfig

SUFFIX = 24
HEAD = f"{'shared s':>9} {'ratio':>7} {'ideal':>7}  difference"


def build(pattern: str, tokenizer: Tokenizer, folder: Path, width: int, device: str) -> dict[str, Engine]:
    # Mamba-2 with MLPs and no attention is exported to a class for which transformers keeps no state.
    mlp = "none" if set(pattern) == {"M"} else "swiglu"
    config = ModelConfig(
        pattern=pattern, width=width, heads=width // 32, state=32, mamba_head_dim=32, mlp=mlp, mlp_width=2 * width
    )
    model = LanguageModel(config, tokenizer.vocab_size, seed=0)
    write_folder(model, folder / pattern, tokenizer=tokenizer, markers=True, context=2**18)
    source = ModelSource(pretrained=str(folder / pattern), engine="transformers")
    native = NativeEngine(model, tokenizer, markers=True, isolation="full", fingerprint=pattern)
    return {"native": native, "transformers": open_engine(source, "cpu")}


def shown(found: dict[str, Any]) -> str:
    return f"{found['shared_seconds']:9.2f} {found['ratio']:7.2f} {found['ideal']:7.2f}  {found['difference']:10.1e}"


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


def sweep(engine: Engine, contexts: list[int], ask: str, rounds: int) -> dict[str, Any]:
    generator = numpy_generator(0, "benchmark", "sweep", *contexts)
    letters = [np.array([token]) for token in range(65, 69)]
    sampling = Sampling(max_new_tokens=4, stop_at_boundary=False)
    ratios, seconds, largest, same, asked, computed = [], [], 0.0, True, 0, 0
    for turn in range(rounds + 1):
        document = generator.integers(0, 256, 2 * max(contexts))
        prompts = [np.concatenate([document[: n // 2], document[-(n // 2) :]]) for n in contexts]
        prefixes = [np.append(prompt, generator.integers(0, 256, 6)) for prompt in prompts]
        written = prompts if ask == "both" else []

        def together(written: Any = written, prefixes: Any = prefixes) -> Any:
            return engine.generate_and_score(written, sampling, prefixes, [letters] * len(prefixes))

        def apart(written: Any = written, prefixes: Any = prefixes) -> Any:
            replies = [engine.generate([prompt], sampling)[0] for prompt in written]
            return replies, [engine.score(prefix, letters) for prefix in prefixes]

        before = engine.asked_tokens, engine.shared_tokens
        once, (replies, scores) = timed(together)
        asked, shared = engine.asked_tokens - before[0], engine.shared_tokens - before[1]
        computed = asked - shared
        each, (cold_replies, cold) = timed(apart)
        for some, others in zip(scores, cold, strict=True):
            largest = max(largest, *(float(np.abs(a - b).max()) for a, b in zip(some, others, strict=True)))
        same &= all(a.tokens.tolist() == b.tokens.tolist() for a, b in zip(replies, cold_replies, strict=True))
        if turn:
            seconds.append(once)
            ratios.append(each / once)
    return {
        "ask": ask,
        "contexts": contexts,
        "tokens": asked,
        "computed": computed,
        "shared_seconds": round(statistics.median(seconds), 3),
        "ratio": round(statistics.median(ratios), 2),
        "ideal": round(asked / computed, 2),
        "difference": largest,
        "same_text": same,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--patterns", nargs="+", default=["AA", "MM", "AM"])
    parser.add_argument("--engines", nargs="+", default=["native", "transformers"])
    parser.add_argument("--cases", nargs="*", default=["4x32768", "100x16384"], help="candidates x context")
    parser.add_argument("--sweep", nargs="*", type=int, default=[2048, 4096, 8192, 16384], help="contexts")
    parser.add_argument("--naive", type=int, default=2, help="candidates that go the naive way in a round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    logging.getLogger("transformers").setLevel(logging.ERROR)
    tokenizer = train_tokenizer(TokenizerConfig(vocab_size=258), ["any text will do"])
    rows, swept = [], []
    with tempfile.TemporaryDirectory() as folder:
        built = {
            pattern: build(pattern, tokenizer, Path(folder), arguments.width, arguments.device)
            for pattern in arguments.patterns
        }
        asked = [(name, pattern, built[pattern][name]) for pattern in built for name in arguments.engines]
        if arguments.cases:
            print(f"{'engine':13} {'pattern':8} {'candidates':>10} {'context':>8} {HEAD}")
        for name, pattern, engine in asked:
            for case in arguments.cases:
                candidates, context = map(int, case.split("x"))
                found = measure(engine, candidates, context, arguments.naive, arguments.rounds)
                rows.append({"engine": name, "pattern": pattern, **found})
                print(f"{name:13} {pattern:8} {candidates:10} {context:8} {shown(found)}", flush=True)
        if arguments.sweep:
            print(f"{'engine':13} {'pattern':8} {'sweep':8} {'tokens':>8} {'computed':>9} {HEAD}  same text")
        for name, pattern, engine in asked:
            for ask in ("letters", "both") if arguments.sweep else ():
                found = sweep(engine, arguments.sweep, ask, arguments.rounds)
                swept.append({"engine": name, "pattern": pattern, **found})
                print(
                    f"{name:13} {pattern:8} {ask:8} {found['tokens']:8} {found['computed']:9} {shown(found)}"
                    f"  {'yes' if found['same_text'] else 'NO'}",
                    flush=True,
                )
    facts = {"torch": torch.__version__, "machine": platform.machine(), "threads": arguments.threads, "dtype": "fp32"}
    facts |= {"device": arguments.device, "width": arguments.width}
    print(
        json.dumps(
            {"benchmark": "shared_context_scoring", **facts, "rounds": arguments.rounds, "rows": rows, "sweeps": swept}
        )
    )


if __name__ == "__main__":
    main()
