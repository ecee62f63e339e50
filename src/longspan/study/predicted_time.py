"""How long training will take, from FLOPs and from the rate of this machine."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from typing import Any

from longspan.corpus.tasks.batches import VALIDATION_STRINGS
from longspan.corpus.tasks.corpus import TaskCorpus
from longspan.study.sections import SubjectConfig
from longspan.training.config import TrainingConfig

ASSUMED_EFFICIENCY = 0.35
"""Share of the measured matmul rate that a training step reaches; only for the predicted time."""


def validation_share(config: SubjectConfig, prepared: Mapping[str, Any] | None = None) -> float | None:
    """FLOPs of all validations as a share of those of training; None for text that is not prepared yet.

    A validated token takes one forward pass, a trained one three.

    Args:
        config: what is trained, and how.
        prepared: result of the job that prepared the corpus; a task's validation is known without.
    """
    training, corpus = config.training, config.corpus
    if isinstance(corpus, TaskCorpus):
        spans = [corpus.task.span(size) for size in corpus.task.sizes()]
        a_string = training.context if config.packing.method == "one_per_row" else sum(spans) / len(spans)
        tokens = VALIDATION_STRINGS * a_string
    elif prepared is None:
        return None
    else:
        tokens = prepared["splits"].get("validation", {}).get("tokens", 0)
    evaluations = math.ceil(training.num_steps / training.evaluate_every)
    return evaluations * tokens / (3 * trained_tokens(training))


def trained_tokens(training: TrainingConfig) -> int:
    """Positions trained on, whole steps."""
    return training.num_steps * training.batch_tokens


def matmul_rate() -> float:
    """FLOP/s of a dense fp32 (CPU) or bf16 (CUDA) matrix product, measured in about 0.1 s."""
    import torch

    cuda = torch.cuda.is_available()
    size = 4096 if cuda else 512
    a = torch.ones(size, size, device="cuda" if cuda else "cpu", dtype=torch.bfloat16 if cuda else torch.float32)
    a.normal_(generator=torch.Generator(a.device).manual_seed(0))
    repeats = 20
    a @ a
    if cuda:
        torch.cuda.synchronize()
    started = time.perf_counter()
    for _ in range(repeats):
        product = a @ a
    if cuda:
        torch.cuda.synchronize()
    del product
    rate = 2 * size**3 * repeats / (time.perf_counter() - started)
    return rate * max(torch.cuda.device_count(), 1)
