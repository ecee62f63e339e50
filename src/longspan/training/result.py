"""What a training run leaves behind for the report; free of torch."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from longspan.foundation.errors import DataError
from longspan.foundation.files import read_json, write_json


@dataclass(frozen=True, slots=True)
class Validation:
    """One evaluation on the whole validation split.

    Attributes:
        step: optimizer steps done before it.
        tokens: positions trained on before it.
        loss: sum of NLL / number of scored tokens, nats.
        perplexity: exp(loss).
        bits_per_byte: sum of NLL / (ln 2 × UTF-8 bytes of the scored tokens).
        num_targets: scored tokens.
        num_bytes: UTF-8 bytes of the scored tokens.
        seconds: wall time it took.
        samples: strings of a task trained on before it; 0 for text.
        string_accuracy: share of the strings of a task whose whole answer is the likeliest, token by token with the
            right ones before it; None for text.
        token_accuracy: share of the answers' tokens that are the likeliest; None for text.
        num_strings: strings that were scored; 0 for text.
    """

    step: int
    tokens: int
    loss: float
    perplexity: float
    bits_per_byte: float
    num_targets: int
    num_bytes: int
    seconds: float
    samples: int = 0
    string_accuracy: float | None = None
    token_accuracy: float | None = None
    num_strings: int = 0


@dataclass(frozen=True, slots=True)
class TrainingResult:
    """The end of a training run.

    Attributes:
        steps: optimizer steps done.
        tokens: trained positions, steps × batch_tokens, padding included.
        targets: those of them that carried loss.
        final: validation of the last weights.
        best: validation of the best weights (lowest loss on the whole validation split).
        stopped_early: whether `patience` or `mastery` ended the run.
        tokens_per_second: median over the logged windows, None where the run was shorter than its warm-up.
        tokens_per_second_overall: trained positions / wall time between device synchronisations, over the whole run;
            warm-up steps, evaluation and checkpoints are left out of both.
        peak_memory_bytes: see `peak_memory_of`.
        peak_memory_of: `torch allocator` (CUDA) or `process RSS` (CPU).
        seconds: wall time of everything, over all sessions of the run.
        sessions: how many processes it took.
        dtype: what the matrix products ran in; parameters are fp32.
        device: the hardware's name.
        samples: strings of a task trained on; 0 for text.
        mastered: the validation that reached `mastery` and ended the run; None where none did.
    """

    steps: int
    tokens: int
    targets: int
    final: Validation
    best: Validation
    stopped_early: bool
    tokens_per_second: float | None
    tokens_per_second_overall: float | None
    peak_memory_bytes: int
    peak_memory_of: str
    seconds: float
    sessions: int
    dtype: str
    device: str
    samples: int = 0
    mastered: Validation | None = None

    def to_json(self) -> dict[str, Any]:
        """The result as plain JSON values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Self:
        """The inverse of `to_json`."""
        validations = {name: Validation(**data[name]) for name in ("final", "best", "mastered") if data.get(name)}
        return cls(**{**data, **validations})

    def write(self, path: Path) -> None:
        """Write it as JSON, whole or not at all."""
        write_json(path, self.to_json())

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read what `write` wrote.

        Raises:
            DataError: the file is not such a result.
        """
        try:
            return cls.from_json(read_json(path))
        except (TypeError, KeyError) as error:
            raise DataError(
                f"{path} is not a training result ({error})",
                "the file as this version of Longspan writes it",
                f"remove {path} and run the same command again",
            ) from None
