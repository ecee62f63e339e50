"""Sliding-window attention: attention whose state and work stop growing once the window is full."""

from __future__ import annotations

from pydantic import Field

from longspan.models.mixers.attention import Attention, AttentionSettings
from longspan.models.mixers.base import register


class SlidingWindowAttentionSettings(AttentionSettings):
    """Settings of one sliding-window attention mixer: those of attention, and

    Attributes:
        window: tokens that each token sees in its document, itself included.
    """

    window: int = Field(128, ge=1)


@register("S")
class SlidingWindowAttention(Attention):
    """Each token sees itself and the `window - 1` tokens before it (Beltagy et al. 2020; Jiang et al. 2023).

    n layers together reach n (window - 1) tokens back. `window` means what `sliding_window` means in transformers'
    Mistral. Decoding keeps at most `window - 1` keys.
    """

    name = "sliding_window_attention"
    Settings = SlidingWindowAttentionSettings
    windowed = True

    def __init__(self, width: int, settings: SlidingWindowAttentionSettings) -> None:
        super().__init__(width, settings)
        self.window = settings.window
