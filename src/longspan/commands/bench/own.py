"""Longspan's own models, measured as a user has them: the training loop itself, and the engine that generates."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from longspan.commands.bench.compared import FEWEST
from longspan.commands.bench.setting import Setting
from longspan.corpus.packing import Batch
from longspan.corpus.tokenizer import Tokenizer, TokenizerConfig, train_tokenizer
from longspan.engines.base import Engine, Sampling
from longspan.engines.native import NativeEngine
from longspan.foundation.errors import Stopped
from longspan.foundation.progress import Progress
from longspan.foundation.randomness import numpy_generator
from longspan.models.config import ModelConfig
from longspan.models.language_model import LanguageModel
from longspan.training.checkpoint import read_state
from longspan.training.config import TrainingConfig
from longspan.training.loop import train
from longspan.training.measurement import PeakMemory
from longspan.training.metrics import read_metrics
from longspan.training.run import WARMUP_STEPS

LEAST_WINDOWS = LEAST_REPEATS = FEWEST
MOST_REPEATS = 20
KEPT_ROWS = 64
"""Random rows that come round again, so that making them costs nothing."""
NEVER = 10**9


@dataclass
class RandomRows:
    """Endless rows of random tokens, one document each."""

    rows: int
    context: int
    vocab_size: int
    taken: int = 0
    kept: dict[int, np.ndarray] = field(default_factory=dict)

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        tokens = np.stack([self._row((self.taken + row) % KEPT_ROWS) for row in range(self.rows)])
        self.taken += self.rows
        return Batch(tokens[:, :-1], tokens[:, 1:], np.zeros_like(tokens[:, 1:]))

    def _row(self, number: int) -> np.ndarray:
        if number not in self.kept:
            generator = numpy_generator(0, "bench", number)
            self.kept[number] = generator.integers(0, self.vocab_size, self.context + 1).astype(np.int32)
        return self.kept[number]

    def state_dict(self) -> dict[str, Any]:
        """See `ResumableBatches`."""
        return {"taken": self.taken}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See `ResumableBatches`."""
        self.taken = state["taken"]


def rows_of(setting: Setting, context: int) -> int:
    """Rows of a training step."""
    return max(1, setting.batch_tokens // context)


def trained(config: ModelConfig, context: int, setting: Setting, seconds: float) -> tuple[list[float], int]:
    """Train for so many seconds; tokens/s of each logged window, and the peak of memory in bytes.

    At least a few windows are measured, however long they take.
    """
    rows = rows_of(setting, context)
    # A line in the log waits for the device; on a GPU several steps share one.
    log_every = 4 if setting.device.type == "cuda" else 1
    training = TrainingConfig(
        context=context,
        batch_tokens=rows * context,
        steps=NEVER,
        peak_lr=1e-4,
        schedule="constant",
        warmup=1,
        dtype=setting.dtype,
        evaluate_every=NEVER,
        checkpoint_every=NEVER,
        log_every=log_every,
    )
    least = WARMUP_STEPS + LEAST_WINDOWS * log_every + log_every
    calls = 0
    started = time.perf_counter()

    def report(progress: Progress, /) -> None:
        nonlocal calls, started
        calls += progress.stage == "train"
        if calls <= WARMUP_STEPS:
            # Compiling is no part of what was asked for.
            started = time.perf_counter()
        if calls > least and time.perf_counter() - started > seconds:
            raise Stopped("measured")

    with TemporaryDirectory(prefix="longspan-bench-") as folder:
        try:
            train(
                LanguageModel(config, setting.vocab_size),
                training,
                make_batches=lambda: RandomRows(rows, context, setting.vocab_size),
                validation=lambda: iter(()),
                isolation="full",
                token_bytes=np.ones(setting.vocab_size, np.int32),
                directory=Path(folder),
                device=setting.device,
                report=report,
            )
        except Stopped:
            lines = read_metrics(Path(folder) / "metrics.jsonl", "train")
            state = read_state(Path(folder) / "checkpoints" / "last")["state"]
    rates = [line["tokens_per_second"] for line in lines if line["tokens_per_second"]]
    return rates, state["peak_memory_bytes"]


def byte_tokenizer() -> Tokenizer:
    """One token a byte: enough to write something."""
    return train_tokenizer(TokenizerConfig(vocab_size=258), ["a"])


def native_engine(config: ModelConfig, setting: Setting) -> NativeEngine:
    """An untrained model that generates."""
    return NativeEngine(
        LanguageModel(config, setting.vocab_size),
        byte_tokenizer(),
        markers=False,
        isolation="full",
        fingerprint="bench",
        device=setting.device,
        dtype=setting.dtype,
    )


@dataclass(frozen=True)
class Generated:
    """Rates of prefill and decoding, tokens/s, the state after the context and the peak of memory in bytes."""

    prefill: list[float]
    decode: list[float]
    state_bytes: int
    memory_bytes: int


def generated(engine: Engine, context: int, setting: Setting, seconds: float) -> Generated:
    """One fresh prompt at a time, after one that is not counted, for so many seconds and at least a few times."""
    sampling = Sampling(max_new_tokens=setting.new_tokens, stop_at_boundary=False)
    memory = PeakMemory(setting.device)
    prefill, decode, state_bytes = [], [], 0
    started = time.perf_counter()
    for repeat in range(MOST_REPEATS + 1):
        prompt = numpy_generator(0, "prompt", context, repeat).integers(0, engine.tokenizer.vocab_size, context)
        (written,) = engine.generate([prompt], sampling)
        if written.failure:
            raise RuntimeError(f"{written.failure}: {written.detail}")
        if repeat:
            prefill.append(context / written.first_token_seconds)
            decode.append((len(written.tokens) - 1) / written.decode_seconds)
        else:
            started = time.perf_counter()
        state_bytes = written.state_bytes or 0
        if len(prefill) >= LEAST_REPEATS and time.perf_counter() - started > seconds:
            break
    return Generated(prefill, decode, state_bytes, memory.bytes())
