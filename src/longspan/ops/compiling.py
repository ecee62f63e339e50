"""Keeping `torch.compile` out of functions that are fast as they stand."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


def never_compiled(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """Decorator: a compiled model calls `function` as it is, and all that it calls.

    `torch.compiler.disable` does the same, but importing the compiler costs seconds at every start; here it is asked
    only where a compiler is loaded already. A compiler would unroll every tile of a scan.
    """
    eager: list[Callable[Arguments, Result]] = []

    @functools.wraps(function)
    def call(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        if "torch._dynamo" not in sys.modules:
            return function(*args, **kwargs)
        if not eager:
            eager.append(torch.compiler.disable(function))  # type: ignore[no-untyped-call]
        return eager[0](*args, **kwargs)

    # Without this mark the compiler would trace `call` itself.
    call._torchdynamo_disable = True  # type: ignore[attr-defined]
    return call
