"""Validation on the whole split: every target counts once, whatever batch it came in."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

import numpy as np
import torch

from longspan.foundation.errors import DataError
from longspan.foundation.progress import Progress, Report
from longspan.models.language_model import IGNORE
from longspan.training.batches import to_device
from longspan.training.result import Validation

if TYPE_CHECKING:
    from longspan.corpus.packing import Batch
    from longspan.models.language_model import LanguageModel
    from longspan.models.segments import Isolation


def evaluate(
    model: LanguageModel,
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
    clock: Callable[[], float] = time.perf_counter,
) -> Validation:
    """Token-weighted NLL of `model` over `batches`; the model's mode (train or eval) is restored.

    Batches of a task are also judged string by string; equal `doc_id` means the same string.

    Args:
        token_bytes: (V,) UTF-8 bytes per token id, for bits per byte.
        step, tokens, samples: where training stands, copied into the result.

    Raises:
        DataError: the batches hold no target at all.
    """
    started = clock()
    training = model.training
    model.eval()
    total = torch.zeros((), dtype=torch.float64, device=device)
    num_targets = num_bytes = num_right = num_strings = num_whole = 0
    try:
        with torch.no_grad():
            for index, batch in enumerate(batches):
                report(Progress("validate", done=index, unit="batches"))
                tokens_BT, targets_BT, doc_BT = to_device(batch, device)
                with autocast():
                    if batch.samples:
                        nll, right_N = model.judge(tokens_BT, targets_BT, doc_BT, isolation)
                        right = right_N.cpu().numpy()
                        strings = batch.doc_id[batch.targets != IGNORE]
                        num_right += int(right.sum())
                        num_strings += len(np.unique(strings))
                        num_whole += len(np.unique(strings)) - len(np.unique(strings[~right]))
                    else:
                        nll, _ = model.loss(tokens_BT, targets_BT, doc_BT, isolation)
                total += nll.double()
                scored = batch.targets[batch.targets != IGNORE]
                num_targets += scored.size
                num_bytes += int(token_bytes[scored].sum(dtype=np.int64))
    finally:
        model.train(training)
    if num_targets == 0:
        raise DataError(
            "the validation split has no token to score",
            "at least one document of two tokens",
            "give the validation split more text (`corpus.splits`)",
        )
    nll_sum = float(total.item())
    loss = nll_sum / num_targets
    return Validation(
        step=step,
        tokens=tokens,
        loss=loss,
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
