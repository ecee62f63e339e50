"""Kernels in the interpreter touch elements of their arguments and nothing else, or the launch fails.

On a GPU a wrong mask reads a neighbour's memory in silence, or ends the process. Here every argument is moved into a
buffer of its own between bands of NaN, and every address that a kernel uses is looked up: it must be an element of an
argument, where that is a view also not one that lies between its rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

BAND = 4096


class OutOfBounds(Exception):
    """A kernel's address is no element of any argument."""


class Place:
    """Where the storage of some arguments lies while a kernel runs: `elements` marks the bytes of the arguments."""

    def __init__(self, argument: Tensor) -> None:
        self.home = torch.empty(0, dtype=torch.uint8).set_(argument.untyped_storage())
        self.buffer = torch.full((self.home.numel() + 2 * BAND,), 255, dtype=torch.uint8)
        self.inner = self.buffer[BAND : BAND + self.home.numel()]
        self.inner.copy_(self.home)
        self.start = self.inner.data_ptr()
        self.elements = np.zeros(self.home.numel(), dtype=bool)

    def moved(self, argument: Tensor) -> Tensor:
        """The argument with the same layout in the buffer."""
        size = argument.element_size()
        elements = self.elements.reshape(-1)[: len(self.elements) // size * size].reshape(-1, size)
        at = np.lib.stride_tricks.as_strided(
            np.arange(len(elements))[argument.storage_offset() :],
            argument.shape,
            [stride * 8 for stride in argument.stride()],
        )
        elements[at.reshape(-1)] = True
        there = BAND // size + argument.storage_offset()
        moved = torch.empty(0, dtype=argument.dtype)
        return moved.set_(self.buffer.untyped_storage(), there, argument.shape, argument.stride())


class Places:
    """The arguments of the launch that is under way."""

    def __init__(self) -> None:
        self.by_storage: dict[int, Place] = {}

    def place(self, argument: Any) -> Any:
        """Tensors move, all else stays."""
        if not isinstance(argument, Tensor) or argument.numel() == 0:
            return argument
        key = argument.untyped_storage().data_ptr()
        if key not in self.by_storage:
            self.by_storage[key] = Place(argument.detach())
        return self.by_storage[key].moved(argument.detach())

    def bring_back(self) -> None:
        """What the kernel wrote goes home."""
        for place in self.by_storage.values():
            place.home.copy_(place.inner)

    def check(self, pointers: np.ndarray, mask: np.ndarray | None, what: str) -> None:
        """Every address in use is an element, all of one argument."""
        used = pointers.reshape(-1) if mask is None else np.broadcast_to(pointers, mask.shape)[mask.astype(bool)]
        if not used.size:
            return
        lowest, highest = int(used.min()), int(used.max())
        for place in self.by_storage.values():
            if place.start - BAND <= lowest and highest < place.start + len(place.elements) + BAND:
                inside = place.start <= lowest and highest < place.start + len(place.elements)
                if inside and place.elements[(used - np.uint64(place.start)).astype(np.int64)].all():
                    return
        raise OutOfBounds(f"a kernel {what} at {lowest:#x} to {highest:#x}, which is not all inside one argument")


@contextmanager
def checked() -> Iterator[None]:
    """Checks all launches in the interpreter."""
    from triton.runtime import interpreter

    executor, builder = interpreter.GridExecutor, interpreter.InterpreterBuilder
    kept = executor._init_args_hst, executor._restore_args_dev, builder.create_masked_load, builder.create_masked_store
    places = Places()

    def init(self: Any, args: Any, kwargs: dict[str, Any]) -> tuple[list[Any], dict[str, Any]]:
        places.by_storage.clear()
        return [places.place(a) for a in args], {k: places.place(v) for k, v in kwargs.items()}

    def restore(self: Any, *_: Any) -> None:
        places.bring_back()

    def load(self: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        places.check(pointers.data, mask.data, "reads")
        return kept[2](self, pointers, mask, *rest)

    def store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        places.check(pointers.data, mask.data, "writes")
        return kept[3](self, pointers, value, mask, *rest)

    executor._init_args_hst, executor._restore_args_dev = init, restore
    builder.create_masked_load, builder.create_masked_store = load, store
    try:
        yield
    finally:
        executor._init_args_hst, executor._restore_args_dev = kept[:2]
        builder.create_masked_load, builder.create_masked_store = kept[2:]
