"""What engines have in common that run a model in this process: requests are checked, and go through as one call."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from longspan.engines.base import Engine, Generation, Sampling, Tokens
from longspan.engines.batching import check_length, check_requests
from longspan.engines.copy_rate import copy_rate
from longspan.engines.generation import forget_peak, peak_bytes


class InProcessEngine(Engine):
    """A model on a device of this machine.

    Attributes:
        device: where it runs.
    """

    device: torch.device

    @torch.inference_mode()
    def score_many(
        self, prefixes: Sequence[Tokens], continuations: Sequence[Sequence[Tokens]]
    ) -> list[list[NDArray[np.float64]]]:
        """See `Engine.score_many`. What prefixes share is computed once, where a state can be kept."""
        self._check_requests(prefixes, continuations)
        return self._ask([], Sampling(), None, prefixes, continuations)[1]

    @torch.inference_mode()
    def generate_and_score(
        self,
        prompts: Sequence[Tokens],
        sampling: Sampling,
        prefixes: Sequence[Tokens],
        continuations: Sequence[Sequence[Tokens]],
    ) -> tuple[list[Generation], list[list[NDArray[np.float64]]]]:
        """See `Engine.generate_and_score`."""
        for i, prompt in enumerate(prompts):
            self._check_length(len(prompt), f"prompt {i}")
        self._check_requests(prefixes, continuations)
        return self._ask(prompts, sampling, None, prefixes, continuations)

    @torch.inference_mode()
    def generate(
        self, prompts: Sequence[Tokens], sampling: Sampling, given: Sequence[Tokens] | None = None
    ) -> list[Generation]:
        """See `Engine.generate`. Several prompts go through together where that gives what each gives alone."""
        for i, prompt in enumerate(prompts):
            self._check_length(len(prompt), f"prompt {i}")
        return self._ask(prompts, sampling, given, [], [])[0]

    @abstractmethod
    def _ask(
        self,
        prompts: Sequence[Tokens],
        sampling: Sampling,
        given: Sequence[Tokens] | None,
        prefixes: Sequence[Tokens],
        continuations: Sequence[Sequence[Tokens]],
    ) -> tuple[list[Generation], list[list[NDArray[np.float64]]]]:
        """What is written after prompts, and the likelihoods after prefixes; what they share goes through once."""

    def forget_peak(self) -> None:
        """See `Engine.forget_peak`."""
        forget_peak(self.device)

    def peak_bytes(self) -> int | None:
        """See `Engine.peak_bytes`."""
        return peak_bytes(self.device)

    def copy_rate(self) -> float:
        """See `Engine.copy_rate`."""
        return copy_rate(self.device)

    def _check_requests(self, prefixes: Sequence[Tokens], continuations: Sequence[Sequence[Tokens]]) -> None:
        check_requests(prefixes, continuations)
        for i, (prefix, choices) in enumerate(zip(prefixes, continuations, strict=True)):
            self._check_length(len(prefix) + max(map(len, choices)) - 1, f"request {i}")

    def _check_length(self, num_inputs: int, what: str) -> None:
        check_length(num_inputs, self.context_limit, what, self.name)
