"""One measured rate, what it is compared with, and the least that any comparison is made of."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from longspan.commands.bench.ceilings import Ceilings
from longspan.commands.bench.compared import times_as_fast
from longspan.commands.bench.setting import Setting
from longspan.models.budget import decode_bytes_per_token, forward_flops_per_token, training_flops_per_token
from longspan.models.config import ModelConfig

Part = Literal["train", "prefill", "decode"]
PARTS: tuple[Part, ...] = ("train", "prefill", "decode")
TOGETHER: tuple[tuple[Part, ...], ...] = (("train",), ("prefill", "decode"))
"""What is measured in one go."""
OURS = "longspan"


@dataclass(frozen=True)
class Measured:
    """One part of one subject at one context.

    Attributes:
        pattern, context, part: what.
        who: `longspan`, or the peer.
        parameters: of that model.
        rates: tokens/s, one for each repeat (of training: for each logged window).
        ceiling: share of the measured matmul rate (train, prefill) or copy rate (decode) that the median reaches.
        memory_bytes: peak of the device's allocator (CUDA) or of the process (CPU); None where it is not known.
        state_bytes: what one sequence keeps after the context.
        failure: why there is no rate.
        late: whether only the time was short for it.
        micro_batches: into how many a batch was cut in training to fit.
    """

    pattern: str
    context: int
    part: Part
    who: str
    parameters: int
    rates: tuple[float, ...] = ()
    ceiling: float | None = None
    memory_bytes: int | None = None
    state_bytes: int | None = None
    failure: str = ""
    late: bool = False
    micro_batches: int = 1

    @property
    def rate(self) -> float | None:
        """The median."""
        return statistics.median(self.rates) if self.rates else None

    def to_json(self, ours: Sequence[float] = ()) -> dict[str, Any]:
        """Plain data.

        Args:
            ours: Longspan's rates of the same pattern, context and part, which a peer's are compared with.
        """
        ratio = None if self.who == OURS else times_as_fast(ours, self.rates)
        return {
            **asdict(self),
            "rates": [float(f"{rate:.4g}") for rate in self.rates],
            "rate": self.rate,
            "repeats": len(self.rates),
            "longspan_is": None if ratio is None else {name: round(x, 4) for name, x in asdict(ratio).items()},
        }


def share_of_ceiling(
    part: Part, rates: Sequence[float], config: ModelConfig, context: int, setting: Setting, ceilings: Ceilings
) -> float | None:
    """What a rate comes to against the device's best: FLOPs for training and prefill, bytes for decoding.

    Prefill computes the head for the last token alone. In small models weights stay in a cache, which is faster than
    the copy that was measured: then decoding may pass 1.
    """
    if not rates:
        return None
    rate = statistics.median(rates)
    if part == "decode":
        moved = decode_bytes_per_token(config, setting.vocab_size, context, setting.torch_dtype)
        return moved * rate / ceilings.copy
    if part == "train":
        return training_flops_per_token(config, setting.vocab_size, context) * rate / ceilings.matmul
    head = 2.0 * config.width * setting.vocab_size * (1 - 1 / context)
    return (forward_flops_per_token(config, setting.vocab_size, context) - head) * rate / ceilings.matmul
