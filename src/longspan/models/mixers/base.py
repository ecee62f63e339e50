"""The contract of a mixer and the registry of letters: what one file must give to be a layer of any pattern.

Legend: B rows, T tokens, D model width.
"""

from __future__ import annotations

import dataclasses
import math
import string
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import ClassVar, Literal, Self, TypeVar

import torch
from torch import Tensor, nn

from longspan.foundation.config import Config
from longspan.foundation.errors import UserError
from longspan.foundation.registry import Registry
from longspan.models.segments import Segments


@dataclass(frozen=True)
class MixerState:
    """What a mixer remembers of the tokens before a call; every tensor has the rows first.

    A subclass adds tensor fields (None: nothing seen yet). A state may be used again: calls never write into it.
    """

    def map(self, function: Callable[[Tensor], Tensor]) -> Self:
        """The same state with `function` applied to every tensor."""
        tensors = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        changed = {name: function(t) for name, t in tensors.items() if isinstance(t, Tensor)}
        return dataclasses.replace(self, **changed)

    def undocumented(self, last_doc_B: Tensor) -> Self:
        """The same state for going on with the documents `last_doc_B` alone: what is of others is as if unseen."""
        return self

    def handed_over(self, rounded: Callable[[Tensor], Tensor]) -> Self:
        """The same state with every number that it carries rounded; what it does not hand over begins anew."""
        return self.map(rounded)

    def bytes(self) -> int:
        """Bytes of the live entries over all rows, bookkeeping included."""
        tensors = (getattr(self, f.name) for f in dataclasses.fields(self))
        return sum(t.numel() * t.element_size() for t in tensors if isinstance(t, Tensor))


class Mixer(nn.Module, ABC):
    """The part of a layer that moves information between positions.

    Training, prefill, chunked prefill and decode are the same call. What a mixer cannot honour it refuses in `check`.

    Class attributes:
        name: the true mixer name that every artefact shows, e.g. `mamba2`.
        Settings: its frozen configuration; a field takes the model's setting of the same name as default.
        no_decay: parameters without weight decay, beside those with one dimension (biases, norms), which never have it.
        fp32: parameters that stay in fp32 whatever the compute dtype.
        isolated_as: which isolation reaches it: `attention` or `state` (see `Segments`); `both` where a layer holds
            mixers of either kind.
        carried: tensors of its state that are handed over (see `MixerState.handed_over`): 0 where it is nothing but the
            window of a convolution.
        matrices: parameters beside the weights of linear layers that every token is multiplied with.
        residual_outputs: weights that write into the residual stream; the model scales them by 1/sqrt(residuals).
        keeps_init: the model's `init: normal` leaves the linear layers as `init_weights` made them.
    """

    name: ClassVar[str]
    Settings: ClassVar[type[Config]] = Config
    no_decay: ClassVar[frozenset[str]] = frozenset()
    fp32: ClassVar[frozenset[str]] = frozenset()
    isolated_as: ClassVar[Literal["attention", "state", "both"]] = "state"
    carried: ClassVar[int] = 1
    matrices: ClassVar[frozenset[str]] = frozenset()
    residual_outputs: tuple[str, ...] = ("out_proj.weight",)
    keeps_init: bool = False

    @classmethod
    def check(cls, width: int, settings: Config) -> None:
        """Refuse with a `UserError` what cannot be built at this width."""

    @classmethod
    def width_step(cls, settings: Config) -> int:
        """The model widths it can be built at are the multiples of this."""
        return 1

    @abstractmethod
    def forward(self, x_BTD: Tensor, segments: Segments, state: MixerState | None) -> tuple[Tensor, MixerState | None]:
        """Mix T >= 1 positions.

        Args:
            x_BTD: normalised inputs.
            segments: who may see whom.
            state: of the tokens before; None in training, and then None is returned.
        """

    def traceable(self, device: torch.device) -> bool:
        """Whether a compiler can follow `forward` in training on this device: no loop over tokens, nothing that waits
        for values. Around a mixer that is not, the rest of its layer is compiled."""
        return True

    def capturable(self, device: torch.device) -> bool:
        """Whether a CUDA graph can hold `forward` and its backward in training: nothing waits for values on the device,
        and which calls are made depends on shapes alone. Where a compiler can follow, that is so."""
        return self.traceable(device)

    def prepare(self, segments: Segments, x_BTD: Tensor) -> None:
        """Make now what many layers share and keep in `segments`, before a compiled `forward` reads it there.

        Args:
            segments: of the batch.
            x_BTD: the residual stream, for device and dtype.
        """

    @abstractmethod
    def init_weights(self, generator: torch.Generator) -> None:
        """Fill every parameter (and buffer), drawing from `generator` only."""

    @abstractmethod
    def initial_state(self) -> MixerState:
        """The state before the first token."""

    @abstractmethod
    def flops(self, context: int) -> float:
        """Forward FLOPs per token, 2 per multiply-add, averaged over the positions of a causal `context`."""

    @abstractmethod
    def state_bytes(self, context: int, element_bytes: int) -> int:
        """Bytes of the state of one row after `context` tokens, for activations of `element_bytes`."""

    def fixed_state(self, state: MixerState, slots: int) -> MixerState:
        """Memory of fixed size for steps with `Segments.step`, which overwrite it: of a CUDA graph.

        Args:
            state: after one token at least, for rows, shapes and dtypes; what is in it need not be kept.
            slots: tokens that it must have room for.
        """
        # Kernels walk through it from end to end, whatever order the state's own tensors lie in.
        return state.map(lambda tensor: tensor.clone(memory_format=torch.contiguous_format))

    def start_in(self, fixed: MixerState) -> MixerState:
        """The state before the first token, whose calls fill `fixed` where that saves a copy."""
        return self.initial_state()

    def fix(self, state: MixerState, fixed: MixerState, num_keys: int) -> None:
        """Brings `state` into `fixed`; `num_keys`: keys that attention has seen, those dropped by a window too."""
        for held, given in zip(state_tensors(fixed), state_tensors(state), strict=True):
            held.copy_(given)

    def unfix(self, fixed: MixerState, num_keys: int) -> MixerState:
        """A copy of `fixed` after `num_keys` tokens, as a state for any other call."""
        return fixed.map(torch.clone)

    def fixed_bytes(self, fixed: MixerState, num_keys: int) -> int:
        """Bytes of what `fixed` holds after `num_keys` tokens, all rows together."""
        return fixed.bytes()

    def decode_bytes(self, context: int, element_bytes: int) -> int:
        """Bytes of the state of one row that are read and written to decode the token after `context` tokens.

        All of it is read; then a cache (`isolated_as` is `attention`) gains the entry of one token, and any other
        state is written anew.
        """
        held = self.state_bytes(context, element_bytes)
        return held + (self.state_bytes(1, element_bytes) if self.isolated_as == "attention" else held)


