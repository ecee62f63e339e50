"""How a command ends: its exit code, and what an error says in three lines."""

from __future__ import annotations

import os
import signal
import sys
import traceback

import typer

from longspan.foundation.errors import LongspanError, Stopped, UserError

KEEPING = ("run", "prepare", "train", "probe")
"""Commands that go on where they were stopped."""
INTERRUPTED = 130


def run_to_its_end(app: typer.Typer) -> None:
    """Run the command that `sys.argv` names; whatever becomes of it ends in its exit code and words for the reader."""
    try:
        # Typer turns Ctrl-C into the code that shells use for it.
        if app(standalone_mode=False) == INTERRUPTED:
            raise KeyboardInterrupt
        sys.stdout.flush()
    except (KeyboardInterrupt, typer.Abort):
        _let_exit()
        _print_error(Stopped(Stopped.GO_ON if sys.argv[1] in KEEPING else "stopped"))
        sys.exit(Stopped.exit_code)
    except typer.Exit as exit_:
        sys.exit(exit_.exit_code)
    except BrokenPipeError:
        # Whoever read the output has gone (`| head`); Python would complain about it once more at the end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except Exception as error:
        _let_exit()
        if "--debug" in sys.argv:
            traceback.print_exc()
        sys.exit(_explain(error))


def _let_exit() -> None:
    """From here on one more Ctrl-C changes nothing but the exit code and the last line, so it is passed over."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _explain(error: Exception) -> int:
    """Say what went wrong; the exit code."""
    from longspan.foundation.failures import machine_error

    told = error if isinstance(error, LongspanError) else _usage_error(error) or machine_error(error)
    if told is not None:
        _print_error(told)
        return told.exit_code
    print(
        f"error: unexpected {type(error).__name__}: {error}\n  this is a defect of Longspan, not of your input\n"
        "  fix: run again with --debug and report the traceback",
        file=sys.stderr,
    )
    return 1


def _usage_error(error: Exception) -> UserError | None:
    """Wrong use of the command line, as Typer found it."""
    if not type(error).__module__.startswith(("typer", "click")) or not hasattr(error, "format_message"):
        return None
    context = getattr(error, "ctx", None)
    path = context.command_path if context is not None else "longspan"
    usage = context.get_usage().removeprefix("Usage: ") if context is not None else "longspan COMMAND"
    allowed = " ".join(usage.split())
    if commands := getattr(context and context.command, "commands", None):
        allowed = ", ".join(commands)
    return UserError(error.format_message().rstrip("."), allowed, f"see `{path} --help`")


def _print_error(error: LongspanError) -> None:
    if isinstance(error, UserError):
        print(f"error: {error.given}\n  allowed: {error.allowed}\n  fix: {error.fix}", file=sys.stderr)
    else:
        print(f"{'' if isinstance(error, Stopped) else 'error: '}{error}", file=sys.stderr)
