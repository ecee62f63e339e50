"""What ends a measurement from outside: Ctrl-C, SIGTERM and the end of the time, wherever it is just then."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any, Self

AGAIN_SECONDS = 5.0
"""An exception that a destructor swallowed is raised once more after so long."""


class Cut(BaseException):
    """Ends what is being measured. No `except Exception` of a package on its way may keep it."""


class Limits:
    """While open, the first Ctrl-C or SIGTERM cuts what is being measured; a second one acts as usual.

    In threads other than the main one nothing is cut: Python gives signals to the main thread alone.

    Attributes:
        stopped: whether somebody asked to stop.
    """

    def __init__(self) -> None:
        self.stopped = False
        self._measuring = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Self:
        """Take the signals over."""
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._stop)
            self._previous[signal.SIGALRM] = signal.signal(signal.SIGALRM, self._cut)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Give the signals back."""
        self._restore(*self._previous)

    @contextmanager
    def measuring(self, seconds: float | None) -> Iterator[None]:
        """Around what may be cut, after so many seconds (above 0) at the latest; None: only where somebody asks to.

        Raises:
            Cut: it was.
        """
        others = None
        self._measuring = True
        try:
            if seconds is not None and signal.SIGALRM in self._previous:
                others = signal.setitimer(signal.ITIMER_REAL, seconds, AGAIN_SECONDS)
            yield
        finally:
            self._measuring = False
            if others is not None:
                signal.setitimer(signal.ITIMER_REAL, *others)

    def _cut(self, number: int, frame: FrameType | None) -> None:
        if self._measuring:
            raise Cut

    def _stop(self, number: int, frame: FrameType | None) -> None:
        self.stopped = True
        self._restore(signal.SIGINT, signal.SIGTERM)
        self._cut(number, frame)

    def _restore(self, *numbers: int) -> None:
        for number in numbers:
            if number in self._previous:
                signal.signal(number, self._previous.pop(number))