def state_tensors(state: MixerState) -> list[Tensor]:
    """Every tensor of a state."""
    return visited(state.map)


def visited(visit: Callable[[Callable[[Tensor], Tensor]], object]) -> list[Tensor]:
    """The tensors that `MixerState.map` or `MixerState.handed_over` calls its function with, in order."""
    found: list[Tensor] = []

    def add(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    visit(add)
    return found


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """For sums over time that autocast would round at every step."""
    # Entering the context costs as much as a small matmul, so only where there is something to switch off.
    active = torch.is_autocast_enabled(device.type)
    return torch.autocast(device.type, enabled=False) if active else nullcontext()


def computed_dtype(x: Tensor) -> torch.dtype:
    """What a matrix product of `x` gives: the dtype of autocast where it is on."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


_MIXERS: Registry[Mixer] = Registry("mixer", names=string.ascii_uppercase + string.ascii_lowercase)
registered = _MIXERS.all
MixerType = TypeVar("MixerType", bound=type[Mixer])


def register(letter: str) -> Callable[[MixerType], MixerType]:
    """Class decorator: patterns may use `letter` for this mixer.

    Raises:
        UserError: the letter is not one ASCII letter, or another mixer has it.
    """
    if not (len(letter) == 1 and letter.isascii() and letter.isalpha()):
        raise UserError(f"mixer letter {letter!r}", "one ASCII letter, upper or lower case", "choose another letter")
    return _MIXERS.register(letter)


@torch.no_grad()
def init_linear(linear: nn.Linear, generator: torch.Generator) -> None:
    """U(+-1/sqrt(fan_in)) weights (kaiming-uniform with a = sqrt 5, as Mamba-2 and `nn.Linear`), zero bias."""
    bound = 1.0 / math.sqrt(linear.in_features)
    linear.weight.uniform_(-bound, bound, generator=generator)
    if linear.bias is not None:
        linear.bias.zero_()
