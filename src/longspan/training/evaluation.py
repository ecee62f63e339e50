"""Validation on the whole split: every target counts once, whatever batch it came in."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch

from longspan.foundation.errors import DataError
from longspan.foundation.progress import Progress, Report
from longspan.models.language_model import IGNORE
from longspan.training.batches import to_device
from longspan.training.ranks import ALONE, Ranks
from longspan.training.result import Validation

if TYPE_CHECKING:
    from longspan.corpus.packing import Batch
    from longspan.models.segments import Isolation


class Evaluated(Protocol):
    """What can be evaluated: a `LanguageModel`, or one that several processes hold together."""

    training: bool

    def train(self, mode: bool = True) -> object:
        """As of a module."""

    def eval(self) -> object:
        """As of a module."""

    def loss(
        self, tokens_BT: torch.Tensor, targets_BT: torch.Tensor, doc_id_BT: torch.Tensor, isolation: Isolation, /
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See `LanguageModel.loss`."""

    def judge(
        self, tokens_BT: torch.Tensor, targets_BT: torch.Tensor, doc_id_BT: torch.Tensor, isolation: Isolation, /
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See `LanguageModel.judge`."""


def evaluate(
    model: Evaluated,
    batches: Iterable[Batch],
    *,
    isolation: Isolation,
    token_bytes: np.ndarray,
    device: torch.device,
    autocast: Callable[[], torch.autocast],
    report: Report,
    step: int,
    tokens: int,
    samples: int = 0,
    ranks: Ranks = ALONE,
    clock: Callable[[], float] = time.perf_counter,
) -> Validation:
    """Token-weighted NLL of `model` over `batches`; the model's mode (train or eval) is restored.

    Batches of a task are also judged string by string; equal `doc_id` means the same string.

    Several ranks take turns, a batch each; the sums are those of one process, bit for bit where the batches' are.

    Args:
        report: called for every batch, or every round of the ranks.
        token_bytes: (V,) UTF-8 bytes per token id, for bits per byte.
        step, tokens, samples: where training stands, copied into the result.
        ranks: who takes part; all of them hold the same batches.

    Raises:
        DataError: the batches hold no target at all.
    """
    started = clock()
    training = model.training
    model.eval()
    nlls: list[torch.Tensor] = []
    num_right = num_whole = num_targets = num_bytes = num_strings = num_batches = 0
    try:
        with torch.no_grad():
            for shared in _rounds(batches, ranks.size):
                report(Progress("validate", done=num_batches, unit="batches"))
                # Without a batch of its own in the last round a rank repeats the first one's, uncounted: where layers
                # are in parts, every rank must take part in every forward pass.
                counted = ranks.rank < len(shared)
                batch = shared[ranks.rank if counted else 0]
                tokens_BT, targets_BT, doc_BT = to_device(batch, device)
                with autocast():
                    if batch.samples:
                        nll, right_N = model.judge(tokens_BT, targets_BT, doc_BT, isolation)
                        right = right_N.cpu().numpy()
                        strings = batch.doc_id[batch.targets != IGNORE]
                        num_right += counted * int(right.sum())
                        num_whole += counted * (len(np.unique(strings)) - len(np.unique(strings[~right])))
                    else:
                        nll, _ = model.loss(tokens_BT, targets_BT, doc_BT, isolation)
                nlls.append(nll.double() * counted)
                num_batches += len(shared)
                for batch in shared:
                    scored = batch.targets[batch.targets != IGNORE]
                    num_targets += scored.size
                    num_bytes += int(token_bytes[scored].sum(dtype=np.int64))
                    num_strings += len(np.unique(batch.doc_id[batch.targets != IGNORE])) if batch.samples else 0
    finally:
        model.train(training)
    if num_targets == 0:
        raise DataError(
            "the validation split has no token to score",
            "at least one document of two tokens",
            "give the validation split more text (`corpus.splits`)",
        )
    nll_sum = _in_order(nlls, num_batches, ranks)
    num_right, num_whole = ranks.sum(torch.tensor([num_right, num_whole])).tolist()
    loss = nll_sum / num_targets
    return Validation(
        step=step,
        tokens=tokens,
        loss=loss,
        # JSON has no infinity, which is what would come of more.
        perplexity=math.exp(min(loss, 700.0)),
        bits_per_byte=nll_sum / (math.log(2) * max(1, num_bytes)),
        num_targets=num_targets,
        num_bytes=num_bytes,
        seconds=clock() - started,
        samples=samples,
        string_accuracy=num_whole / num_strings if num_strings else None,
        token_accuracy=num_right / num_targets if num_strings else None,
        num_strings=num_strings,
    )


def _rounds(batches: Iterable[Batch], size: int) -> Iterator[list[Batch]]:
    """Batches in their order, `size` at a time."""
    shared: list[Batch] = []
    for batch in batches:
        shared.append(batch)
        if len(shared) == size:
            yield shared
            shared = []
    if shared:
        yield shared


def _in_order(nlls: list[torch.Tensor], num_batches: int, ranks: Ranks) -> float:
    """The sum over all batches, added up one by one in their order, whoever computed them."""
    table = torch.zeros(len(nlls), ranks.size, dtype=torch.float64, device=nlls[0].device)
    table[:, ranks.rank] = torch.stack(nlls)
    total = 0.0
    for nll in ranks.sum(table).flatten()[:num_batches].tolist():
        total += nll
    return total
