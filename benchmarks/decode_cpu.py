"""Decode on CPU: tokens/s of every registered mixer after short and long contexts.

    python benchmarks/decode_cpu.py                          # every letter at 128, 2,048 and 16,384 tokens, minutes
    python benchmarks/decode_cpu.py --letters AMm --contexts 128 4096

One model per letter: 4 layers of that mixer without MLP, width 256, a tied vocabulary of 8192, fp32, batch 1, every
other setting at its default. A context is prefilled in chunks, longer ones on top of shorter ones; then tokens are
decoded one by one, each round from the same state. All letters and contexts take turns, so that a busy machine slows
all of them alike; the first round warms up and is left out. `kept` is the rate at the longest context over that at the
shortest, as the median of the ratios of CPU time per round: about 1 where decoding does not depend on the context.
Prints a table, then one JSON line.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

from longspan.models import budget
from longspan.models.language_model import LanguageModel, ModelConfig
from longspan.models.matrix_layout import lay_out_for_decoding
from longspan.models.mixers import registered
from longspan.models.state import ModelState
from taking_turns import Subject, count, measure, ratio, rows_of

WIDTH, LAYERS, VOCAB, HEADS = 256, 4, 8192, 4


def build(letter: str) -> LanguageModel:
    config = ModelConfig(pattern=letter * LAYERS, width=WIDTH, heads=HEADS, mlp="none")
    model = LanguageModel(config, VOCAB, seed=0).eval()
    lay_out_for_decoding(model)
    return model


def prefill(model: LanguageModel, tokens: torch.Tensor, state: ModelState, chunk: int) -> ModelState:
    for part in tokens.split(chunk, dim=1):
        _, state = model.next_logits(part, state)
    return state


def decoding(model: LanguageModel, state: ModelState, new_tokens: int) -> Callable[[], int]:
    token = torch.zeros((1, 1), dtype=torch.long)

    def run() -> int:
        after = state
        for _ in range(new_tokens):
            _, after = model.next_logits(token, after)
        return new_tokens

    return run


@torch.inference_mode()
def measured(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Per letter its model, and per context rates, bytes of state and seconds of prefill."""
    tokens = torch.randint(0, VOCAB, (1, max(options.contexts)), generator=torch.Generator().manual_seed(0))
    rows, subjects = [], []
    for letter in options.letters:
        model, name = build(letter), registered()[letter].name
        row: dict[str, Any] = {"letter": letter, "mixer": name, "parameters": count(model), "contexts": []}
        state, before, seconds = model.initial_state(), 0, 0.0
        for context in options.contexts:
            started = time.perf_counter()
            state = prefill(model, tokens[:, before:context], state, options.chunk)
            seconds += time.perf_counter() - started
            before = context
            held, formula = state.bytes(), budget.state_bytes(model.config, context)
            if held != formula:
                sys.exit(f"{letter} holds {held} bytes after {context} tokens, {formula} by its formula")
            entry = {"context": context, "state_bytes": held, "prefill_seconds": round(seconds, 2)}
            row["contexts"].append(entry)
            subjects.append(Subject(f"{letter} {context}", decoding(model, state, options.new_tokens)))
        rows.append(row)
        print(f"prefilled {letter} {name} with {before:,} tokens in {seconds:.1f} s", flush=True)
    measure(subjects, options.rounds)
    rates = iter(zip(subjects, rows_of(subjects, options.threads), strict=True))
    for row in rows:
        of_letter = []
        for entry in row["contexts"]:
            subject, rate = next(rates)
            of_letter.append(subject)
            entry |= {key: rate[key] for key in ("tokens_per_second", "lowest", "highest", "cpu_share")}
        row["kept"] = ratio(of_letter[-1].cpu, of_letter[0].cpu)
    return rows


def show(rows: list[dict[str, Any]]) -> None:
    contexts = [entry["context"] for entry in rows[0]["contexts"]]
    columns = "".join(f"{f'at {context:,}':>12}" for context in contexts)
    print(f"\n  {'mixer':<26}{columns}{'kept':>8}{'state':>12}{'CPU got':>9}   (tok/s; KiB at {contexts[-1]:,})")
    for row in rows:
        rates = "".join(f"{entry['tokens_per_second']:>12,.0f}" for entry in row["contexts"])
        share = statistics.mean(entry["cpu_share"] for entry in row["contexts"])
        state = row["contexts"][-1]["state_bytes"] / 1024
        print(f"  {row['letter'] + ' ' + row['mixer']:<26}{rates}{row['kept']:>8.2f}{state:>12,.0f}{share:>9.0%}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--letters", default="".join(registered()), help="default: all that are registered")
    parser.add_argument("--contexts", type=int, nargs="+", default=[128, 2048, 16_384])
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--chunk", type=int, default=512, help="tokens per call of prefill")
    options = parser.parse_args()
    options.contexts.sort()
    torch.set_num_threads(options.threads)
    print(
        f"{options.threads} threads, torch {torch.__version__}, fp32, batch 1, {options.new_tokens} tokens a round, "
        f"median of {options.rounds} rounds, prefill in chunks of {options.chunk}"
    )
    rows = measured(options)
    show(rows)
    print(
        "\n"
        + json.dumps(
            {
                "benchmark": "decode_cpu",
                "torch": torch.__version__,
                "threads": options.threads,
                "rounds": options.rounds,
                "new_tokens": options.new_tokens,
                "dtype": "fp32",
                "tunables": os.environ.get("GLIBC_TUNABLES", ""),
                "mixers": rows,
            }
        )
    )


if __name__ == "__main__":
    main()
