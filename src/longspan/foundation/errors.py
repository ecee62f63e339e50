"""Errors for the reader: what was given, what is allowed, what to do."""

from __future__ import annotations

import pickle
from typing import ClassVar


def first_line(error: BaseException) -> str:
    """What another library's error says, in one line; its kind where it says nothing."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def sendable(error: BaseException) -> BaseException:
    """The error itself where another process can read it, else what it says: an error that cannot is a lost process."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # whatever reading or writing it raises
        return LongspanError(f"{type(error).__name__}: {error}")
    return error


class LongspanError(Exception):
    """Base of every error that Longspan raises on purpose; `exit_code` is what the command line returns."""

    exit_code = 1


class UserError(LongspanError, ValueError):
    """Something the user gave cannot be honoured.

    Args:
        given: what was given, with the offending value.
        allowed: what is allowed instead.
        fix: what to do now.
    """

    exit_code = 2

    def __init__(self, given: str, allowed: str, fix: str) -> None:
        super().__init__(given, allowed, fix)
        self.given = given
        self.allowed = allowed
        self.fix = fix

    def __str__(self) -> str:
        return f"{self.given}\n  allowed: {self.allowed}\n  fix: {self.fix}"


class DataError(UserError):
    """A file or data set is damaged, truncated, empty or not what its name says."""

    exit_code = 1


class MachineError(UserError):
    """The machine refused: no memory, no right to write, a folder in use, a process that was killed."""

    exit_code = 1


class SubjectError(LongspanError):
    """What is wrong with one subject of a study and says nothing about the others, which go on."""


class DivergenceError(SubjectError):
    """Training met a loss or gradient that is not finite; the message names the step and the layer."""


class Stopped(LongspanError):
    """The user asked to stop; everything written so far is kept."""

    exit_code = 3
    GO_ON: ClassVar = "stopped; run the same command again to go on from here"
    """What a command that keeps its work says."""
