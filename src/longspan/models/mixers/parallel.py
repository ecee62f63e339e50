"""Mixers side by side in one layer, e.g. `[AM]`: each reads the same inputs, and a learned average is the output.

Legend: B rows, T tokens, D model width.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar, Literal, Self

import torch
from pydantic import Field, SerializeAsAny
from torch import Tensor, nn

from longspan.foundation.config import Config
from longspan.models.mixers.base import Mixer, MixerState
from longspan.models.norms import RMSNorm
from longspan.models.segments import Segments


class ParallelSettings(Config):
    """Settings of one layer of mixers side by side.

    Attributes:
        branches: the settings of each mixer, in the order of the letters.
        norm_eps: of the norm after each branch.
    """

    branches: tuple[SerializeAsAny[Config], ...]
    norm_eps: float = Field(1e-5, gt=0)


@dataclass(frozen=True)
class ParallelState(MixerState):
    """The state of every branch."""

    branches: tuple[MixerState, ...]

    def map(self, function: Callable[[Tensor], Tensor]) -> Self:
        """The same state with `function` applied to every tensor of every branch."""
        return type(self)(tuple(branch.map(function) for branch in self.branches))

    def undocumented(self, last_doc_B: Tensor) -> Self:
        """Every branch without what is of other documents."""
        return type(self)(tuple(branch.undocumented(last_doc_B) for branch in self.branches))

    def handed_over(self, rounded: Callable[[Tensor], Tensor]) -> Self:
        """Every branch as it hands over."""
        return type(self)(tuple(branch.handed_over(rounded) for branch in self.branches))

    def bytes(self) -> int:
        """Bytes of the live entries of all branches."""
        return sum(branch.bytes() for branch in self.branches)


class Parallel(Mixer):
    """`sum_i RMSNorm_i(mixer_i(x))`; the weight of each norm, a vector over D, is the learned scale of its branch.

    The weights start at 1/n for n branches, so that the layer starts as the plain average of the normalised branches.
    They are what writes into the residual stream: the model divides them by the square root of the number of residuals
    like other output weights, which a norm after them would undo.

    Source: Hymba (Dong et al. 2024, section 2.1: the mean of the normalised outputs of both kinds of head, rescaled by
    learnable vectors). Here the norm follows each mixer's own output projection, so that any mixer can be a branch;
    Falcon-H1 (Zuo et al. 2025) adds its branches at the same place, with fixed scales and without norms.

    Made by `side_by_side`, which fills the class attributes.
    """

    Settings = ParallelSettings
    mixers: ClassVar[tuple[type[Mixer], ...]]

    @classmethod
    def _branches(cls, settings: Config) -> list[tuple[type[Mixer], Config]]:
        assert isinstance(settings, ParallelSettings)
        return list(zip(cls.mixers, settings.branches, strict=True))

    @classmethod
    def check(cls, width: int, settings: Config) -> None:
        """Refuse what any branch refuses."""
        for mixer, branch in cls._branches(settings):
            mixer.check(width, branch)

    @classmethod
    def width_step(cls, settings: Config) -> int:
        """Widths that suit every branch."""
        return math.lcm(*(mixer.width_step(branch) for mixer, branch in cls._branches(settings)))

    def __init__(self, width: int, settings: ParallelSettings) -> None:
        super().__init__()
        # A mixer's constructor takes its own settings class, which only the registry ties to it.
        built: list[Any] = list(self._branches(settings))
        self.branches = nn.ModuleList(mixer(width, branch) for mixer, branch in built)
        self.norms = nn.ModuleList(RMSNorm(width, settings.norm_eps) for _ in built)

    @property
    def _parts(self) -> list[Mixer]:
        return [branch for branch in self.branches if isinstance(branch, Mixer)]

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator) -> None:
        """Each branch its own, one after the other; every scale 1/n."""
        for branch in self._parts:
            branch.init_weights(generator)
        for name in self.residual_outputs:
            self.get_parameter(name).fill_(1.0 / len(self.branches))

    def traceable(self, device: torch.device) -> bool:
        """Where all branches are."""
        return all(branch.traceable(device) for branch in self._parts)

    def capturable(self, device: torch.device) -> bool:
        """Where all branches are."""
        return all(branch.capturable(device) for branch in self._parts)

    def prepare(self, segments: Segments, x_BTD: Tensor) -> None:
        """For every branch."""
        for branch in self._parts:
            branch.prepare(segments, x_BTD)

    def initial_state(self) -> ParallelState:
        """Nothing seen by any branch."""
        return ParallelState(tuple(branch.initial_state() for branch in self._parts))

    def forward(self, x_BTD: Tensor, segments: Segments, state: MixerState | None) -> tuple[Tensor, MixerState | None]:
        """See `Mixer.forward`."""
        assert state is None or isinstance(state, ParallelState)
        mixed_BTD: Tensor | None = None
        after: list[MixerState] = []
        for i, (branch, norm) in enumerate(zip(self.branches, self.norms, strict=True)):
            y_BTD, branch_state = branch(x_BTD, segments, None if state is None else state.branches[i])
            y_BTD = norm(y_BTD)
            mixed_BTD = y_BTD if mixed_BTD is None else mixed_BTD + y_BTD
            after.append(branch_state)
        assert mixed_BTD is not None
        return mixed_BTD, None if state is None else ParallelState(tuple(after))

    def fixed_state(self, state: MixerState, slots: int) -> ParallelState:
        """See `Mixer.fixed_state`; of every branch."""
        assert isinstance(state, ParallelState)
        return ParallelState(
            tuple(mixer.fixed_state(each, slots) for mixer, each in zip(self._parts, state.branches, strict=True))
        )

    def start_in(self, fixed: MixerState) -> ParallelState:
        """See `Mixer.start_in`; of every branch."""
        assert isinstance(fixed, ParallelState)
        return ParallelState(
            tuple(mixer.start_in(each) for mixer, each in zip(self._parts, fixed.branches, strict=True))
        )

    def fix(self, state: MixerState, fixed: MixerState, num_keys: int) -> None:
        """See `Mixer.fix`; of every branch."""
        assert isinstance(state, ParallelState)
        assert isinstance(fixed, ParallelState)
        for mixer, each, held in zip(self._parts, state.branches, fixed.branches, strict=True):
            mixer.fix(each, held, num_keys)

    def unfix(self, fixed: MixerState, num_keys: int) -> ParallelState:
        """See `Mixer.unfix`; of every branch."""
        assert isinstance(fixed, ParallelState)
        return ParallelState(
            tuple(mixer.unfix(each, num_keys) for mixer, each in zip(self._parts, fixed.branches, strict=True))
        )

    def fixed_bytes(self, fixed: MixerState, num_keys: int) -> int:
        """See `Mixer.fixed_bytes`; of all branches."""
        assert isinstance(fixed, ParallelState)
        pairs = zip(self._parts, fixed.branches, strict=True)
        return sum(mixer.fixed_bytes(each, num_keys) for mixer, each in pairs)

    def flops(self, context: int) -> float:
        """Of all branches; norms are not counted."""
        return sum(branch.flops(context) for branch in self._parts)

    def state_bytes(self, context: int, element_bytes: int) -> int:
        """Of all branches."""
        return sum(branch.state_bytes(context, element_bytes) for branch in self._parts)

    def decode_bytes(self, context: int, element_bytes: int) -> int:
        """Of all branches."""
        return sum(branch.decode_bytes(context, element_bytes) for branch in self._parts)


@cache
def side_by_side(branches: tuple[type[Mixer], ...]) -> type[Mixer]:
    """The mixer class of one layer that holds these mixers; named e.g. `[attention+mamba2]` in every artefact."""
    kinds = {mixer.isolated_as for mixer in branches}
    isolation: Literal["attention", "state", "both"] = kinds.pop() if len(kinds) == 1 else "both"

    class SideBySide(Parallel):
        name = f"[{'+'.join(mixer.name for mixer in branches)}]"
        mixers = branches
        no_decay = frozenset(f"branches.{i}.{each}" for i, mixer in enumerate(branches) for each in mixer.no_decay)
        fp32 = frozenset(f"branches.{i}.{each}" for i, mixer in enumerate(branches) for each in mixer.fp32)
        isolated_as = isolation
        carried = sum(mixer.carried for mixer in branches)
        residual_outputs = tuple(f"norms.{i}.weight" for i in range(len(branches)))

    return SideBySide
