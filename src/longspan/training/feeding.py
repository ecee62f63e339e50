"""Batches on the device before they are needed: packed, pinned, copied and looked through for documents by a thread.

The position in the data that goes into a checkpoint is that after the last batch handed out, not after the last one
made ahead, so that resuming stays exact.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from longspan.training.batches import ResumableBatches, num_targets, to_device
from longspan.training.ranks import ALONE, Ranks

if TYPE_CHECKING:
    from longspan.corpus.packing import Batch
    from longspan.models.language_model import LanguageModel
    from longspan.models.segments import Isolation, Segments

AHEAD = 2
"""Batches that are ready before they are asked for."""


@dataclass(frozen=True, slots=True)
class Fed:
    """A batch as it came, what the model reads of this rank's rows of it, and the targets of all rows."""

    batch: Batch
    tokens: torch.Tensor
    targets: torch.Tensor
    segments: Segments
    num_targets: int


class Feed:
    """Hands out batches; on CUDA a thread stays ahead, elsewhere each is made when it is asked for."""

    def __init__(
        self,
        batches: ResumableBatches,
        model: LanguageModel,
        isolation: Isolation,
        device: torch.device,
        autocast: Callable[[], torch.autocast],
        ranks: Ranks = ALONE,
    ) -> None:
        """Nothing is made before it is asked for.

        Args:
            batches: of all ranks together.
            ranks: those that share each batch; this one's rows go to its device.
        """
        self._ranks = ranks
        self._batches, self._model, self._isolation, self._device = batches, model, isolation, device
        self._autocast = autocast
        self._state = batches.state_dict()
        self._ready: queue.Queue[tuple[Fed, dict[str, Any]] | BaseException] = queue.Queue(AHEAD)
        self._closed = threading.Event()
        self._making = threading.Lock()
        self._thread: threading.Thread | None = None
        self._threads: int | None = None

    def take(self) -> Fed:
        """The next batch.

        Raises:
            Exception: what the batches raised.
        """
        if self._device.type != "cuda":
            fed = self._make()
            self._state = self._batches.state_dict()
            return fed
        if self._thread is None:
            self._threads = torch.get_num_threads()
            self._thread = threading.Thread(target=self._stay_ahead, name="feed", daemon=True)
            self._thread.start()
        item = self._ready.get()
        if self._threads is not None:
            # Threads to come take the number that was set last, here or in the feed's thread.
            torch.set_num_threads(self._threads)
            self._threads = None
        if isinstance(item, BaseException):
            raise item
        fed, self._state = item
        return fed

    def state_dict(self) -> dict[str, Any]:
        """The position in the data after the last batch that was taken."""
        return self._state

    def quiet(self) -> AbstractContextManager[object]:
        """Inside it the feed's thread leaves the device alone; what it is making it finishes before."""
        return self._making

    def close(self) -> None:
        """Stop making batches."""
        self._closed.set()
        if self._thread is not None:
            while self._thread.is_alive():
                while not self._ready.empty():
                    self._ready.get_nowait()
                self._thread.join(timeout=0.01)
            self._thread = None

    def _make(self) -> Fed:
        batch = next(self._batches)
        tokens, targets, doc = to_device(self._ranks.part(batch), self._device)
        # A compiled layer is one for ids and one without: where layers are compiled, every batch keeps its ids.
        segments = self._model.segments(tokens, doc, isolation=self._isolation, keep_ids=self._device.type != "cpu")
        with self._autocast():
            self._model.prepare(segments, tokens)
        return Fed(batch, tokens, targets, segments, num_targets(batch))

    def _stay_ahead(self) -> None:
        try:
            if self._device.type == "cuda":
                torch.cuda.set_device(self._device)
            # Tensors of a batch are small: sharing their work out to threads on busy cores takes many times the work.
            torch.set_num_threads(1)
            while not self._closed.is_set():
                with self._making:
                    item = self._make(), self._batches.state_dict()
                self._ready.put(item)
        except BaseException as error:
            self._ready.put(error)
