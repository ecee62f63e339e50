"""A causal language model of transformers as a function of tokens and state, and which ways to call it are right.

Not every architecture takes a long text in parts, or goes on after a text with several tokens at a time: some start
their recurrent state afresh without a word. So each way is tried on a few tokens when a model is taken over, and only
ways that give the same as the whole text at once are used; the others are told.

Legend: B rows, T tokens, D width of hidden states, V vocabulary, N positions.
"""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from longspan.engines.precision import in_fp32, no_room_for_fp32
from longspan.foundation.errors import first_line
from longspan.foundation.randomness import torch_generator
from longspan.ops.linear_cross_entropy import default_chunk, linear_cross_entropy

TRIED_TOKENS, TRIED_CUT, TRIED_PADDING = 24, 11, 4
SAME, SAME_ROUNDED = 1e-4, 0.05
"""Largest relative difference of logits (root mean square) between ways that are the same: in fp32, and rounded."""


@dataclass(frozen=True)
class Mark:
    """What of a state must be put back after a continuation: tensors of layers, and how long caches were."""

    kept: list[tuple[Any, dict[str, Any]]]
    lengths: list[tuple[Any, int]]


class CausalModel:
    """A model with its ways.

    Attributes:
        model: of transformers, on its device, in evaluation mode.
        device, dtype: of its parameters.
        returns_state: whether it can be called with the state after a text's beginning at all, right or not.
        keeps_state: whether a text can go on from the state after its beginning, one token at a time.
        takes_parts: whether it can go on by several tokens at a time.
        takes_padding: whether a text is the same after masked tokens before it, so that texts of unlike lengths can
            be continued together.
        head_found: whether its logits are a known function of its hidden states.
        notes: what of this a reader must know.
    """

    def __init__(self, model: nn.Module) -> None:
        """Take a model over and try its ways."""
        self.model: Any = model.eval()
        parameter = next(model.parameters())
        self.device, self.dtype = parameter.device, parameter.dtype
        self.notes: list[str] = []
        names = inspect.signature(self.model.forward).parameters
        self._takes_positions = "position_ids" in names
        self._state_name = next((name for name in ("past_key_values", "cache_params") if name in names), None)
        short_of = no_room_for_fp32(model) if self.dtype.itemsize < 4 else None
        self._rounded = short_of is not None
        self._same = SAME_ROUNDED if self._rounded else SAME
        if self._rounded:
            self.notes.append(
                f"its ways were tried with the rounding of {str(self.dtype).removeprefix('torch.')}, where logits "
                f"{SAME_ROUNDED:.0%} apart count as the same, and not in fp32: {short_of}"
            )
        self._body: Callable[..., Any] = self.model
        self._head: Any = None
        self._factor, self._cap = _head_settings(self.model.config)
        with nullcontext() if self._rounded else in_fp32(model), torch.inference_mode():
            self.head_found = self._find_head()
            self.keeps_state, self.takes_parts = self._find_ways()
            self.takes_padding = self.keeps_state and self._find_padding()
        if self.dtype.itemsize < 4 and not self._rounded and self.returns_state:
            self._close_what_fails()

    @contextmanager
    def as_called(self) -> Iterator[None]:
        """Go on from states even where that is not right, as `generate` of transformers does: for what it costs."""
        right = self.keeps_state
        self.keeps_state = self.returns_state
        try:
            yield
        finally:
            self.keeps_state = right

    def hidden(self, tokens_BT: Tensor, state: Any = None, *, keep: bool = False, **more: Any) -> tuple[Tensor, Any]:
        """Last hidden states (B, T, D), which `logits` and `nll` take, and the state after the tokens.

        Args:
            tokens_BT: int64, moved to the device.
            state: of what came before; it may be changed.
            keep: whether the state is wanted; None is returned otherwise.
            more: what else the forward pass takes.
        """
        if state is not None:
            more[self._state_name or ""] = state
        output = self._body(input_ids=tokens_BT.to(self.device), use_cache=keep, **more)
        hidden_BTD = output.last_hidden_state if self._head is not None else output.logits
        return hidden_BTD, getattr(output, self._state_name or "", None) if keep else None

    def padded(self, tokens_BT: Tensor, mask_BS: Tensor, state: Any = None, *, keep: bool = True) -> tuple[Tensor, Any]:
        """`hidden` of texts with masked tokens before them.

        Args:
            tokens_BT: int64, what comes now.
            mask_BS: int64, of all tokens up to the last of these; 0 on masked ones.
            state: of what came before; it may be changed.
            keep: whether the state is wanted.
        """
        mask_BS = mask_BS.to(self.device)
        more = {"attention_mask": mask_BS}
        if self._takes_positions:
            more["position_ids"] = (mask_BS.cumsum(-1) - 1).clamp_min(0)[:, -tokens_BT.shape[1] :]
        return self.hidden(tokens_BT, state, keep=keep, **more)

    def logits(self, hidden: Tensor) -> Tensor:
        """fp32 logits (..., V) of hidden states (..., D)."""
        if self._head is None:
            return hidden.float()
        logits: Tensor = self._head(hidden.to(self._head.weight.dtype)).float()
        if self._factor != 1.0:
            logits = logits * self._factor
        return logits if self._cap is None else torch.tanh(logits / self._cap) * self._cap

    def nll(self, hidden_ND: Tensor, targets_N: Tensor) -> Tensor:
        """fp32 (N,) nats of each target; the logits of a few positions live at a time."""
        targets_N = targets_N.to(self.device)
        if self._head is not None and self._head.bias is None and self._factor == 1.0 and self._cap is None:
            return linear_cross_entropy(hidden_ND, self._head.weight, targets_N, reduction="none")
        parts = [hidden_ND[:0, 0].float()]
        for hidden, targets in zip(torch.split(hidden_ND, self.rows), torch.split(targets_N, self.rows), strict=True):
            logits = self.logits(hidden)
            parts.append(torch.logsumexp(logits, -1) - logits.gather(-1, targets[:, None])[:, 0])
        return torch.cat(parts)

    @property
    def rows(self) -> int:
        """Positions whose logits live at a time."""
        return default_chunk(self.vocab_size, self.device)

    @property
    def vocab_size(self) -> int:
        """Rows of the head."""
        return int(self.model.config.get_text_config(decoder=True).vocab_size)

    # --- how it is found out ------------------------------------------------------------------------------------------

    def _find_head(self) -> bool:
        head, body = self.model.get_output_embeddings(), self.model.base_model
        tokens_BT = self._tried()[:, :TRIED_CUT]
        wanted = self.model(input_ids=tokens_BT, use_cache=False).logits
        if isinstance(head, nn.Linear) and body is not self.model:
            self._body, self._head = body, head
            found = self.logits(self.hidden(tokens_BT)[0])
            if found.shape == wanted.shape and _relative(found, wanted) <= self._same:
                return True
            self._body, self._head = self.model, None
        self.notes.append(
            "its logits are no known function of its hidden states, so they are computed for every position, in parts "
            "where it takes a text in parts"
        )
        return False

    def _find_ways(self) -> tuple[bool, bool]:
        self.returns_state = False
        tokens_BT = self._tried()
        whole = self.logits(self.hidden(tokens_BT)[0])[:, TRIED_CUT:]
        try:
            _, state = self.hidden(tokens_BT[:, :TRIED_CUT], keep=True)
            if state is None:
                raise ValueError("it returns no state")
            steps = []
            going = select(state, torch.arange(len(tokens_BT)), share=False)
            for place in range(TRIED_CUT, TRIED_TOKENS):
                hidden_B1D, going = self.hidden(tokens_BT[:, place : place + 1], going, keep=True)
                steps.append(self.logits(hidden_B1D))
            stepped = _relative(torch.cat(steps, 1), whole)
        except Exception as error:  # whatever a model's code raises: this way is closed
            self.notes.append(
                f"no state can be kept ({first_line(error)}), so every request is computed from its beginning"
            )
            return False, False
        self.returns_state = True
        if stepped > self._same:
            self.notes.append(
                f"going on from its state gives other logits than the whole text (relative difference {stepped:.1g}), "
                "so every request is computed from its beginning; only costs are measured with it, as its own "
                "`generate` would go on"
            )
            return False, False
        try:
            parted = _relative(self.logits(self.hidden(tokens_BT[:, TRIED_CUT:], state, keep=True)[0]), whole)
        except Exception as error:
            self.notes.append(f"a text cannot go through in parts ({first_line(error)})")
            return True, False
        # With rounding, several tokens at a time may be about as far off as one at a time, which is known to be right.
        bound = max(2 * stepped, SAME_ROUNDED / 5) if self._rounded else self._same
        if parted > bound:
            self.notes.append(
                f"a text in parts gives other logits than the whole (relative difference {parted:.1g}), so a prompt "
                "goes through at once and continuations token by token"
            )
        return True, parted <= bound

    def _find_padding(self) -> bool:
        tokens_BT, mask_BT = self._tried(), torch.ones((2, TRIED_TOKENS), dtype=torch.int64)
        wanted = [self.logits(self.hidden(row_BT)[0]) for row_BT in (tokens_BT[:1, TRIED_PADDING:], tokens_BT[1:])]
        tokens_BT[0, :TRIED_PADDING], mask_BT[0, :TRIED_PADDING] = 0, 0
        try:
            hidden_BTD, state = self.padded(tokens_BT[:, :TRIED_CUT], mask_BT[:, :TRIED_CUT])
            found = [self.logits(hidden_BTD[:, -1:])]
            for end in range(TRIED_CUT + 1, TRIED_TOKENS + 1):
                hidden_BTD, state = self.padded(tokens_BT[:, end - 1 : end], mask_BT[:, :end], state)
                found.append(self.logits(hidden_BTD))
        except Exception as error:  # whatever a model's code raises: this way is closed
            self.notes.append(
                f"texts cannot be padded ({first_line(error)}), so those of unlike lengths are continued one by one"
            )
            return False
        apart = _relative(torch.cat(found, 1), torch.cat([each[:, -len(found) :] for each in wanted]))
        if apart > (SAME_ROUNDED / 2 if self._rounded else self._same):
            self.notes.append(
                f"padding before a text changes its logits (relative difference {apart:.1g}), so texts of unlike "
                "lengths are continued one by one"
            )
            return False
        return True

    @torch.inference_mode()
    def _close_what_fails(self) -> None:
        """Ways that are right in fp32 and raise in the model's own precision."""
        self._same = math.inf
        works, takes_parts = self._find_ways()
        self.keeps_state, self.takes_parts = self.keeps_state and works, self.takes_parts and takes_parts
        self.takes_padding = self.takes_padding and works and self._find_padding()

    def _tried(self) -> Tensor:
        generator = torch_generator(0, "causal_model", self.vocab_size)
        return torch.randint(0, self.vocab_size, (2, TRIED_TOKENS), generator=generator).to(self.device)


