"""Prompts continued by a model of transformers: together where that is right, shared beginnings computed once.

Prompts of one length go through as they are. Those of similar lengths are padded in front where the model gives the
same after padding (`CausalModel.takes_padding`), and go through one by one where it does not.

Legend: B rows, T tokens, S tokens so far, D width of hidden states.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from longspan.engines.base import Engine, Generation, Sampling, Tokens
from longspan.engines.batched_generation import Rows, batches
from longspan.engines.causal_model import CausalModel, select, state_size
from longspan.engines.generation import synchronise


class CausalGeneration:
    """One call of `generate`.

    Args:
        engine: whose tokenizer, name and context limit apply.
        model: that writes.
        sampling: how; every prompt draws from a stream of its own, that of its place among the prompts.
        chunk: most positions in one forward pass, where the model takes a text in parts.
    """

    def __init__(self, engine: Engine, model: CausalModel, sampling: Sampling, *, chunk: int) -> None:
        self._engine, self._model, self._sampling, self._chunk = engine, model, sampling, chunk

    def continue_from(
        self,
        read: int,
        places: Sequence[int],
        prompts: Sequence[Tokens],
        given: Sequence[Tokens] | None,
        state: Any,
        seconds: float,
    ) -> dict[int, Generation]:
        """Continue some of a call's prompts; see `BatchedGeneration.continue_from`.

        Args:
            state: of one row, which is copied; None before anything.
        """
        answers: dict[int, Generation] = {}
        padded_tokens = self._chunk if self._model.takes_padding and not read else 0
        for batch in batches(prompts, places, self._sampling.max_new_tokens, padded_tokens):
            rows = Rows(self._engine, self._sampling, batch, [len(prompts[i]) for i in batch], given)
            began = self._now() - seconds
            here = None if state is None else select(state, torch.zeros(len(batch), dtype=torch.int64))
            self._continue(rows, [prompts[i][read:] for i in batch], here, began)
            answers |= rows.generations()
        return answers

    def _continue(self, rows: Rows, prompts: Sequence[Tokens], state: Any, began: float) -> None:
        tokens_BT = torch.from_numpy(_rows(prompts))
        mask_BS = _mask(prompts)
        rows.padded = mask_BS is not None
        hidden_B1D, state = self._read(tokens_BT, mask_BS, state)
        while True:
            written = rows.pick(self._model.logits(hidden_B1D[:, -1]))
            elapsed = self._now() - began
            kept = torch.from_numpy(rows.take(written, elapsed, None if state is None else state_size(state)))
            if not len(kept):
                return
            if len(kept) < len(written):
                tokens_BT = tokens_BT[kept]
                mask_BS = None if mask_BS is None else mask_BS[kept]
                state = None if state is None else select(state, kept)
            next_B1 = rows.to_read()
            if mask_BS is not None:
                mask_BS = torch.cat([mask_BS, torch.ones_like(next_B1)], 1)
                hidden_B1D, state = self._model.padded(next_B1, mask_BS, state)
            elif state is not None:
                hidden_B1D, state = self._model.hidden(next_B1, state, keep=True)
            else:
                # No state can be kept: all is computed again.
                tokens_BT = torch.cat([tokens_BT, next_B1], 1)
                hidden_B1D, state = self._read(tokens_BT, None, None)

    def _read(self, tokens_BT: Tensor, mask_BS: Tensor | None, state: Any) -> tuple[Tensor, Any]:
        """The last hidden state (B, 1, D), and the state after the tokens where one is kept."""
        if mask_BS is not None:
            hidden_BTD, state = self._model.padded(tokens_BT, mask_BS, state)
            return hidden_BTD[:, -1:], state
        length = tokens_BT.shape[1]
        part = max(1, self._chunk // len(tokens_BT)) if self._model.takes_parts else length
        hidden_B1D = None
        for start in range(0, length, part):
            tokens = tokens_BT[:, start : start + part]
            hidden_BTD, state = self._model.hidden(tokens, state, keep=self._model.keeps_state)
            hidden_B1D = hidden_BTD[:, -1:]
        assert hidden_B1D is not None
        return hidden_B1D, state

    def _now(self) -> float:
        synchronise(self._model.device)
        return time.perf_counter()


def _rows(prompts: Sequence[Tokens]) -> np.ndarray:
    """int64 (B, T), short ones padded in front."""
    longest = max(map(len, prompts))
    out = np.zeros((len(prompts), longest), np.int64)
    for row, prompt in enumerate(prompts):
        out[row, longest - len(prompt) :] = prompt
    return out


def _mask(prompts: Sequence[Tokens]) -> Tensor | None:
    """int64 (B, T), 0 on padding; None where nothing is padded."""
    lengths = torch.tensor([len(prompt) for prompt in prompts])
    longest = int(lengths.max())
    mask_BT = (torch.arange(longest) >= longest - lengths[:, None]).long()
    return None if bool(mask_BT.all()) else mask_BT
