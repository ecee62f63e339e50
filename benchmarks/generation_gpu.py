"""Prompts continued together by the native engine on one GPU: each step as one CUDA graph, and without.

    python benchmarks/generation_gpu.py
    python benchmarks/generation_gpu.py --device cpu --tiny           # the same code at toy sizes, for a look at it

Models of 110 to 130 M parameters in bf16 with random weights and the bytes of texts as tokens. Each call continues
`rows` prompts by `--new` tokens, of one length (`alike`) or of half to all of it (`unlike`, padded). One call before
those that are timed captures the graph; the next ones use it. `same_tokens` is the share of a row's tokens before the
first that the two ways write differently: in bf16 two orders of computation may choose another. Two parts tell rounding
from a fault: `exact` is the same in fp32, where the ways must agree, and `forced` reads one text both ways in bf16 and
once in fp32 with the same weights: how far the logits are from those of fp32 (whose deviation over the tokens is 1),
and the share of places at which the likeliest token is the same. Ends in one JSON line.
"""

from __future__ import annotations

import argparse
import copy
import os
import sys
from functools import partial

import numpy as np
import torch
from torch import Tensor

from longspan.corpus.tokenizer import TokenizerConfig, train_tokenizer
from longspan.engines.base import Generation, Sampling
from longspan.engines.graphs import VARIABLE
from longspan.engines.native import NativeEngine, torch_dtype
from longspan.models.graphed_decoding import GraphedDecoding
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

    def model(self, letter: str, dtype: torch.dtype) -> LanguageModel:
        pattern, mlp_width = SHAPES[letter]
        width = 64 if self.tiny else 768
        mlp = {"mlp": "swiglu", "mlp_width": mlp_width} if mlp_width else {"mlp": "none"}
        if self.tiny:
            pattern = pattern.rstrip("0123456789") + "1"
        config = ModelConfig(pattern=pattern, width=width, heads=width // 64, state=128, **mlp)
        return LanguageModel.drawn_on(self.device, dtype, config, VOCAB).eval()

    def engine(self, letter: str, dtype: str) -> NativeEngine:
        model = self.model(letter, torch_dtype(dtype))
        settings = {"markers": False, "isolation": "full", "fingerprint": letter, "dtype": dtype}
        return NativeEngine(model, self.tokenizer, device=self.device, **settings)

    def generate(self, letter: str, rows: int, length: int, *, alike: bool, dtype: str = "bf16") -> None:
        """One way, then the other."""
        engine, generator = self.engine(letter, dtype), np.random.default_rng(rows)
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
            f"{letter} {rows} rows of {length} {'alike' if alike else 'unlike'} {dtype}",
            eager_tok_s=tokens / off,
            graph_tok_s=tokens / auto,
            faster=off / auto,
            same_tokens=float(np.mean([_alike(*pair) for pair in zip(written["off"], written["auto"], strict=True)])),
            eager_GiB=peak["off"] / 2**30,
            graph_GiB=peak["auto"] / 2**30,
            together=written["auto"][0].together,
        )

    @torch.inference_mode()
    def forced(self, letter: str, rows: int, length: int) -> None:
        """The logits of one text, read token by token with a graph, without, and without in fp32."""
        model = self.model(letter, torch.bfloat16)
        texts_BT = torch.randint(0, 256, (rows, length + self.new), device=self.device)
        read = partial(self._read, texts_BT=texts_BT, length=length)
        graphed = read(model, GraphedDecoding(model, *texts_BT.shape))
        eager, exact = read(model), read(copy.deepcopy(model).cast(torch.float32))
        spread = exact.std(-1, keepdim=True)
        best = exact.topk(2).values
        from_exact = {"eager": _distance(eager, exact, spread), "graph": _distance(graphed, exact, spread)}
        self.add(
            f"{letter} {rows} texts of {length} forced",
            eager_from_fp32=from_exact["eager"],
            graph_from_fp32=from_exact["graph"],
            ratio=from_exact["graph"] / from_exact["eager"],
            apart=_distance(graphed, eager, spread),
            lead=float(((best[..., 0] - best[..., 1]) / spread[..., 0]).median()),
            eager_choices=_same_choices(eager, exact),
            graph_choices=_same_choices(graphed, exact),
            same_choices=_same_choices(graphed, eager),
        )

    def _read(
        self, model: LanguageModel, graphed: GraphedDecoding | None = None, *, texts_BT: Tensor, length: int
    ) -> Tensor:
        """The logits (T, B, V) after each token from the last of the first `length` on, among the tokenizer's."""
        before = model.initial_state() if graphed is None else graphed.initial_state()
        logits_BV, state = model.next_logits(texts_BT[:, :length], before)
        if graphed is not None:
            graphed.load(state)
        found = []
        for place in range(length, texts_BT.shape[1]):
            found.append(logits_BV[:, : self.tokenizer.vocab_size].float().clone())
            token_B1 = texts_BT[:, place : place + 1]
            if graphed is None:
                logits_BV, state = model.next_logits(token_B1, state)
            else:
                logits_BV = graphed.step(token_B1)
        return torch.stack(found)


def _distance(one: Tensor, other: Tensor, spread: Tensor) -> float:
    return float(((one - other) / spread).square().mean().sqrt())


def _same_choices(one: Tensor, other: Tensor) -> float:
    return float((one.argmax(-1) == other.argmax(-1)).float().mean())


def _alike(one: Generation, other: Generation) -> float:
    same = one.tokens == other.tokens
    return float((len(same) if same.all() else int(np.argmin(same))) / len(same))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=60, help="no part begins after these")
    parser.add_argument("--only", default="", help="parts with one of these words in their name: exact,forced,64")
    parser.add_argument("--tiny", action="store_true")
    arguments = parser.parse_args()
    run = Generating(arguments.device, arguments.seconds, arguments.new, tiny=arguments.tiny)
    length = 40 if arguments.tiny else 900
    cases = [(rows, alike) for rows in (8, 64) for alike in (True, False)]
    parts = {
        f"{letter} exact": partial(run.generate, letter, 8, length, alike=False, dtype="fp32") for letter in SHAPES
    }
    parts |= {f"{letter} forced": partial(run.forced, letter, 8, length) for letter in SHAPES}
    parts |= {
        f"{letter} {rows} {'alike' if alike else 'unlike'}": partial(run.generate, letter, rows, length, alike=alike)
        for letter in SHAPES
        for rows, alike in cases
    }
    run.run(parts, arguments.only)
    return run.finish()


if __name__ == "__main__":
    sys.exit(main())
