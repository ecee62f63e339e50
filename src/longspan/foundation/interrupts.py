"""Ctrl-C before a command has begun: during an import it would come out as a traceback, or as another error."""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType

BEFORE_ANYTHING = 130
"""The exit code, as shells have it for a program that SIGINT ended."""
_IMPORTING = "<frozen importlib"


def hear_interrupts() -> None:
    """From now on Ctrl-C during an import ends the process with one line; elsewhere it raises `KeyboardInterrupt`.

    Where SIGINT is passed over (background jobs of a shell) or somebody else takes it, that stays so.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _interrupted)
    if hasattr(signal, "pthread_sigmask"):
        # It was held back while this program was started anew, see `hold_interrupts`.
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})


def hold_interrupts() -> None:
    """Keep Ctrl-C waiting until the program that takes the place of this one calls `hear_interrupts`."""
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})


def end_before_anything() -> None:
    """Say that nothing was begun, and end at once."""
    sys.stderr.write("stopped before anything began\n")
    sys.stderr.flush()
    os._exit(BEFORE_ANYTHING)


def _interrupted(number: int, frame: FrameType | None) -> None:
    while frame is not None:
        if frame.f_code.co_filename.startswith(_IMPORTING):
            end_before_anything()
        frame = frame.f_back
    raise KeyboardInterrupt
