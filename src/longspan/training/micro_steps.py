"""Forward and backward of a micro-batch: call by call, or captured once as a CUDA graph that is replayed.

A graph starts all kernels of a micro-batch with one call of the host. It reads and writes memory that stays where it
is: the first batch it was captured with becomes the place that every later batch is copied to, and gradients lie where
the captured backward pass put them. Kernels and random numbers are those of the plain calls, and so are the results.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from longspan.foundation.errors import MachineError, UserError, first_line

if TYPE_CHECKING:
    from longspan.models.language_model import LanguageModel
    from longspan.training.distributed import Loss
    from longspan.training.feeding import Fed

PLAIN_STEPS = 2
"""Optimizer steps of a process before capturing: in these everything is compiled, loaded and tuned."""

Work = Callable[[], Tensor]
Recorder = Callable[[Work], tuple[Callable[[], object], Tensor]]


def why_no_graph(choice: Literal["auto"] | bool, model: LanguageModel, device: torch.device) -> str | None:
    """What keeps the steps from being captured here, in words; None where they are.

    Raises:
        UserError: a graph is demanded where there can be none.
    """
    if choice is False:
        return "training.graph = false"
    waiting = sorted({block.letter for block in model.blocks if not block.mixer.capturable(device)})
    reason = None
    if device.type != "cuda":
        reason = f"{device.type} has none"
    elif model.handover is not None:
        reason = "the state is handed over inside a row"
    elif waiting:
        reason = f"{', '.join(waiting)} may wait for values on the device"
    if choice is True and reason is not None:
        raise UserError(f"training.graph = true, but {reason}", "a CUDA graph", "set `training.graph` to auto or false")
    return reason


class PlainMicroSteps:
    """Each pass is made of calls into torch; on CUDA none of them waits for the device."""

    def __init__(self, loss: Loss, autocast: Callable[[], torch.autocast], device: torch.device) -> None:
        """Args are those of the run; `loss` is called under `autocast`."""
        self._loss, self._autocast = loss, autocast
        self._share = torch.ones((), device=device)

    def run(self, fed: Fed, share: float, *, first: bool, sends: bool = False) -> Tensor:
        """Adds the gradients of a micro-batch to `Parameter.grad`.

        Args:
            fed: the batch.
            share: what the summed NLL is divided by.
            first: of its step.
            sends: the passes themselves send gradients to other ranks, which other micro-batches of the step do not.

        Returns:
            summed NLL, () fp32; the next call may overwrite it.
        """
        self.set_share(share)
        return self.passes(fed)

    def passes(self, fed: Fed) -> Tensor:
        """Forward and backward alone, with the share that was set last."""
        with self._autocast():
            nll_sum, _ = self._loss(fed.tokens, fed.targets, fed.segments)
        # In autograd's own thread for the device the host of an H200 took a third longer (docs/LOG.md). A captured pass
        # is made once, so nothing is to be gained there.
        with torch.autograd.set_multithreading_enabled(_is_capturing(nll_sum)):
            (nll_sum / self._share).backward()  # type: ignore[no-untyped-call]
        return nll_sum.detach()

    def set_share(self, share: float) -> None:
        """For calls of `passes`."""
        self._share.fill_(share)

    def clear(self, optimizer: torch.optim.Optimizer) -> None:
        """After an update: the next step starts without gradients."""
        optimizer.zero_grad(set_to_none=True)


class GraphedMicroSteps:
    """Micro-batches of one shape as replays of graphs, after a few plain steps.

    Two graphs at most: the first micro-batch of a step writes gradients, the others add to them. Where the last one
    also sends them, that is a graph of its own.
    """

    def __init__(
        self,
        plain: PlainMicroSteps,
        parameters: Sequence[nn.Parameter],
        *,
        record: Recorder,
        quiet: Callable[[], AbstractContextManager[object]],
        demanded: bool = False,
        tell: Callable[[str], None] = lambda text: None,
    ) -> None:
        """Nothing is captured yet.

        Args:
            plain: the passes.
            parameters: those that get gradients.
            record: captures work on fixed memory; gives back its replay, and where its outcome lies.
            quiet: around capturing, keeps other threads of this process from the device.
            demanded: where capturing fails the run ends; else it is told, and steps go on without a graph.
            tell: hears what became of capturing.
        """
        self._plain, self._parameters = plain, parameters
        self._record, self._quiet, self._demanded, self._tell = record, quiet, demanded, tell
        self._steps = 0
        self._failed = False
        self._place: Fed | None = None
        self._graphs: dict[tuple[bool, bool], tuple[Callable[[], object], Tensor]] = {}

    def run(self, fed: Fed, share: float, *, first: bool, sends: bool = False) -> Tensor:
        """See `PlainMicroSteps.run`.

        Raises:
            MachineError: capturing failed, and a graph was demanded.
        """
        self._steps += first
        if self._failed or self._steps <= PLAIN_STEPS:
            return self._plain.run(fed, share, first=first)
        if (first, sends) not in self._graphs and not self._capture(fed, first, sends):
            return self._plain.run(fed, share, first=first)
        self._load(fed)
        self._plain.set_share(share)
        replay, nll_sum = self._graphs[first, sends]
        replay()
        return nll_sum

    def _capture(self, fed: Fed, first: bool, sends: bool) -> bool:
        if self._place is None:
            self._place = fed
        place = self._place
        try:
            with self._quiet():
                self._graphs[first, sends] = self._record(lambda: self._plain.passes(place))
        except RuntimeError as error:
            reason = f"capturing it failed ({type(error).__name__}: {first_line(error)[:200]})"
            if self._demanded:
                raise MachineError(
                    f"no CUDA graph of a training step: {reason}",
                    "steps that this device can capture",
                    "set `training.graph` to false: slower where the host is busy, the same otherwise",
                ) from error
            if first:
                self._forget_gradients()
            self._graphs.clear()
            self._place = None
            self._failed = True
            self._tell(f"no CUDA graph: {reason}")
            return False
        return True

    def _load(self, fed: Fed) -> None:
        assert self._place is not None
        for to, value in zip(_tensors(self._place), _tensors(fed), strict=True):
            if to is not value:
                to.copy_(value, non_blocking=True)

    def clear(self, optimizer: torch.optim.Optimizer) -> None:
        """After an update: a captured first micro-batch overwrites the gradients where they are."""
        if not self._graphs:
            self._plain.clear(optimizer)

    def release(self) -> None:
        """Gives the memory of the graphs back, gradients included; later steps capture anew."""
        self._graphs.clear()
        self._place = None
        self._forget_gradients()

    def _forget_gradients(self) -> None:
        for parameter in self._parameters:
            parameter.grad = None


class CudaRecorder:
    """Captures work as CUDA graphs that share one pool of memory, so they must be replayed one after the other."""

    def __init__(self, device: torch.device) -> None:
        """Takes a stream; memory comes with the first graph."""
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, work: Work) -> tuple[Callable[[], object], Tensor]:
        """Does not run `work`: the replay does."""
        graph = torch.cuda.CUDAGraph()
        # What threads of libraries ask of the device meanwhile, as NCCL's does, is no fault of the capture.
        capture = torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local")
        with torch.cuda.device(self._device), capture:
            outcome = work()
        return graph.replay, outcome


def _is_capturing(tensor: Tensor) -> bool:
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()


def _tensors(fed: Fed) -> list[Tensor]:
    return [fed.tokens, fed.targets, *fed.segments.tensors()]
