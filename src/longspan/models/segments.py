"""Who may see whom in a batch: built once per batch from `doc_id`, read by every layer.

Legend: B rows, T tokens of this call, S cached and new keys.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Literal, Self, get_args

import torch
from torch import Tensor

from longspan.foundation.errors import UserError
from longspan.ops.flex_attention import block_mask_tensors, flex_block_mask
from longspan.ops.rotary import RopeScaling, Rotation

Isolation = Literal["full", "attention", "state", "none"]
LONGEST_CONVOLUTION = 16


@dataclass(frozen=True)
class Past:
    """What a later call must know about the tokens already seen; every tensor lives on the CPU.

    Attributes:
        length: tokens seen per row.
        num_keys: keys that attention caches still hold per row (fewer than `length` once closed documents are dropped).
        last_doc: int32, the document of the last token; None while no document ids were ever given.
        open_length: int64, tokens seen of that document; None means `length` in every row.
        key_doc: int32, the documents of the cached keys; None means that all belong to the open document.
        isolation: that of the calls so far; None while it made no difference.
    """

    length: int = 0
    num_keys: int = 0
    last_doc: Tensor | None = None
    open_length: Tensor | None = None
    key_doc: Tensor | None = None
    isolation: Isolation | None = None

    def select(self, index: Tensor) -> Past:
        """The past of the rows `index`."""
        last, opened, keys = (None if t is None else t[index] for t in (self.last_doc, self.open_length, self.key_doc))
        return Past(self.length, self.num_keys, last, opened, keys, self.isolation)


@dataclass(frozen=True)
class Step:
    """One more token of each row on states of fixed size, which the layers overwrite; all of it is on the device.

    Attributes:
        newest: int64 (1,), the token's place among the keys.
        first: int32 (B,), the place at which the open document of each row begins.
    """

    newest: Tensor
    first: Tensor


@dataclass(frozen=True)
class Segments:
    """What attention and recurrent mixers need to keep documents apart.

    Attributes:
        num_tokens: T.
        num_keys: keys cached before this call, so the first query of this call has key index `num_keys`.
        positions: int64, (B, T) or (1, T): the position of each token in its document where attention is isolated,
            else in its row.
        attention_doc, key_doc: int32 documents of queries and of all keys; None: attention may see everything
            before it.
        state_doc: int32 documents for recurrent mixers; None: the state flows on through the whole call.
        previous_doc: int32 document of the token before this call, where `state_doc` is given and there is one.
        past: what the next call needs; keys before the last `past.num_keys` can never be seen again.
        max_position: largest of `positions` (an upper bound of it where ids were not read).
        step: of a call on states of fixed size, see `Mixer.fixed_state`; None in every other.
    """

    num_tokens: int
    num_keys: int
    positions: Tensor
    attention_doc: Tensor | None
    key_doc: Tensor | None
    state_doc: Tensor | None
    previous_doc: Tensor | None
    past: Past
    max_position: int
    step: Step | None = None
    _host_doc: Tensor | None = field(default=None, repr=False, compare=False)
    _rotations: dict[tuple[int, float, torch.dtype, RopeScaling | None], Rotation] = field(
        default_factory=dict, repr=False, compare=False
    )
    _block_masks: dict[int | None, Any] = field(default_factory=dict, repr=False, compare=False)

    def rotation(self, head_dim: int, base: float, dtype: torch.dtype, scaling: RopeScaling | None = None) -> Rotation:
        """Of `positions`; the layers that ask for the same share it."""
        key = (head_dim, base, dtype, scaling)
        if key not in self._rotations:
            self._rotations[key] = Rotation.build(self.positions, head_dim, base, dtype, scaling)
        return self._rotations[key]

    def block_mask(self, window: int | None) -> Any:
        """For FlexAttention, of `attention_doc`; the layers with the same window share it."""
        assert self.attention_doc is not None
        if window not in self._block_masks:
            doc_BT = self.attention_doc if self._host_doc is None else self._host_doc
            self._block_masks[window] = flex_block_mask(doc_BT, window=window, device=self.attention_doc.device)
        return self._block_masks[window]

    def tensors(self) -> list[Tensor]:
        """All that layers read on the device, what `rotation` and `block_mask` made so far included.

        The order is the same for batches of one shape that were prepared alike, so that one can be copied over another.
        """
        ids = (self.attention_doc, self.key_doc, self.state_doc, self.previous_doc)
        found = [self.positions, *(each for each in ids if each is not None)]
        for rotation in self._rotations.values():
            found += rotation
        for mask in self._block_masks.values():
            found += block_mask_tensors(mask)
        distinct = {id(tensor): tensor for tensor in found}
        return list(distinct.values())

    def split(self, at: int) -> tuple[Segments, Segments]:
        """Of the first `at` tokens of this call and of those after them, for two calls in place of one."""

        def halves(ids_BT: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
            return (None, None) if ids_BT is None else (ids_BT[:, :at], ids_BT[:, at:])

        attention, state = halves(self.attention_doc), halves(self.state_doc)
        between = self.num_keys + at
        return (
            replace(
                self,
                num_tokens=at,
                positions=self.positions[:, :at],
                attention_doc=attention[0],
                key_doc=None if self.key_doc is None else self.key_doc[:, :between],
                state_doc=state[0],
                # The second call drops what the one call would have dropped.
                past=Past(self.past.length - self.num_tokens + at, between),
                _host_doc=None,
                _rotations={},
                _block_masks={},
            ),
            replace(
                self,
                num_tokens=self.num_tokens - at,
                num_keys=between,
                positions=self.positions[:, at:],
                attention_doc=attention[1],
                state_doc=state[1],
                previous_doc=None if self.state_doc is None else self.state_doc[:, at - 1],
                _host_doc=None,
                _rotations={},
                _block_masks={},
            ),
        )

    @classmethod
    def one_step(cls, positions_B1: Tensor, step: Step) -> Self:
        """For one more token of each row, at the positions (B, 1) or (1, 1), on states of fixed size."""
        return cls(1, 0, positions_B1, None, None, None, None, Past(), 0, step)

    @classmethod
    def build(
        cls,
        doc_id_BT: Tensor | None,
        isolation: Isolation = "full",
        *,
        shape: tuple[int, int] | None = None,
        device: torch.device | str | None = None,
        past: Past | None = None,
        keep_ids: bool = False,
    ) -> Self:
        """Derive everything from the document ids.

        Args:
            doc_id_BT: integer (B, T), equal values in a row = same document, each document one run. Keep it on the CPU
                when the model is elsewhere: then rows of one document are found without waiting for the device. None:
                the document that is open goes on.
            isolation: what is kept apart.
            shape: (B, T), needed only without `doc_id_BT`.
            device: where the layers run; default that of `doc_id_BT`.
            past: of the calls before this one; None at the start.
            keep_ids: give mixers the ids also where every row is one document, so that all batches look alike.

        Raises:
            UserError: on an unknown isolation, or one that differs from the calls before.
        """
        if isolation not in get_args(Isolation):
            raise UserError(f"isolation = {isolation!r}", ", ".join(get_args(Isolation)), "choose one of these")
        started = past is not None
        past = past or Past()
        if doc_id_BT is None:
            assert shape is not None, "without document ids the shape is needed"
            if past.last_doc is None:
                return cls._one_document(shape, device, past)
            doc_id_BT = past.last_doc[:, None].expand(shape)
        if past.isolation not in (None, isolation):
            raise UserError(
                f"isolation = {isolation!r} after calls with {past.isolation!r}",
                "one isolation for all calls that share a state",
                f"use {past.isolation!r}, or start from a new state",
            )
        device = torch.device(device or doc_id_BT.device)
        doc_BT = doc_id_BT.to(torch.int32)
        if doc_BT.device.type != "cpu":
            if not started:
                return cls._unseen(doc_BT, isolation)
            doc_BT = doc_BT.cpu()
        return cls._known(doc_BT, isolation, device, past, keep_ids)

    @classmethod
    def _one_document(cls, shape: tuple[int, int], device: torch.device | str | None, past: Past) -> Self:
        num_tokens = shape[1]
        positions = torch.arange(past.length, past.length + num_tokens, device=device)[None]
        after = Past(past.length + num_tokens, past.num_keys + num_tokens)
        return cls(num_tokens, past.num_keys, positions, None, None, None, None, after, after.length - 1)

    @classmethod
    def _unseen(cls, doc_BT: Tensor, isolation: Isolation) -> Self:
        """Training with ids on an accelerator: nothing may depend on their values, or the host would wait."""
        num_tokens = doc_BT.shape[1]
        attention_doc = doc_BT if isolation in ("full", "attention") else None
        state_doc = doc_BT if isolation in ("full", "state") else None
        positions = torch.arange(num_tokens, device=doc_BT.device)[None]
        if attention_doc is not None:
            positions = _position_in_run(doc_BT)
        past = Past(num_tokens, num_tokens)
        return cls(num_tokens, 0, positions, attention_doc, attention_doc, state_doc, None, past, num_tokens - 1)

    @classmethod
    def _known(cls, doc_BT: Tensor, isolation: Isolation, device: torch.device, past: Past, keep_ids: bool) -> Self:
        rows, num_tokens = doc_BT.shape
        previous_B = past.last_doc if past.last_doc is not None else doc_BT[:, 0]
        open_B = past.open_length if past.open_length is not None else torch.full((rows,), past.length)
        in_document_BT = _position_in_run(doc_BT)
        goes_on_BT = (in_document_BT == torch.arange(num_tokens)) & (doc_BT[:, :1] == previous_B[:, None])
        in_document_BT = in_document_BT + goes_on_BT * open_B[:, None]
        after_open_B = in_document_BT[:, -1] + 1

        attention_doc = key_doc = after_key_doc = state_doc = previous = None
        positions_BT = torch.arange(past.length, past.length + num_tokens)[None]
        num_keys = after_num_keys = past.num_keys + num_tokens
        if isolation in ("full", "attention"):
            positions_BT = in_document_BT
            cached = past.key_doc if past.key_doc is not None else previous_B[:, None].expand(rows, past.num_keys)
            key_doc_BS = torch.cat([cached, doc_BT], dim=1) if past.num_keys else doc_BT
            if keep_ids or not _one_document_per_row(key_doc_BS):
                attention_doc, key_doc = doc_BT, key_doc_BS
                after_num_keys = int(after_open_B.max())
                kept_BS = key_doc_BS[:, num_keys - after_num_keys :]
                after_key_doc = None if _one_document_per_row(kept_BS) else kept_BS
        if isolation in ("full", "state"):
            reach_B = open_B.clamp(max=min(LONGEST_CONVOLUTION, past.length))
            unbroken = bool((reach_B == min(LONGEST_CONVOLUTION, past.length)).all())
            if keep_ids or not (unbroken and bool(goes_on_BT.all())):
                state_doc, previous = doc_BT, previous_B if past.length else None

        after = Past(
            past.length + num_tokens,
            after_num_keys,
            doc_BT[:, -1].clone(),
            after_open_B,
            after_key_doc,
            isolation,
        )
        moved = _Moved(device)
        return cls(
            num_tokens=num_tokens,
            num_keys=past.num_keys,
            positions=moved(positions_BT),
            attention_doc=None if attention_doc is None else moved(attention_doc),
            key_doc=None if key_doc is None else moved(key_doc),
            state_doc=None if state_doc is None else moved(state_doc),
            previous_doc=None if previous is None else moved(previous),
            past=after,
            max_position=int(positions_BT.max()),
            _host_doc=attention_doc,
        )


def _position_in_run(doc_BT: Tensor) -> Tensor:
    """int64 (B, T): how many tokens of the same run of equal ids stand before each token in this call."""
    index = torch.arange(doc_BT.shape[1], device=doc_BT.device).expand(doc_BT.shape)
    starts = torch.ones_like(doc_BT, dtype=torch.bool)
    starts[:, 1:] = doc_BT[:, 1:] != doc_BT[:, :-1]
    return index - torch.where(starts, index, 0).cummax(dim=1).values


def _one_document_per_row(doc_BS: Tensor) -> bool:
    return bool((doc_BS == doc_BS[:, :1]).all())


class _Moved:
    """Copies to a device, each tensor once, from pinned memory: from other memory a device copies only when idle."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._done = device, list[tuple[Tensor, Tensor]]()

    def __call__(self, tensor: Tensor) -> Tensor:
        for before, after in self._done:
            if before is tensor:
                return after
        pinned = tensor
        if self._device.type == "cuda" and tensor.device.type == "cpu":
            # An expanded tensor has fewer elements than places, which cannot be pinned.
            pinned = tensor.contiguous().pin_memory()
        self._done.append((tensor, pinned.to(self._device, non_blocking=True)))
        return self._done[-1][1]
