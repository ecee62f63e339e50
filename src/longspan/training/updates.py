"""One optimizer step: gradients of its micro-batches, clipping, and a guard that keeps bad updates from the weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from longspan.foundation.errors import DivergenceError
from longspan.training.config import TrainingConfig
from longspan.training.distributed import Spread
from longspan.training.divergence import locate, locate_in_spread
from longspan.training.micro_steps import CudaRecorder, GraphedMicroSteps, PlainMicroSteps, why_no_graph
from longspan.training.optimizer import clip_gradients, learning_rate, make_optimizer, set_learning_rate
from longspan.training.ranks import Ranks

if TYPE_CHECKING:
    from longspan.corpus.packing import Batch
    from longspan.models.language_model import LanguageModel
    from longspan.models.segments import Isolation
    from longspan.training.feeding import Fed


class Updates:
    """The updates of one model. On CUDA nothing in one waits for the device.

    Attributes:
        optimizer: of the model's parameters.
        spread: how the model is shared by several ranks; None where one trains it.
        graph: what became of capturing, for people; empty on devices that have no graphs.
    """

    def __init__(
        self,
        model: LanguageModel,
        training: TrainingConfig,
        *,
        isolation: Isolation,
        device: torch.device,
        autocast: Callable[[], torch.autocast],
        ranks: Ranks,
    ) -> None:
        """Shares the model out where there are several ranks.

        Args:
            model: on `device`, with the weights to start from, equal on all ranks.
        """
        self._model, self._training, self._isolation = model, training, isolation
        self._device, self._autocast, self._ranks = device, autocast, ranks
        no_graph = why_no_graph(training.graph, model, device)
        self.spread = Spread(model, ranks, device, graphed=no_graph is None) if ranks.size > 1 else None
        self._parameters = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = make_optimizer(model, training, device)
        self._plain = PlainMicroSteps(model.loss if self.spread is None else self.spread.loss, autocast, device)
        self._micro: PlainMicroSteps | GraphedMicroSteps = self._plain
        self._graphed = no_graph is None
        # FSDP2 sends gradients within the passes of the last micro-batch; DDP, where they are a graph, after them.
        self._sends = ranks.size > 1 and ranks.parallel == "fsdp"
        self.graph = ""
        if device.type == "cuda":
            self.graph = f"no CUDA graph ({no_graph})" if no_graph else "a CUDA graph for each micro-batch"
        self._bad = torch.zeros((), dtype=torch.bool, device=device)
        self._first_bad = torch.full((), -1, dtype=torch.int64, device=device)
        self._unchecked: list[tuple[int, list[Batch]]] = []

    def capture(self, quiet: Callable[[], AbstractContextManager[object]], tell: Callable[[str], None]) -> None:
        """Use CUDA graphs from now on, where there can be any.

        Args:
            quiet: keeps this process's other threads from the device while a graph is captured.
            tell: hears where capturing failed.
        """
        if self._graphed:
            # A capture that fails stops FSDP2 in the middle of a pass, from where it cannot go on.
            self._micro = GraphedMicroSteps(
                self._plain,
                self._parameters,
                record=CudaRecorder(self._device),
                quiet=quiet,
                demanded=self._training.graph is True or self._sends,
                tell=tell,
            )

    def step(self, step: int, micro_batches: Sequence[Fed]) -> tuple[Tensor, Tensor]:
        """Update the weights once.

        Args:
            step: finished optimizer steps.
            micro_batches: of this step.

        Returns:
            summed NLL of this rank's rows and norm of the whole gradient before clipping, () each, on the device.

        Raises:
            DivergenceError: on a CPU, see `check`.
        """
        set_learning_rate(self.optimizer, learning_rate(self._training, step))
        nll = torch.zeros((), device=self._device)
        # What comes out of several ranks is the mean of their gradients.
        share = max(1, sum(fed.num_targets for fed in micro_batches)) / self._ranks.size
        for fed in micro_batches:
            last = fed is micro_batches[-1]
            with self._synchronising(last):
                nll += self._micro.run(fed, share, first=fed is micro_batches[0], sends=last and self._sends)
        if self.spread is not None:
            self.spread.exchange(self._parameters)
        norm = clip_gradients(self.optimizer, self._parameters, self._training.clip)
        self._guard(step, nll, norm, [fed.batch for fed in micro_batches])
        self.optimizer.step()
        self._micro.clear(self.optimizer)
        return nll, norm

    def _synchronising(self, last: bool) -> AbstractContextManager[None]:
        return nullcontext() if self.spread is None else self.spread.synchronising(last)

    def _guard(self, step: int, nll: Tensor, norm: Tensor, micro_batches: list[Batch]) -> None:
        """Keep an update that is not finite from the weights.

        The fused optimizer itself skips updates while `found_inf` is set, on the device. It is never cleared, so the
        weights stay those before the first bad step until the host looks.
        """
        self._bad |= self._ranks.any(~(torch.isfinite(nll) & torch.isfinite(norm)))
        self._first_bad += (self._first_bad < 0) * self._bad * (step + 1)
        self._unchecked.append((step, micro_batches))
        if self._device.type == "cuda":
            self.optimizer.found_inf = self._bad.float()  # type: ignore[attr-defined]
        else:
            self.check()

    def check(self) -> None:
        """Look whether a step since the last look was not finite. Waits for the device.

        Raises:
            DivergenceError: names that step and where it went wrong; the weights are those before it.
        """
        if not self._unchecked:
            return
        first = int(self._first_bad.item())
        if first < 0:
            self._unchecked.clear()
            return
        batches = next(batches for step, batches in self._unchecked if step == first)
        self.release()
        raise DivergenceError(
            f"training stopped at step {first + 1} of {self._training.num_steps}: loss or gradient is not finite, "
            f"first seen in {self._locate(batches)}\n"
            f"  learning rate {learning_rate(self._training, first):.3g}; the update was not applied\n"
            f"  fix: lower `training.peak_lr`, lengthen `training.warmup` or lower `training.clip`"
        )

    def release(self) -> None:
        """Gives back what graphs hold: memory, and NCCL's connections, which cannot be closed before."""
        if isinstance(self._micro, GraphedMicroSteps):
            self._micro.release()

    def _locate(self, batches: list[Batch]) -> str:
        isolation, device, autocast = self._isolation, self._device, self._autocast
        if self.spread is None:
            return locate(self._model, batches, isolation=isolation, device=device, autocast=autocast)
        return locate_in_spread(self.spread, batches, isolation=isolation, device=device, autocast=autocast)
