"""Notices that another rank has gone where no error of torch reaches this one: while it waits for it on the device.

Where hosts talk through gloo the connection to a process that was killed breaks, and torch says so. A process that
replays a CUDA graph in which NCCL waits for a lost one hears nothing, and waits for ever inside a call into CUDA. So
a thread of every process listens to rank 0, and one of rank 0 to each of the others, for a last word.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist

GRACE = 15.0
"""Seconds: after so long a process that still trains with a lost one is ended."""
CHECKED_EVERY = 0.1
"""Seconds."""
LISTENING = timedelta(days=400)
"""Longer than any run."""
FAREWELL = timedelta(seconds=5)
"""How long a last word may take; who does not take it has gone."""
TOGETHER, ALONE = 1.0, 2.0
"""Last words: all ranks left for the same reason; or this one failed by itself, and the others may still wait."""


class LossWatch:
    """Listens as long as a group of ranks exists; ends this process where it waits in vain, and says why.

    Args:
        rank: of this process.
        size: processes in all, which have met; all of them make their watch at the same time.
        say: the message in which this process ends.
    """

    def __init__(self, rank: int, size: int, say: Callable[[], str]) -> None:
        self._say = say
        self._group = dist.new_group(backend="gloo", timeout=LISTENING)
        self._others = list(range(1, size)) if rank == 0 else [0]
        self._left = threading.Event()
        self._waiting_since: float | None = None
        for other in self._others:
            threading.Thread(target=self._listen, args=(other,), name=f"listens to {other}", daemon=True).start()

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Around work that cannot go on without the other ranks."""
        self._waiting_since = time.monotonic()
        try:
            yield
        finally:
            self._waiting_since = None

    def leave(self, *, alone: bool) -> None:
        """Say the last word; nothing happens to this process any more.

        Args:
            alone: whether it leaves for a reason that the others do not share.
        """
        self._left.set()
        for other in self._others:
            word = torch.full((1,), ALONE if alone else TOGETHER)
            try:
                sent = dist.isend(word, other, group=self._group)
                if sent is not None:
                    sent.wait(FAREWELL)
            except RuntimeError:
                # It has gone itself.
                continue

    def _listen(self, other: int) -> None:
        word = torch.zeros(1)
        try:
            dist.recv(word, other, group=self._group)
        except RuntimeError:
            word.fill_(ALONE)
        if float(word) == TOGETHER:
            return
        lost = time.monotonic()
        while not self._left.wait(CHECKED_EVERY):
            since = self._waiting_since
            if since is not None and time.monotonic() - max(since, lost) > GRACE:
                sys.stderr.write(f"error: {self._say()}\n")
                sys.stderr.flush()
                # The main thread is inside a call that does not return.
                os._exit(1)
