"""The processes that train one model together, and how they agree; one alone agrees with itself at no cost."""

from __future__ import annotations

import dataclasses
import datetime
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit

import torch
import torch.distributed as dist

from longspan.foundation.errors import LongspanError, MachineError, Stopped, SubjectError, UserError, sendable
from longspan.training.config import Parallel
from longspan.training.lost_ranks import LossWatch

if TYPE_CHECKING:
    from longspan.corpus.packing import Batch

Value = TypeVar("Value")
PATIENCE = datetime.timedelta(days=7)
"""How long a rank waits for another one that is alive: preparing a corpus may take hours. A dead one is noticed."""
LOST = ("gloo", "connection closed by peer", "connection reset", "broken pipe", "socket")
"""What torch's messages say when the other end of a connection has gone."""


class LostRank(MachineError):
    """Another process of the run has ended; what ended it is told where that happened."""


@dataclass(frozen=True)
class Ranks:
    """This process as one of `size`; every method but `part` must be called by all of them, in the same order.

    Attributes:
        rank: 0 to size - 1; rank 0 writes files and shows progress.
        size: processes in all; with 1 nothing is communicated.
        parallel: `ddp` (every rank holds the whole model) or `fsdp` (every rank holds a part of each layer).
        watch: of ranks that have met, notices the loss of one where torch does not.
    """

    rank: int = 0
    size: int = 1
    parallel: Parallel = "ddp"
    watch: LossWatch | None = dataclasses.field(default=None, compare=False)

    @property
    def is_first(self) -> bool:
        """Whether this rank writes and shows."""
        return self.rank == 0

    def part(self, batch: Batch) -> Batch:
        """This rank's rows of a batch: the first of `size` equal parts for rank 0, and so on."""
        if self.size == 1:
            return batch
        rows = len(batch.tokens) // self.size
        mine = slice(self.rank * rows, (self.rank + 1) * rows)
        return dataclasses.replace(
            batch, tokens=batch.tokens[mine], targets=batch.targets[mine], doc_id=batch.doc_id[mine]
        )

    def any(self, flag: torch.Tensor) -> torch.Tensor:
        """bool (): whether `flag` is set on any rank; nothing waits for the device."""
        if self.size == 1:
            return flag
        count = flag.to(torch.int32)
        dist.all_reduce(count)
        return count > 0

    def agreed(self, flag: bool) -> bool:
        """Whether any rank says so; waits for the other hosts, not for their devices."""
        return flag if self.size == 1 else bool(self.any(torch.tensor(flag)))

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """Elementwise over all ranks; the argument stays as it is."""
        if self.size == 1:
            return tensor
        total = tensor.clone()
        dist.all_reduce(total)
        return total

    def largest(self, number: int) -> int:
        """The largest of all ranks' numbers."""
        if self.size == 1:
            return number
        found = torch.tensor(number)
        dist.all_reduce(found, op=dist.ReduceOp.MAX)
        return int(found)

    def gathered(self, value: Value) -> list[Value]:
        """The values of all ranks, by rank."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def on_first(self, work: Callable[[], Value]) -> Value:
        """Do `work` on rank 0 alone; its value, or its error, is everybody's."""
        if self.size == 1:
            return work()
        outcome: list[Any] = [None, None]
        if self.is_first:
            try:
                outcome = [work(), None]
            except Exception as error:
                outcome = [None, sendable(error)]
        dist.broadcast_object_list(outcome)
        value, failure = outcome
        if failure is not None:
            raise failure
        return value  # type: ignore[no-any-return]

    def check_equal(self, value: str, what: str) -> None:
        """Refuse ranks that were started for different things.

        Raises:
            UserError: `value` is not the same everywhere.
        """
        if self.size > 1 and len(set(self.gathered(value))) > 1:
            raise UserError(
                f"{self.size} processes with different {what}",
                "the same study, settings and Longspan version in every process",
                "start all of them with the same command",
            )

    @contextmanager
    def noticing_loss(self) -> Iterator[None]:
        """Say in words that another rank has gone, where torch speaks of sockets, or waits for it on the device: then
        the process ends after `lost_ranks.GRACE`.

        Raises:
            LostRank: in place of torch's error.
        """
        try:
            with nullcontext() if self.watch is None else self.watch.waiting():
                yield
        except LongspanError:
            raise
        except RuntimeError as error:
            lost = isinstance(error, dist.DistError) or any(mark in str(error).lower() for mark in LOST)
            if self.size == 1 or not lost:
                raise
            raise lost_rank(self.rank, self.size) from error


ALONE = Ranks()


def _note(text: str) -> None:
    sys.stderr.write(f"note: {text}\n")


def lost_rank(rank: int, size: int) -> LostRank:
    """What rank `rank` of `size` says when another one has gone."""
    return LostRank(
        f"process {rank} of {size} lost the others: one of them was killed or failed",
        "all processes until the end",
        "see what that one said (most likely it was out of memory); then run the same command again: it goes on from "
        "the last checkpoint, also with another number of processes",
    )


@contextmanager
def joined(
    rank: int, size: int, device: torch.device, parallel: Parallel = "ddp", *, meeting: str = "env://"
) -> Iterator[Ranks]:
    """Meet the other processes: gloo between hosts and for CPU training, NCCL between GPUs.

    Args:
        rank, size: of this process.
        device: its own.
        parallel: how the model is shared.
        meeting: where they meet: `file://PATH`, `tcp://HOST:PORT`, or `env://` under torchrun.
    """
    backend = "gloo"
    if device.type == "cuda":
        torch.cuda.set_device(device)
        backend = "cpu:gloo,cuda:nccl"
    dist.init_process_group(backend, init_method=meeting, rank=rank, world_size=size, timeout=PATIENCE)
    host = os.environ.get("MASTER_ADDR", "localhost") if meeting == "env://" else urlsplit(meeting).hostname
    watch = LossWatch(rank, size, host or "localhost", lambda: str(lost_rank(rank, size)), _note)
    alone = True
    try:
        yield Ranks(rank, size, parallel, watch)
        alone = False
    except (Stopped, SubjectError):
        # All ranks agree on these.
        alone = False
        raise
    finally:
        watch.leave(alone=alone)
    # After an error the others may be gone or waiting; the process ends soon and the sockets with it.
    dist.destroy_process_group()
