"""Failures of the machine, told as such: what the system refused, and what to do."""

from __future__ import annotations

import errno

from longspan.foundation.errors import LongspanError, MachineError

_UNWRITABLE = {errno.EROFS, errno.EACCES, errno.EPERM}
_OUT_OF_MEMORY = ("can't allocate memory", "out of memory", "cannot allocate memory")
LESS_MEMORY = (
    "lower training.batch_tokens (or raise training.accumulation, which keeps the gradient), training.context or the "
    "model; then run the same command again"
)


def machine_error(error: BaseException) -> LongspanError | None:
    """An error of the operating system or of memory in the reader's words; None for any other."""
    if isinstance(error, MemoryError) or _is_out_of_memory(error):
        return out_of_memory(next(iter(str(error).splitlines()), ""))
    if not isinstance(error, OSError) or error.errno is None:
        return None
    where = str(error.filename) if error.filename is not None else "a file"
    reason = error.strerror or type(error).__name__
    if error.errno in _UNWRITABLE:
        return MachineError(
            f"{where} cannot be used: {reason}",
            "a file or folder that may be read and written",
            "change its permissions, or choose another folder with --runs",
        )
    return MachineError(
        f"{where}: {reason}",
        "files and folders that the system lets Longspan use",
        "mend that, then run the same command again: it goes on from here (--debug shows where it was)",
    )


def out_of_memory(detail: str = "") -> MachineError:
    """The error for too little memory."""
    told = f": {detail}" if detail else ""
    return MachineError(f"not enough memory{told}", "what this machine has, see `longspan doctor`", LESS_MEMORY)


def killed_process(what: str, fix: str = LESS_MEMORY) -> MachineError:
    """The error for a worker process that the system ended.

    Args:
        what: it worked on.
        fix: what takes less memory there.
    """
    return MachineError(
        f"a process ended without a word while it worked on {what}: most likely it was out of memory and killed",
        "what this machine has, see `longspan doctor`; what was finished is kept",
        fix,
    )


def _is_out_of_memory(error: BaseException) -> bool:
    # torch raises RuntimeError on CPU and a sub-class of it on CUDA.
    return isinstance(error, RuntimeError) and any(mark in str(error).lower() for mark in _OUT_OF_MEMORY)
