"""One layer: norm, mixer, residual, and where the model has one norm, MLP, residual.

Legend: B rows, T tokens, D model width, F hidden width of the MLP.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longspan.models.config import ModelConfig
from longspan.models.mixers.base import MixerState, init_linear
from longspan.models.norms import LayerNorm, RMSNorm, Stream
from longspan.models.segments import Segments
from longspan.ops import kernels
from longspan.ops.add_norm import add_norm
from longspan.ops.swiglu import swiglu


class MLP(nn.Module):
    """SwiGLU, `output(silu(gate) * up)` with `input_linear` = [gate; up], or exact GELU between two matrices."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        bias = config.mlp == "gelu" if config.mlp_bias is None else config.mlp_bias
        self.gated = config.mlp == "swiglu"
        rows = config.hidden * (2 if self.gated else 1)
        self.input_linear = nn.Linear(config.width, rows, bias=bias)
        self.output_linear = nn.Linear(config.hidden, config.width, bias=bias)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """Same shape."""
        hidden = self.input_linear(x_BTD)
        if self.gated:
            return self.output_linear(swiglu(hidden))  # type: ignore[no-any-return]
        return self.output_linear(F.gelu(hidden))  # type: ignore[no-any-return]

    def init_weights(self, generator: torch.Generator) -> None:
        """Kaiming-uniform, zero biases."""
        init_linear(self.input_linear, generator)
        init_linear(self.output_linear, generator)

    def flops(self) -> float:
        """Forward FLOPs per token."""
        return 2.0 * (self.input_linear.weight.numel() + self.output_linear.weight.numel())


def build_norm(config: ModelConfig) -> RMSNorm | LayerNorm:
    """The norm that the configuration names."""
    if config.norm == "rmsnorm":
        return RMSNorm(config.width, config.norm_eps)
    return LayerNorm(config.width, eps=config.norm_eps)


