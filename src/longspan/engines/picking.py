"""The next token from its logits.

Legend: V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from longspan.engines.base import Engine, Sampling, require_finite


def pick(engine: Engine, logits_V: Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    """Draw as `sampling` says; rows beyond the tokenizer's vocabulary stand for nothing.

    Raises:
        UnusableAnswer: NaN or infinite logits.
    """
    logits = logits_V[: engine.tokenizer.vocab_size].float().cpu()
    require_finite(logits.double().numpy(), engine.name, "the vocabulary, while generating")
    if sampling.temperature == 0:
        return int(logits.argmax())
    shares, order = torch.softmax(logits / sampling.temperature, dim=-1).sort(descending=True, stable=True)
    if sampling.top_k is not None:
        shares = shares[: sampling.top_k] / shares[: sampling.top_k].sum()
    # Kept as long as the tokens before do not yet hold top_p, so that at least one is kept.
    shares = torch.where(shares.cumsum(0) - shares < sampling.top_p, shares, 0.0)
    return int(order[torch.multinomial(shares, 1, generator=generator)])
