"""Decoding on one GPU: tokens a second of every mixer, step by step and as one CUDA graph, beside transformers.

    python benchmarks/decode_gpu.py                                   # everything, most important first
    python benchmarks/decode_gpu.py --only attention,decode --seconds 60
    python benchmarks/decode_gpu.py --only decode --theirs --contexts 1024,8192,32768,131072 --batches 1,0
    python benchmarks/decode_gpu.py --device cpu --tiny               # the same code at toy sizes, for a look at it

Models of 110 to 130 M parameters in bf16 with random weights. A prompt of each context is prefilled once and shared
among the rows of a batch; then steps are timed with events on the device (median; `graph` replays one CUDA graph,
`eager` calls the model, where both states fit). `rounding` compares both with the same model in fp32: the graph must
not be further from it than the model called as usual. The largest batch is the most rows, a power of two, whose
states fit in 80 % of the memory that is free by their predicted bytes. `of_copy` is the bytes of weights and states
that a step reads and writes over the rate of a large copy on the same device, measured at the start. With `--theirs`
transformers decodes with the same weights after each model. Ends in one JSON line.
"""

from __future__ import annotations

import argparse
import copy
import cProfile
import pstats
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from decode_ops_gpu import BF16, attention_alone, mamba2_alone, prefill_attention, relative
from longspan.commands.bench.own import byte_tokenizer
from longspan.commands.bench.peers import peers_of
from longspan.commands.bench.setting import Setting
from longspan.engines.transformers import TransformersEngine
from longspan.models.graphed_decoding import GraphedDecoding
from longspan.models.language_model import LanguageModel, ModelConfig
from longspan.models.state import ModelState
from longspan.ops import kernels
from parts import Parts

VOCAB = 32_000
SHAPES: dict[str, dict[str, Any]] = {
    "A": {"pattern": "(A)12", "mlp_width": 2048},
    "M": {"pattern": "(M)24", "mlp": "none"},
    "AM": {"pattern": "(AM)6", "mlp_width": 1536},
    "S": {"pattern": "(S)12", "mlp_width": 2048, "window": 1024},
    "m": {"pattern": "(m)24", "mlp": "none"},
    "D": {"pattern": "(D)12", "mlp_width": 2048},
    "G": {"pattern": "(G)12", "mlp_width": 2048},
    "L": {"pattern": "(L)12", "mlp_width": 2048},
    "C": {"pattern": "(C)12", "mlp_width": 2048},
    "[AM]": {"pattern": "[AM]8", "mlp_width": 1536},
}
SHARE_OF_MEMORY = 0.8
THEIR_STEPS, THEIR_LONGEST = 16, 8192
SPARE = 256


