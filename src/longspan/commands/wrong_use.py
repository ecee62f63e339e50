"""Wrong use of the command line, told in three lines: the value as it was written, what is allowed, what to do."""

from __future__ import annotations

import math
import sys
import types
import typing
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import typer
from typer.models import OptionInfo

from longspan.foundation.errors import UserError

KINDS = {int: "a whole number", float: "a number"}
MAY_BE_EMPTY = ("--prompt", "-p", "--subject")
"""Options whose empty value the command itself judges."""


def refuse_empty_values(words: Sequence[str]) -> None:
    """Refuse `--option ""`, which an unset variable of a shell leaves and which would pass for no option at all.

    Raises:
        UserError: naming the option.
    """
    if words[:1] == ["lm-eval"]:
        # What follows is the harness's own.
        return
    for option, value in (*pairwise(words), *(word.split("=", 1) for word in words if "=" in word)):
        if option.startswith("--") and not value.strip() and option not in MAY_BE_EMPTY:
            raise UserError(f'{option} "", an empty value', "a value", f"give {option} one, or leave it out")


def usage_error(error: Exception, app: typer.Typer) -> UserError | None:
    """What was wrong; None where that was no use of the command line."""
    if not type(error).__module__.startswith(("typer", "click")) or not hasattr(error, "format_message"):
        return None
    context = getattr(error, "ctx", None)
    path = context.command_path if context is not None else " ".join(["longspan", *sys.argv[1:2]])
    look = f"see `{path} --help`"
    command = context and context.command
    commands = getattr(command, "commands", None)
    if commands and not hasattr(error, "option_name"):
        return _unknown(f"no command {sys.argv[1]!r}", sys.argv[1], commands, look)
    if name := getattr(error, "option_name", ""):
        options = [option for each in getattr(command, "params", ()) for option in each.opts if option.startswith("--")]
        if hasattr(error, "possibilities"):
            return _unknown(f"no option {name} of `{path}`", name, options, look)
    parameter = getattr(error, "param", None)
    number = "" if parameter is None else _number(app, getattr(command, "name", None), parameter.name)
    if parameter is not None and number:
        option = max(parameter.opts, key=len)
        return UserError(f"{option} {_given(parameter.opts)}", number, f"change {option}; {look}")
    usage = context.get_usage().removeprefix("Usage: ") if context is not None else f"{path} [OPTIONS]"
    return UserError(error.format_message().rstrip("."), " ".join(usage.split()), look)


def _unknown(problem: str, word: str, allowed: Sequence[str], look: str) -> UserError:
    from longspan.foundation.config import did_you_mean

    return UserError(problem, ", ".join(allowed), did_you_mean(word, allowed, look))


def _number(app: typer.Typer, command: str | None, parameter: str) -> str:
    """Which numbers an option takes, in words; empty for what is none."""
    for name, annotation in _annotations(app, command):
        if name != parameter:
            continue
        declared = annotation.__metadata__[0]
        kinds = [kind for kind in _members(annotation.__origin__) if kind in KINDS]
        if kinds and isinstance(declared, OptionInfo):
            return KINDS[kinds[0]] + _range(declared.min, declared.max)
    return ""


def _annotations(app: typer.Typer, command: str | None) -> Iterator[tuple[str, Any]]:
    for registered in app.registered_commands:
        called = registered.name or getattr(registered.callback, "__name__", "")
        if called == command and registered.callback is not None:
            for name, annotation in typing.get_type_hints(registered.callback, include_extras=True).items():
                if typing.get_origin(annotation) is typing.Annotated:
                    yield name, annotation


def _members(annotation: Any) -> tuple[Any, ...]:
    union = typing.get_origin(annotation) in (typing.Union, types.UnionType)
    return typing.get_args(annotation) if union else (annotation,)


def _range(least: float | None, most: float | None) -> str:
    low, high = -math.inf if least is None else least, math.inf if most is None else most
    if math.isfinite(low) and math.isfinite(high):
        return f" from {low:g} to {high:g}"
    return f" of {low:g} or more" if math.isfinite(low) else f" of {high:g} or less" if math.isfinite(high) else ""


def _given(options: Sequence[str]) -> str:
    """The value of an option as it was written last."""
    words = sys.argv[1:]
    values = [value for option, value in pairwise(words) if option in options]
    values += [word.split("=", 1)[1] for word in words if "=" in word and word.split("=", 1)[0] in options]
    return values[-1] if values else ""