class Block(nn.Module):
    """A pre-norm layer with the mixer that a letter, or a group such as `[AM]`, stands for."""

    def __init__(self, config: ModelConfig, letter: str) -> None:
        super().__init__()
        mixer, settings = config.mixer(letter)
        self.letter = letter
        self.dropout = config.dropout
        self.mixer_norm = build_norm(config)
        self.mixer = mixer(config.width, settings)
        self.mlp_norm = build_norm(config) if config.mlp != "none" else None
        self.mlp = MLP(config) if config.mlp != "none" else None
        self.compiled: str | None = None

    def forward(self, x_BTD: Tensor, segments: Segments, state: MixerState | None) -> tuple[Tensor, MixerState | None]:
        """Same contract as `Mixer.forward`, on the residual stream."""
        if self.compiled is not None and state is None and torch.is_grad_enabled():
            return self._train_compiled(x_BTD, segments, self.compiled), None
        mixed, state = self.mixer(self.mixer_norm(x_BTD), segments, state)
        return self._finish(x_BTD, mixed), state

    def _normed(self, x_BTD: Tensor) -> Tensor:
        """What the mixer reads."""
        normed_BTD: Tensor = self.mixer_norm(x_BTD)
        return normed_BTD

    def _finish(self, x_BTD: Tensor, mixed_BTD: Tensor) -> Tensor:
        """The residual stream after what the mixer gave."""
        x_BTD = x_BTD + self._dropped(mixed_BTD)
        if self.mlp is not None and self.mlp_norm is not None:
            x_BTD = x_BTD + self._dropped(self.mlp(self.mlp_norm(x_BTD)))
        return x_BTD

    def _layer(self, x_BTD: Tensor, segments: Segments) -> Tensor:
        """All of it, for a compiler; what many layers share is in `segments` already."""
        return self._finish(x_BTD, self.mixer(self.mixer_norm(x_BTD), segments, None)[0])

    def _train_compiled(self, x_BTD: Tensor, segments: Segments, backend: str) -> Tensor:
        """`forward` in training; around a mixer that no compiler can follow, what stands before and after it."""
        self.mixer.prepare(segments, x_BTD)
        if self.mixer.traceable(x_BTD.device):
            whole: Callable[..., Tensor] = _compiled(Block._layer, backend)
            return whole(self, x_BTD, segments)
        mixed_BTD, _ = self.mixer(_compiled(Block._normed, backend)(self, x_BTD), segments, None)
        rest: Callable[..., Tensor] = _compiled(Block._finish, backend)
        return rest(self, x_BTD, mixed_BTD)

    def chains(self, device: torch.device) -> bool:
        """Whether `train_chained`, or without gradients `read_chained`, can take this layer: on kernels, with nothing
        between sum and norm."""
        # FSDP gives a layer another class; such a layer has its parameters only while it runs itself.
        if type(self) is not Block or not isinstance(self.mixer_norm, RMSNorm) or not kernels.wanted(device):
            return False
        if torch.is_grad_enabled():
            return self.compiled is not None and not self.dropout
        return not (self.training and self.dropout) and not torch.is_autocast_enabled(device.type)

    def read_chained(
        self,
        x_BTD: Tensor,
        normed_BTD: Tensor,
        segments: Segments,
        state: MixerState | None,
        following: RMSNorm,
    ) -> tuple[Tensor, Tensor, MixerState | None]:
        """`forward` without gradients, from the normed stream to the stream, its norm for the layer that follows, and
        the state: for one token two kernels less to start."""
        mixed_BTD, state = self.mixer(normed_BTD, segments, state)
        if self.mlp is not None and isinstance(self.mlp_norm, RMSNorm):
            x_BTD, normed_BTD = add_norm(x_BTD, mixed_BTD, self.mlp_norm.weight, self.mlp_norm.eps)
            mixed_BTD = self.mlp(normed_BTD)
        return *add_norm(x_BTD, mixed_BTD, following.weight, following.eps), state

    def train_chained(
        self, stream: Stream, normed_BTD: Tensor, segments: Segments, following: RMSNorm
    ) -> tuple[Stream, Tensor]:
        """`forward` in training from the normed stream to the stream and its norm for the layer that follows.

        A sum and the norm that reads it are one pass over memory that way, and so are their gradients.
        """
        assert self.compiled is not None
        self.mixer.prepare(segments, normed_BTD)
        if self.mixer.traceable(normed_BTD.device):
            whole: Callable[..., tuple[Stream, Tensor]] = _compiled(Block._chained, self.compiled)
            return whole(self, stream, normed_BTD, segments, following)
        mixed_BTD, _ = self.mixer(normed_BTD, segments, None)
        rest: Callable[..., tuple[Stream, Tensor]] = _compiled(Block._finish_chained, self.compiled)
        return rest(self, stream, mixed_BTD, following)

    def _chained(
        self, stream: Stream, normed_BTD: Tensor, segments: Segments, following: RMSNorm
    ) -> tuple[Stream, Tensor]:
        return self._finish_chained(stream, self.mixer(normed_BTD, segments, None)[0], following)

    def _finish_chained(self, stream: Stream, mixed_BTD: Tensor, following: RMSNorm) -> tuple[Stream, Tensor]:
        if self.mlp is None:
            return following.of_sum(stream, mixed_BTD)
        assert isinstance(self.mlp_norm, RMSNorm)
        stream, normed_BTD = self.mlp_norm.of_sum(stream, mixed_BTD)
        return following.of_sum(stream, self.mlp(normed_BTD))

    def _dropped(self, branch_BTD: Tensor) -> Tensor:
        # Without dropout even the call costs as much as a norm when one token is decoded.
        return F.dropout(branch_BTD, self.dropout) if self.training and self.dropout else branch_BTD

    @torch.no_grad()
    def init_weights(
        self, mixer_generator: torch.Generator, mlp_generator: torch.Generator, num_residuals: int
    ) -> None:
        """The mixer's own, then 1/sqrt(residuals) on what writes into the residual stream."""
        scale = num_residuals**-0.5
        self.mixer_norm.init_weights()
        self.mixer.init_weights(mixer_generator)
        for name in self.mixer.residual_outputs:
            self.mixer.get_parameter(name).mul_(scale)
        if self.mlp is not None and self.mlp_norm is not None:
            self.mlp_norm.init_weights()
            self.mlp.init_weights(mlp_generator)
            self.mlp.output_linear.weight.mul_(scale)


@cache
def _compiled(function: Callable[..., Any], backend: str) -> Any:
    """One compilation for all layers of one kind: a compiler looks at the function's code, not at the layer."""
    return torch.compile(function, fullgraph=True, dynamic=False, backend=backend)
