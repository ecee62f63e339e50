"""What a sequence's state takes in a model of transformers, computed from its configuration and never from its name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast


@dataclass(frozen=True)
class StateShape:
    """Elements of one sequence's state.

    Attributes:
        per_token: elements of keys and values that each token adds to every layer with full attention.
        windows: (elements per token, tokens kept) of each layer with sliding-window attention.
        recurrent: elements of the recurrent states, whatever the context.
        convolution: elements of the convolutions' states, whatever the context.
        layers: what each layer that moves information between positions is: `attention`, `sliding_window`, `mamba1`,
            `mamba2`, `[attention+mamba2]`, …
    """

    per_token: int
    windows: tuple[tuple[int, int], ...]
    recurrent: int
    convolution: int
    layers: tuple[str, ...]

    @staticmethod
    def of(config: Any) -> StateShape | None:
        """The shape by a configuration of transformers; None for a kind of layer whose state is not known here."""
        from transformers import DynamicCache

        config = config.get_text_config(decoder=True)
        ssm = _RECURRENT.get(config.model_type)
        per_token = recurrent = convolution = 0
        windows, layers = [], []
        for layer in DynamicCache(config=config).layers:
            kind, kinds = type(layer).__name__, []
            if kind not in _KNOWN:
                return None
            if "SlidingWindow" in kind:
                # transformers keeps one token less than the window: the new one comes with the step.
                windows.append((_keys_and_values(config), int(cast(Any, layer).sliding_window) - 1))
                kinds.append("sliding_window")
            elif kind in _GROWING:
                per_token += _keys_and_values(config)
                kinds.append("attention")
            if "Linear" in kind:
                if ssm is None:
                    return None
                more = ssm(config)
                recurrent, convolution = recurrent + more[0], convolution + more[1]
                kinds.append("mamba1" if ssm in (_mamba, _jamba) else "mamba2")
            if kinds:
                layers.append(f"[{'+'.join(kinds)}]" if len(kinds) > 1 else kinds[0])
        return StateShape(per_token, tuple(windows), recurrent, convolution, tuple(layers))

    @property
    def letters(self) -> str:
        """The pattern, as studies write it."""
        text = "".join(self.layers)
        for name, letter in (("attention", "A"), ("sliding_window", "S"), ("mamba1", "m"), ("mamba2", "M"), ("+", "")):
            text = text.replace(name, letter)
        return text

    def bytes(self, context: int, itemsize: int) -> int:
        """Bytes after `context` tokens, `itemsize` bytes an element (recurrent states are kept in fp32)."""
        cached = self.per_token * context + sum(size * min(context, kept) for size, kept in self.windows)
        return (cached + self.convolution) * itemsize + self.recurrent * 4


_GROWING = ("DynamicLayer", "LinearAttentionAndFullAttentionLayer")
_KNOWN = (
    *_GROWING,
    "DynamicSlidingWindowLayer",
    "LinearAttentionLayer",
    "LinearAttentionAndSlidingWindowAttentionLayer",
    "DummyLayer",
)
"""Layers of a cache of transformers that are understood here."""


def _keys_and_values(config: Any) -> int:
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 2 * int(heads) * int(size)


def _mamba(config: Any) -> tuple[int, int]:
    inner = config.expand * config.hidden_size
    return inner * config.state_size, inner * config.conv_kernel


def _jamba(config: Any) -> tuple[int, int]:
    inner = config.mamba_expand * config.hidden_size
    return inner * config.mamba_d_state, inner * config.mamba_d_conv


def _mamba2(config: Any) -> tuple[int, int]:
    return _heads(config.num_heads * config.head_dim, config.state_size, config.n_groups, config.conv_kernel)


def _bamba(config: Any) -> tuple[int, int]:
    inner = config.mamba_expand * config.hidden_size
    return _heads(inner, config.mamba_d_state, config.mamba_n_groups, config.mamba_d_conv)


def _falcon(config: Any) -> tuple[int, int]:
    inner = config.mamba_d_ssm or config.mamba_expand * config.hidden_size
    return _heads(inner, config.mamba_d_state, config.mamba_n_groups, config.mamba_d_conv)


def _zamba2(config: Any) -> tuple[int, int]:
    inner = config.mamba_expand * config.hidden_size
    return _heads(inner, config.mamba_d_state, config.mamba_ngroups, config.mamba_d_conv)


def _nemotron(config: Any) -> tuple[int, int]:
    inner = config.mamba_num_heads * config.mamba_head_dim
    return _heads(inner, config.ssm_state_size, config.n_groups, config.conv_kernel)


def _heads(inner: int, state: int, groups: int, conv: int) -> tuple[int, int]:
    """Elements of the recurrent and of the convolution's state of a Mamba-2 layer."""
    return inner * state, (inner + 2 * groups * state) * conv


_RECURRENT: dict[str, Callable[[Any], tuple[int, int]]] = {
    "mamba": _mamba,
    "falcon_mamba": _mamba,
    "jamba": _jamba,
    "mamba2": _mamba2,
    "bamba": _bamba,
    "granitemoehybrid": _bamba,
    "falcon_h1": _falcon,
    "zamba2": _zamba2,
    "nemotron_h": _nemotron,
}
"""model_type → (elements of the recurrent state, elements of the convolution's state) of one layer."""
