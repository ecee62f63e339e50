"""The mixers, one file each; importing this package registers the ones Longspan ships."""

from __future__ import annotations

from longspan.models.mixers import attention, gated_conv, gated_deltanet, mamba1, mamba2, recurrent, sliding_window
from longspan.models.mixers.base import Mixer, MixerState, register, registered

__all__ = [
    "Mixer",
    "MixerState",
    "attention",
    "gated_conv",
    "gated_deltanet",
    "mamba1",
    "mamba2",
    "recurrent",
    "register",
    "registered",
    "sliding_window",
]
