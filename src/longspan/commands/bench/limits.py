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
        # The timer of before, while ours is armed.
        self._others: tuple[float, float] | None = None

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
        self._rest()
        self._restore(*self._previous)

    @contextmanager
    def measuring(self, seconds: float | None) -> Iterator[None]:
        """Around what may be cut, after so many seconds (above 0) at the latest; None: only where somebody asks to.

        Raises:
            Cut: it was.
        """
        if seconds is not None and signal.SIGALRM in self._previous:
            self._others = signal.getitimer(signal.ITIMER_REAL)
            signal.setitimer(signal.ITIMER_REAL, seconds, AGAIN_SECONDS)
        try:
            try:
                self._measuring = True
                # Whoever asked while nothing could be cut yet.
                if self.stopped:
                    raise Cut
                yield
            finally:
                self._rest()
        finally:
            # A signal may have cut the line above short.
            self._rest()

    def _rest(self) -> None:
        """Nothing is cut any more, and the timer is that of before."""
        self._measuring = False
        if self._others is not None:
            signal.setitimer(signal.ITIMER_REAL, *self._others)
            self._others = None

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