class Decoding(Parts):
    """The parts that measure decoding."""

    def __init__(
        self, device: str, seconds: float, *, tiny: bool, contexts: list[int], batches: list[int], theirs: bool
    ) -> None:
        super().__init__("decode_gpu", device, seconds)
        self.contexts, self.batches, self.theirs = contexts, batches, theirs
        self.largest: dict[tuple[str, int], int] = {}
        self.width = 64 if tiny else 768
        self.tiny = tiny

    def config(self, letter: str) -> ModelConfig:
        settings = dict(SHAPES[letter])
        if self.tiny:
            settings |= {
                "pattern": settings["pattern"].rstrip("0123456789") + "2",
                "mlp_width": 64,
                "delta_head_dim": 48,
            }
        return ModelConfig(width=self.width, heads=self.width // 64, state=128, **settings)

    def model(self, letter: str) -> LanguageModel:
        return LanguageModel.drawn_on(self.device, BF16, self.config(letter), VOCAB).eval()

    @torch.no_grad()
    def prefilled(self, model: LanguageModel, context: int) -> ModelState:
        """One row."""
        generator = torch.Generator().manual_seed(0)
        tokens_BT = torch.randint(0, VOCAB, (1, context), generator=generator)
        state = model.initial_state()
        for part_BT in torch.split(tokens_BT, 8192, dim=1):
            _, after = model(part_BT.to(self.device), None, state)
            assert after is not None
            state = after
        return state

    def free(self) -> int:
        """Bytes."""
        if self.device.type != "cuda":
            return 1 << 28
        return int(torch.cuda.mem_get_info()[0])

    @torch.no_grad()
    def decode(self, letter: str) -> None:
        """Tokens a second at every context and batch."""
        model = self.model(letter)
        weights = sum(p.numel() * p.element_size() for p in model.parameters())
        self.add(f"{letter}", parameters_M=sum(p.numel() for p in model.parameters()) / 1e6)
        for context in self.contexts:
            state = self.prefilled(model, context)
            self.forget()
            row = sum(block.mixer.state_bytes(context + SPARE, 2) for block in model.blocks)
            largest = 2 ** max(0, int(self.free() * SHARE_OF_MEMORY / row).bit_length() - 1)
            self.largest[letter, context] = min(largest, 4096)
            for batch in sorted({min(batch, largest) if batch else min(largest, 4096) for batch in self.batches}):
                try:
                    self.steps(letter, model, state, context, batch, weights, compared=3.5 * batch * row < self.free())
                except torch.cuda.OutOfMemoryError as error:
                    self.failed.append(f"decode {letter} {context} x{batch}: {str(error)[:100]}")
                self.forget()
            del state
            self.forget()
        del model
        self.forget()
        if self.theirs:
            self.decode_theirs(letter)

    def decode_theirs(self, letter: str) -> None:
        """The same weights in transformers with its own cache: one row, and our largest batch or half and half of it.

        A recurrent model is asked at short contexts alone: its prefill in plain torch takes minutes at long ones, and
        its state has one size.
        """
        setting = Setting((letter,), tuple(self.contexts), 0, VOCAB, 0, THEIR_STEPS, self.device, "bf16", 0.0)
        peer = next((each for each in peers_of(self.config(letter), setting) if each.same_weights), None)
        if peer is None:
            self.add(f"transformers {letter}", note="no class of it computes this model")
            return
        model = peer.build(BF16).to(self.device).eval()
        engine = TransformersEngine(model, byte_tokenizer(), markers=False, fingerprint=letter)
        self.add(f"{peer.name} for {letter}", parameters_M=sum(p.numel() for p in model.parameters()) / 1e6)
        longest = max(self.contexts) if letter == "A" else THEIR_LONGEST
        for context in (each for each in self.contexts if each <= longest):
            began = self.now()
            seconds = engine.steps_after(context, THEIR_STEPS)
            one = min(seconds(1) for _ in range(3))
            self.add(f"transformers {letter} {context} x1", tok_s=1 / one, ms=1e3 * one, took=self.now() - began)
            rows = self.largest[letter, context]
            while rows > 1:
                try:
                    step = seconds(rows)
                except torch.cuda.OutOfMemoryError:
                    rows //= 2
                    continue
                finally:
                    self.forget()
                name = f"transformers {letter} {context} x{rows}"
                self.add(name, tok_s=rows / step, ms=1e3 * step, took=self.now() - began)
                break
            del seconds
            self.forget()

    def steps(
        self,
        letter: str,
        model: LanguageModel,
        one: ModelState,
        context: int,
        batch: int,
        weights: int,
        *,
        compared: bool,
    ) -> None:
        """Times steps of a batch; before, compares them with the model called as usual where both states fit."""
        began = self.now()
        graphed = GraphedDecoding(model, batch, context + SPARE)
        captured = self.now() - began
        graphed.load(one)
        generator = torch.Generator().manual_seed(1)
        tokens = torch.randint(0, VOCAB, (batch, 1), generator=generator).to(self.device)
        eager, told = float("nan"), {}
        if compared:
            state, worst, same = one.expand(batch), 0.0, 0.0
            for _ in range(4):
                expected, state = model.next_logits(tokens, state)
                found = graphed.step(tokens)
                worst = max(worst, relative(found, expected))
                same += float((found.argmax(-1) == expected.argmax(-1)).float().mean()) / 4
                tokens = expected.argmax(-1, keepdim=True)
            eager = self.median_seconds(partial(model.next_logits, tokens, state), 6)
            told = {"difference": worst, "same_tokens": same}
            del state, expected, found
            if not worst < 5e-2:
                self.failed.append(f"decode {letter} {context} x{batch}: off by {worst:.1e}")
        graph = self.median_seconds(partial(graphed.step, tokens), 12, inner=4)
        moved = weights + batch * sum(block.mixer.decode_bytes(context, 2) for block in model.blocks)
        self.add(
            f"decode {letter} {context} x{batch}",
            eager_tok_s=batch / eager,
            graph_tok_s=batch / graph,
            graph_ms=1e3 * graph,
            of_copy=moved / graph / self.bytes_per_second,
            capture_ms=1e3 * captured,
            GiB=(torch.cuda.max_memory_allocated() / 2**30) if self.device.type == "cuda" else 0.0,
            **told,
        )

    @torch.no_grad()
    def rounding(self, letter: str, context: int = 1024, rows: int = 4, steps: int = 8) -> None:
        """Whether steps of the graph are off by rounding alone: from fp32 no further than the model called as usual."""
        model = self.model(letter)
        exact = copy.deepcopy(model).float()
        start = self.prefilled(model, context).expand(rows)
        graphed = GraphedDecoding(model, rows, context + SPARE)
        graphed.load(start)
        state, wide = start, ModelState(tuple(layer.map(torch.Tensor.float) for layer in start.layers), start.past)
        tokens = torch.randint(0, VOCAB, (rows, 1), generator=torch.Generator().manual_seed(1)).to(self.device)
        errors: dict[str, list[float]] = {"graph": [], "eager": []}
        for _ in range(steps):
            usual, state = model.next_logits(tokens, state)
            reference, wide = exact.next_logits(tokens, wide)
            errors["graph"].append(relative(graphed.step(tokens), reference))
            errors["eager"].append(relative(usual, reference))
            tokens = reference.argmax(-1, keepdim=True)
        graph, eager = (sum(each) / steps for each in (errors["graph"], errors["eager"]))
        self.add(f"rounding {letter}", graph=graph, eager=eager, ratio=graph / eager)
        if not graph < 1.2 * eager + 1e-4:
            self.failed.append(f"rounding {letter}: {graph:.1e} from fp32, eager {eager:.1e}")

    @torch.no_grad()
    def llama(self, context: int, chunk: int) -> None:
        """Prefill and decoding of the shape of Llama-3.1-8B."""
        config = ModelConfig(
            pattern="(A)32", width=4096, heads=32, kv_heads=8, mlp_width=14_336, rope_base=500_000.0, tied=False
        )
        began = self.now()
        model = LanguageModel.drawn_on(self.device, BF16, config, 128_256).eval()
        self.add("llama 8B drawn", seconds=self.now() - began, GiB=torch.cuda.memory_allocated() / 2**30)
        weights = torch.cuda.memory_allocated()
        graphed = GraphedDecoding(model, 1, context + 64)
        self.forget()
        tokens = torch.randint(0, 128_256, (1, context), device=self.device)
        for turn in range(2 if context < 65_536 else 1):
            torch.cuda.reset_peak_memory_stats()
            began = self.now()
            state = graphed.initial_state()
            for part in torch.split(tokens, chunk, dim=1):
                logits, state = model.next_logits(part, state)
            seconds = self.now() - began
            held = state.bytes()
            extra = torch.cuda.max_memory_allocated() - weights - held
            self.add(
                f"llama 8B prefill {context} by {chunk} turn {turn}",
                seconds=seconds, tok_s=context / seconds, state_GiB=held / 2**30, extra_GiB=extra / 2**30,
            )  # fmt: skip
        graphed.load(state)
        token = logits.argmax(-1, keepdim=True)
        step = self.median_seconds(partial(graphed.step, token), 10)
        eager = self.median_seconds(partial(model.next_logits, token, state), 5)
        moved = weights + sum(block.mixer.decode_bytes(context, 2) for block in model.blocks)
        self.add(
            f"llama 8B decode {context}",
            graph_ms=1e3 * step, eager_ms=1e3 * eager, of_copy=moved / step / self.bytes_per_second,
        )  # fmt: skip

    @torch.no_grad()
    def first_token(self) -> None:
        """Prefill of Mamba-2 layers of width 4,096: what the host takes to start all kernels, and the device in all.

        Where the host takes as long as the whole, the device waits for it, and fewer tokens are no faster.
        """
        layers = 2 if self.tiny else 22
        config = ModelConfig(
            pattern=f"(M){layers}", width=self.width if self.tiny else 4096, mlp="none", state=128, chunk=64
        )
        model = LanguageModel.drawn_on(self.device, BF16, config, VOCAB).eval()
        for context in (64, 256, 1024, 2048, 4096):
            tokens = torch.randint(0, VOCAB, (1, context), device=self.device)
            times = []
            for _ in range(6):
                began = self.now()
                model.next_logits(tokens, model.initial_state())
                host = time.perf_counter() - began
                times.append((host, self.now() - began))
            host, whole = (sorted(each)[len(each) // 2] for each in zip(*times[1:], strict=True))
            self.add(
                f"first token (M){layers} {context}",
                host_ms=1e3 * host, ms=1e3 * whole, host_us_a_layer=1e6 * host / layers,
            )  # fmt: skip
        tokens = torch.randint(0, VOCAB, (1, 1024), device=self.device)
        with cProfile.Profile() as profile:
            model.next_logits(tokens, model.initial_state())
        pstats.Stats(profile).sort_stats("tottime").print_stats(30)


def main() -> int:
    parser = argparse.ArgumentParser(description="Decoding on one GPU.")
    parser.add_argument("--only", default="", help="parts whose name contains one of these words")
    parser.add_argument("--seconds", type=float, default=300.0, help="no part starts after this long")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="toy sizes")
    parser.add_argument("--contexts", default="1024,32768,131072")
    parser.add_argument("--theirs", action="store_true", help="after each model, the same one in transformers")
    parser.add_argument("--batches", default="1,64,0", help="rows; 0: the largest batch")
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        print("no CUDA device here: see --device cpu --tiny", file=sys.stderr)
        return 2
    contexts, batches = ([int(n) for n in each.split(",")] for each in (arguments.contexts, arguments.batches))
    run = Decoding(
        arguments.device,
        arguments.seconds,
        tiny=arguments.tiny,
        contexts=contexts,
        batches=batches,
        theirs=arguments.theirs,
    )
    on_gpu = arguments.device == "cuda"
    name = torch.cuda.get_device_name() if on_gpu else "CPU"
    print(f"{name}; torch {torch.__version__}; {kernels.described(run.device)}", flush=True)
    run.ceiling()
    parts: dict[str, Callable[[], None]] = {f"decode {letter}": partial(run.decode, letter) for letter in ("A", "M")}
    parts |= {"decode AM": partial(run.decode, "AM")}
    parts |= {f"rounding {letter}": partial(run.rounding, letter, 64 if arguments.tiny else 1024) for letter in "AM"}
    if on_gpu:
        parts["llama 8k"] = partial(run.llama, 8192, 8192)
        parts["llama 131k"] = partial(run.llama, 131_072, 8192)
        parts["attention alone"] = partial(attention_alone, run)
        parts["prefill attention"] = partial(prefill_attention, run)
        parts["mamba2 alone"] = partial(mamba2_alone, run)
    parts["first token"] = run.first_token
    parts |= {f"decode {letter}": partial(run.decode, letter) for letter in SHAPES if f"decode {letter}" not in parts}
    run.run(parts, arguments.only)
    return run.finish()


if __name__ == "__main__":
    raise SystemExit(main())
