"""Launching where the data lies: Triton takes the current device, which need not be that of the tensors."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


def on_its_device(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """Decorator: runs `function` on the device of its first argument, a tensor or a tuple that begins with one."""

    @functools.wraps(function)
    def call(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        first = args[0] if isinstance(args[0], Tensor) else args[0][0]  # type: ignore[index]
        # Entering a device costs the host microseconds, and nearly always it is the current one.
        if not first.is_cuda or first.get_device() == torch.cuda.current_device():
            return function(*args, **kwargs)
        with torch.cuda.device(first.device):
            return function(*args, **kwargs)

    return call