def select(state: Any, rows: Tensor, *, share: bool = True) -> Any:
    """A copy of a state with the given rows, in this order and as often as they are named.

    Args:
        state: a cache of transformers.
        rows: int64 (R,).
        share: leave keys and values where they are, if the rows are the state's own: going on makes new ones of them
            and never changes the old.
    """
    copied = copy.copy(state)
    copied.layers = []
    for layer in state.layers:
        twin = copy.copy(layer)
        for name, value in vars(layer).items():
            if share and name in ("keys", "values") and _is_all(rows, value):
                continue
            setattr(twin, name, _selected(value, rows))
        copied.layers.append(twin)
    return copied


def mark(state: Any) -> Mark:
    """Remember a state before a continuation changes it: recurrent tensors are copied, caches only measured."""
    from transformers.cache_utils import DynamicLayer

    kept, lengths = [], []
    for layer in state.layers:
        grows = isinstance(layer, DynamicLayer) and not layer.is_sliding
        if grows:
            lengths.append((layer, int(layer.get_seq_length())))
        rest = {name: value for name, value in vars(layer).items() if not (grows and name in ("keys", "values"))}
        kept.append((layer, {name: _cloned(value) for name, value in rest.items()}))
    return Mark(kept, lengths)


def restore(marked: Mark) -> None:
    """Put a state back as it was; may be done again."""
    for layer, values in marked.kept:
        for name, value in values.items():
            setattr(layer, name, _cloned(value))
    for layer, length in marked.lengths:
        if layer.get_seq_length() > length:
            layer.keys, layer.values = layer.keys[..., :length, :], layer.values[..., :length, :]


