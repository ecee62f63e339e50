"""How a command ends: its exit code, and what an error says in three lines."""

from __future__ import annotations

import os
import signal
import sys
import traceback

import typer

from longspan.commands.wrong_use import refuse_empty_values, usage_error
from longspan.foundation.errors import LongspanError, MachineError, Stopped, UserError

KEEPING = ("run", "prepare", "train", "probe")
"""Commands that go on where they were stopped."""
INTERRUPTED = 130


def run_to_its_end(app: typer.Typer) -> None:
    """Run the command that `sys.argv` names; whatever becomes of it ends in its exit code and words for the reader."""
    try:
        refuse_empty_values(sys.argv[1:])
        # Typer turns Ctrl-C into the code that shells use for it.
        if app(standalone_mode=False, prog_name="longspan") == INTERRUPTED:
            raise KeyboardInterrupt
        sys.stdout.flush()
    except (KeyboardInterrupt, typer.Abort):
        _let_exit()
        _print_error(Stopped(Stopped.GO_ON if sys.argv[1] in KEEPING else "stopped"))
        sys.exit(Stopped.exit_code)
    except typer.Exit as exit_:
        sys.exit(exit_.exit_code)
    except BrokenPipeError:
        # Whoever read the output has gone (`| head`).
        _drop_output()
        sys.exit(1)
    except Exception as error:
        _let_exit()
        if "--debug" in sys.argv:
            traceback.print_exc()
        sys.exit(_explain(_lost_output(error) or error, app))


def _let_exit() -> None:
    """From here on one more Ctrl-C changes nothing but the exit code and the last line, so it is passed over."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _lost_output(error: Exception) -> MachineError | None:
    """What to say where it was standard output that could not be written; None where it was something else."""
    # Errors of files that are written by name have that name.
    if not isinstance(error, OSError) or error.filename is not None:
        return None
    try:
        sys.stdout.flush()
        os.write(sys.stdout.fileno(), b"\n")
    except (OSError, ValueError):
        _drop_output()
        return MachineError(
            f"standard output cannot be written: {error.strerror}",
            "a terminal, a pipe, or a file on a disk with room",
            "free some space, or send the output elsewhere; what was written to other files is kept",
        )
    return None


def _drop_output() -> None:
    """Let what is still to be written go nowhere: Python would complain about it once more at the end."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
            os.write(stream.fileno(), b"")
        except (OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _explain(error: Exception, app: typer.Typer) -> int:
    """Say what went wrong; the exit code."""
    from longspan.foundation.failures import machine_error

    told = error if isinstance(error, LongspanError) else usage_error(error, app) or machine_error(error)
    if told is not None:
        _print_error(told)
        return told.exit_code
    print(
        f"error: unexpected {type(error).__name__}: {error}\n  this is a defect of Longspan, not of your input\n"
        "  fix: run again with --debug and report the traceback",
        file=sys.stderr,
    )
    return 1


def _print_error(error: LongspanError) -> None:
    if isinstance(error, UserError):
        print(f"error: {error.given}\n  allowed: {error.allowed}\n  fix: {error.fix}", file=sys.stderr)
    else:
        print(f"{'' if isinstance(error, Stopped) else 'error: '}{error}", file=sys.stderr)
