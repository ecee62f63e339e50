"""Generation from a Longspan model with a state cache: one prompt, timed as one request.

Legend: B rows, T tokens, V vocabulary.
"""

from __future__ import annotations

import time
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from longspan.engines.base import Engine, Generation, Sampling, require_finite
from longspan.foundation.randomness import torch_generator
from longspan.models.language_model import LanguageModel


def generate(
    engine: Engine, model: LanguageModel, prompt_BT: Tensor, sampling: Sampling, *, index: int, chunk: int
) -> Generation:
    """Continue one prompt.

    Args:
        engine: whose tokenizer, name and context limit apply.
        model: in evaluation mode, on the device of the prompt.
        prompt_BT: int64 (1, T), T >= 1.
        sampling: how.
        index: of the prompt among its fellows: each draws from a stream of its own.
        chunk: prompt tokens per forward pass.

    Raises:
        UnusableAnswer: NaN or infinite logits.
    """
    generator = torch_generator(sampling.seed, "generate", index)
    _synchronise(prompt_BT.device)
    began = time.perf_counter()
    state = model.initial_state()
    for part_BT in torch.split(prompt_BT, chunk, dim=1):
        logits_BV, state = model.next_logits(part_BT, state)
    written: list[int] = []
    reason: Literal["stop", "length", "context"] = "length"
    first_token = began
    while True:
        token = _pick(engine, logits_BV[0], sampling, generator)
        if not written:
            # Picking waits for the device, so this is when the first token is really there.
            first_token = time.perf_counter()
        if sampling.stop_at_boundary and token == engine.tokenizer.special.boundary:
            reason = "stop"
            break
        written.append(token)
        if len(written) == sampling.max_new_tokens:
            break
        if engine.context_limit is not None and state.length >= engine.context_limit:
            reason = "context"
            break
        logits_BV, state = model.next_logits(torch.tensor([[token]], device=prompt_BT.device), state)
    ended = time.perf_counter()
    tokens = np.array(written, dtype=np.int64)
    return Generation(
        tokens=tokens,
        text=engine.tokenizer.decode(tokens),
        finish_reason=reason,
        prompt_tokens=prompt_BT.shape[1],
        first_token_seconds=first_token - began,
        decode_seconds=ended - first_token,
        state_bytes=state.bytes(),
    )


def _pick(engine: Engine, logits_V: Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    # Rows beyond the tokenizer's vocabulary stand for nothing.
    logits = logits_V[: engine.tokenizer.vocab_size].float().cpu()
    require_finite(logits.double().numpy(), engine.name, "the vocabulary, while generating")
    if sampling.temperature == 0:
        return int(logits.argmax())
    shares, order = torch.softmax(logits / sampling.temperature, dim=-1).sort(descending=True, stable=True)
    # Kept as long as the tokens before do not yet hold top_p, so that at least one is kept.
    shares = torch.where(shares.cumsum(0) - shares < sampling.top_p, shares, 0.0)
    return int(order[torch.multinomial(shares, 1, generator=generator)])


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