def state_tensors(state: Any) -> Iterator[Tensor]:
    """Every tensor of a state that has a row per sequence."""
    for layer in state.layers:
        for value in vars(layer).values():
            for tensor in value.values() if isinstance(value, dict) else [value]:
                if isinstance(tensor, Tensor) and tensor.ndim > 1:
                    yield tensor


def state_size(state: Any) -> int:
    """Bytes of a state, all rows together."""
    return sum(tensor.numel() * tensor.element_size() for tensor in state_tensors(state))


def _selected(value: Any, rows: Tensor) -> Any:
    if isinstance(value, Tensor):
        return value.index_select(0, rows.to(value.device)) if value.ndim > 1 else value
    return {key: _selected(each, rows) for key, each in value.items()} if isinstance(value, dict) else value


def _cloned(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.clone()
    return {key: _cloned(each) for key, each in value.items()} if isinstance(value, dict) else value


def _is_all(rows: Tensor, value: Any) -> bool:
    return isinstance(value, Tensor) and value.ndim > 1 and rows.tolist() == list(range(value.shape[0]))


def _relative(found: Tensor, wanted: Tensor) -> float:
    """Root mean square of a difference over that of what was wanted."""
    difference, size = found.double() - wanted.double(), wanted.double()
    return float(difference.norm() / (size - size.mean()).norm().clamp_min(1e-30))


def _head_settings(config: Any) -> tuple[float, float | None]:
    """What stands between the head and the logits: a factor, and a cap."""
    text = config.get_text_config(decoder=True)
    divisor = getattr(text, "logits_scaling", None)
    factor = getattr(text, "logit_scale", None) or getattr(text, "lm_head_multiplier", None)
    cap = getattr(text, "final_logit_softcapping", None)
    return (1 / float(divisor) if divisor else float(factor) if factor else 1.0), float(cap) if cap else None
