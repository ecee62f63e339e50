"""The most sequences whose states fit into a device's memory, found by trying."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from longspan.engines.base import LargestBatch
from longspan.engines.graphs import Graphs
from longspan.models.graphed_decoding import GraphedDecoding
from longspan.models.language_model import LanguageModel

MOST_ROWS, BATCH_STEPS = 4_096, 8
"""Sequences at a time beyond which no larger batch is sought, and steps that each is timed for."""
CLOSE = 16
"""The search ends where the largest batch is known to one part in so many."""


def search(seconds_per_step: Callable[[int], float], guess: int = 1) -> LargestBatch:
    """Tries numbers of rows until the largest that fits is known.

    Args:
        seconds_per_step: of decoding so many rows; torch.cuda.OutOfMemoryError where they do not fit.
        guess: tried first.
    """
    fits, seconds, too_many = 0, 0.0, MOST_ROWS + 1
    rows = max(1, min(MOST_ROWS, guess))
    while fits + 1 < too_many:
        try:
            seconds = seconds_per_step(rows)
            fits = rows
        except torch.cuda.OutOfMemoryError:
            too_many = rows
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        if too_many <= MOST_ROWS and too_many - fits <= max(1, fits // CLOSE):
            break
        if too_many > MOST_ROWS:
            rows = min(MOST_ROWS, max(fits + 1, fits * 9 // 8) if guess > 1 else 2 * fits)
        else:
            rows = max(1, too_many * 7 // 8) if not fits and guess > 1 else (fits + too_many) // 2
    return LargestBatch(fits, fits / seconds) if fits else LargestBatch(0)


@torch.inference_mode()
def largest_native_batch(model: LanguageModel, graphs: Graphs, context: int) -> LargestBatch:
    """The most rows after `context` random tokens whose states, with room for the steps, fit beside the model."""
    graphs.drop()
    torch.cuda.empty_cache()
    weight = model.head_weight
    slots = context + BATCH_STEPS + 2
    # Rows of attention write into a buffer of each step's own, so a little is left over.
    row = sum(block.mixer.state_bytes(slots, weight.element_size()) for block in model.blocks)
    prompt_BT = torch.randint(0, model.vocab_size, (1, context), device=weight.device)
    one = model.initial_state()
    for part_BT in torch.split(prompt_BT, 8_192, dim=1):
        _, one = model.next_logits(part_BT, one)

    def seconds_per_step(rows: int) -> float:
        graphed = GraphedDecoding(model, rows, slots)
        graphed.load(one)
        tokens_B1 = torch.zeros(rows, 1, dtype=torch.long, device=weight.device)
        logits_BV = graphed.step(tokens_B1)
        torch.cuda.synchronize(weight.device)
        began = time.perf_counter()
        for _ in range(BATCH_STEPS):
            logits_BV = graphed.step(logits_BV.argmax(-1, keepdim=True))
        torch.cuda.synchronize(weight.device)
        return (time.perf_counter() - began) / BATCH_STEPS

    return search(seconds_per_step, guessed_rows(weight.device, row))


def guessed_rows(device: torch.device, row: int) -> int:
    """How many states of `row` bytes the free memory of a device has room for, at least 2."""
    return max(2, int(torch.cuda.mem_get_info(device)[0] * 0.97) // row)
