"""One model over several processes: every layer on each (DDP), or a part of every layer on each (FSDP2).

DDP sends gradients between the kernels of the backward pass. Where forward and backward are one CUDA graph, which
cannot be entered, ranks exchange all gradients after it: that hides nothing, but needs nothing of the host either.
What FSDP2 gathers and sends on streams of its own is captured with the passes that it belongs to.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from longspan.models.language_model import LanguageModel
from longspan.training.ranks import Ranks

if TYPE_CHECKING:
    from torch.nn.parallel import DistributedDataParallel

Loss = Callable[..., tuple[Tensor, Tensor]]

UNIT_BYTES = 128 * 2**20
"""FSDP2 gathers neighbouring layers together until they are as large; so are gradients that are sent after a graph."""
GATHERED_BYTES = 2**30
"""Models no larger stay gathered from the forward to the end of the backward pass."""


class Objective(nn.Module):
    """A model whose losses are reached through `forward`, which is where DDP and FSDP2 hook in.

    Args:
        model: what is trained; its parameters keep their own names.
    """

    def __init__(self, model: LanguageModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, name: str, *args: Any) -> Any:
        """The model's method `name`."""
        return getattr(self.model, name)(*args)

    def loss(self, *args: Any) -> tuple[Tensor, Tensor]:
        """See `LanguageModel.loss`."""
        return self("loss", *args)  # type: ignore[no-any-return]

    def judge(self, *args: Any) -> tuple[Tensor, Tensor]:
        """See `LanguageModel.judge`."""
        return self("judge", *args)  # type: ignore[no-any-return]


class Spread:
    """A model spread over ranks: the loss to train with, and the gradients' sum over all ranks.

    Gradients come out as the mean over ranks, so a rank's loss must be weighted with the number of ranks; both DDP and
    FSDP2 communicate while the backward pass goes on, except where that is a graph.
    """

    def __init__(self, model: LanguageModel, ranks: Ranks, device: torch.device, *, graphed: bool = False) -> None:
        """Shares the model out in place; make its optimizer afterwards.

        Args:
            model: whole, equal on every rank, on `device`.
            ranks: at least two.
            device: of this rank.
            graphed: whether forward and backward are captured.
        """
        self.model, self.ranks = model, ranks
        self.objective = Objective(model)
        self._ddp: DistributedDataParallel | None = None
        if ranks.parallel == "fsdp":
            _shard(self.objective, ranks, device)
        elif not graphed:
            from torch.nn.parallel import DistributedDataParallel

            self._ddp = DistributedDataParallel(
                self.objective,
                device_ids=[device] if device.type == "cuda" else None,
                gradient_as_bucket_view=True,
            )

    def loss(self, *args: Any) -> tuple[Tensor, Tensor]:
        """See `LanguageModel.loss`; its gradients are communicated as `synchronising` says."""
        return (self._ddp or self.objective)("loss", *args)  # type: ignore[no-any-return]

    @contextmanager
    def synchronising(self, last: bool) -> Iterator[None]:
        """Around forward and backward of a micro-batch: gradients are communicated in the last one of a step only."""
        if self.ranks.parallel == "fsdp":
            self.objective.set_requires_gradient_sync(last)  # type: ignore[operator]
        if self._ddp is None or last:
            yield
        else:
            with self._ddp.no_sync():
                yield

    @torch.no_grad()
    def exchange(self, parameters: Sequence[nn.Parameter]) -> None:
        """After the last backward pass of a step: makes gradients those of all ranks, where that pass did not."""
        if self._ddp is not None or self.ranks.parallel == "fsdp":
            return
        gradients = [p.grad for p in parameters if p.grad is not None]
        for unit in units([_size(gradient) for gradient in gradients], UNIT_BYTES):
            part = gradients[unit.start : unit.stop]
            flat = torch.cat([gradient.flatten() for gradient in part])
            dist.all_reduce(flat)
            flat /= self.ranks.size
            spans = torch.split(flat, [gradient.numel() for gradient in part])
            torch._foreach_copy_(part, [span.view_as(to) for span, to in zip(spans, part, strict=True)])

    def settle(self) -> None:
        """Give whole layers back: after a forward pass without a backward one FSDP2 still holds some."""
        if self.ranks.parallel == "fsdp":
            from torch.distributed.fsdp import FSDPModule

            for module in self.objective.modules():
                if isinstance(module, FSDPModule):
                    module.reshard()

    def whole(self) -> dict[str, Tensor]:
        """name → the whole weight, on the CPU of rank 0; empty elsewhere. Weight by weight, so that each fits."""
        self.settle()
        found: dict[str, Tensor] = {}
        seen: set[int] = set()
        for name, tensor in self.model.state_dict(keep_vars=True).items():
            # A tied head is one tensor under its first name.
            if id(tensor) in seen:
                continue
            seen.add(id(tensor))
            full = whole_tensor(tensor.detach())
            if self.ranks.is_first:
                found[name] = full.to("cpu", copy=True)
        return found


def whole_tensor(tensor: Tensor) -> Tensor:
    """The whole of a tensor of which each rank holds a part; another one as it is. Every rank must ask."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def own_part(whole: Tensor, like: Tensor) -> Tensor:
    """What this rank holds of `whole`, cut and placed as `like` is; nothing is communicated."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    if not isinstance(like, DTensor) or whole.shape != like.shape:
        return whole.to(like.device).clone()
    return distribute_tensor(whole.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def units(sizes: Sequence[int], least: int) -> list[range]:
    """Neighbours, of so many bytes each, in groups of at least `least`; what is left over goes with the last group."""
    found: list[range] = []
    start = 0
    for stop in range(1, len(sizes) + 1):
        if sum(sizes[start:stop]) >= least:
            found.append(range(start, stop))
            start = stop
    if start < len(sizes):
        start = found.pop().start if found else 0
        found.append(range(start, len(sizes)))
    return found


def _shard(objective: Objective, ranks: Ranks, device: torch.device) -> None:
    """Cuts groups of blocks, and the parameters outside the blocks, over the ranks; they stay fp32, as do gradients.

    What is gathered at once costs the host the same whatever its size, so small layers go together, and a small model
    is gathered once a step and not again for the backward pass.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (ranks.size,))
    blocks: list[nn.Module] = list(objective.model.blocks)
    frugal = _bytes(objective) > GATHERED_BYTES
    for unit in units([_bytes(block) for block in blocks], UNIT_BYTES):
        fully_shard(blocks[unit.start : unit.stop], mesh=mesh, reshard_after_forward=frugal)
    fully_shard(objective, mesh=mesh)


def _bytes(module: nn.Module) -> int:
    return sum(map(_size, module.parameters()))


def _size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
