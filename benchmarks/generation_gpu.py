"""Prompts continued together by the native engine on one GPU: each step as one CUDA graph, and without.

    python benchmarks/generation_gpu.py
    python benchmarks/generation_gpu.py --device cpu --tiny           # the same code at toy sizes, for a look at it

Models of 110 to 130 M parameters in bf16 with random weights and the bytes of texts as tokens. Each call continues
`rows` prompts by `--new` tokens, of one length (`alike`) or of half to all of it (`unlike`, padded). One call before
those that are timed captures the graph; the next ones use it. `same_tokens` is the share of a row's tokens before the
first that the two ways write differently: in bf16 two orders of computation may choose another. Ends in one JSON line.
"""

from __future__ import annotations

import argparse
import os
import sys
from functools import partial

import numpy as np
import torch

from longspan.corpus.tokenizer import TokenizerConfig, train_tokenizer
from longspan.engines.base import Generation, Sampling
from longspan.engines.graphs import VARIABLE
from longspan.engines.native import NativeEngine
from longspan.models.language_model import LanguageModel, ModelConfig
from parts import Parts

VOCAB = 32_000
SHAPES = {"A": ("(A)12", 2048), "M": ("(M)24", 0), "AM": ("(AM)6", 1536)}
TURNS = 3


class Generating(Parts):
    """The parts that measure generation."""

    def __init__(self, device: str, seconds: float, new: int, *, tiny: bool) -> None:
        super().__init__("generation_gpu", device, seconds)
        self.tokenizer = train_tokenizer(TokenizerConfig(vocab_size=258), ["any text will do"])
        self.new, self.tiny = new, tiny

    def engine(self, letter: str) -> NativeEngine:
        pattern, mlp_width = SHAPES[letter]
        width = 64 if self.tiny else 768
        mlp = {"mlp": "swiglu", "mlp_width": mlp_width} if mlp_width else {"mlp": "none"}
        if self.tiny:
            pattern = pattern.rstrip("0123456789") + "1"
        config = ModelConfig(pattern=pattern, width=width, heads=width // 64, state=128, **mlp)
        model = LanguageModel.drawn_on(self.device, torch.bfloat16, config, VOCAB)
        settings = {"markers": False, "isolation": "full", "fingerprint": letter, "dtype": "bf16"}
        return NativeEngine(model, self.tokenizer, device=self.device, **settings)

    def generate(self, letter: str, rows: int, length: int, *, alike: bool) -> None:
        """Both ways, in turns."""
        engine, generator = self.engine(letter), np.random.default_rng(rows)
        lengths = [length if alike else length // 2 + length * row // (2 * rows) for row in range(rows)]
        prompts = [generator.integers(0, 256, each) for each in lengths]
        sampling = Sampling(max_new_tokens=self.new, stop_at_boundary=False)
        seconds: dict[str, list[float]] = {}
        written: dict[str, list[Generation]] = {}
        peak: dict[str, int] = {}
        for way in ("off", "auto"):
            os.environ[VARIABLE] = way
            for turn in range(TURNS + 1):
                engine.forget_peak()
                written[way] = engine.generate(prompts, sampling)
                if turn:
                    seconds.setdefault(way, []).append(max(each.decode_seconds for each in written[way]))
            peak[way] = engine.peak_bytes() or 0
        off, auto = (sorted(seconds[way])[TURNS // 2] for way in ("off", "auto"))
        tokens = rows * (self.new - 1)
        self.add(
            f"{letter} {rows} rows of {length} {'alike' if alike else 'unlike'}",
            eager_tok_s=tokens / off,
            graph_tok_s=tokens / auto,
            faster=off / auto,
            same_tokens=float(np.mean([_alike(*pair) for pair in zip(written["off"], written["auto"], strict=True)])),
            eager_GiB=peak["off"] / 2**30,
            graph_GiB=peak["auto"] / 2**30,
            together=written["auto"][0].together,
        )


def _alike(one: Generation, other: Generation) -> float:
    same = one.tokens == other.tokens
    return float((len(same) if same.all() else int(np.argmin(same))) / len(same))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=60, help="no part begins after these")
    parser.add_argument("--tiny", action="store_true")
    arguments = parser.parse_args()
    run = Generating(arguments.device, arguments.seconds, arguments.new, tiny=arguments.tiny)
    length = 40 if arguments.tiny else 900
    cases = [(rows, alike) for rows in (8, 64) for alike in (True, False)]
    run.run(
        {
            f"{letter} {rows} {alike}": partial(run.generate, letter, rows, length, alike=alike)
            for letter in SHAPES
            for rows, alike in cases
        }
    )
    return run.finish()


if __name__ == "__main__":
    sys.exit(main())
