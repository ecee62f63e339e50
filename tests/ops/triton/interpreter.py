"""What Triton's interpreter needs to run here, and to run in a fraction of the time."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any


def mend() -> None:
    """For the whole process; what kernels compute stays the same."""
    from triton.runtime import interpreter

    interpreter._patch_lang_tensor = _counted_by_numpy(interpreter._patch_lang_tensor)
    interpreter._patch_lang = _OncePerLaunch(interpreter)
    interpreter._get_np_dtype = _looked_up_once(interpreter._get_np_dtype)


def _counted_by_numpy(patch: Callable[..., None]) -> Callable[..., None]:
    """Triton 3.6 and 3.7 count loops with an array of one element, which NumPy 2.4 no longer takes for a number."""

    def patched(tensor: type, *scope: object) -> None:
        patch(tensor, *scope)
        tensor.__index__ = lambda self: int(self.handle.data.item())

    return patched


def _looked_up_once(dtype_in_numpy: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """It builds a table of all dtypes for every one it looks up. Pointers have no hash, nor have blocks."""
    known = functools.cache(dtype_in_numpy)

    def looked_up(dtype: Any) -> Any:
        return dtype_in_numpy(dtype) if dtype.scalar.is_ptr() else known(dtype.scalar)

    return looked_up


class _OncePerLaunch:
    """Replaces the language's functions when a launch begins, not at every call of one kernel function by another.

    A function brings the parts of the language that it names; those that the launch has met already are replaced.
    """

    def __init__(self, interpreter: Any) -> None:
        self.patch = interpreter._patch_lang
        self.parts = (interpreter.tl, interpreter.tl.core)
        self.met: set[tuple[int, ...]] = set()
        launch = interpreter.GridExecutor.__call__

        @functools.wraps(launch)
        def begin(executor: Any, *args: Any, **kwargs: Any) -> Any:
            self.met.clear()
            return launch(executor, *args, **kwargs)

        interpreter.GridExecutor.__call__ = begin

    def __call__(self, function: Callable[..., object]) -> object:
        """The scope that undoes the patch, or nothing where nothing is to be done: only a launch asks for it."""
        named = {id(value) for value in function.__globals__.values()}
        parts = tuple(id(part) for part in self.parts if id(part) in named)
        if parts in self.met:
            return None
        self.met.add(parts)
        return self.patch(function)
