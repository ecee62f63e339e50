"""Frozen, strict configuration: errors name the key as it is written, what is allowed there, and the nearest key."""

from __future__ import annotations

import difflib
import re
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator
from pydantic_core import ErrorDetails

from longspan.foundation.errors import UserError

KEY_TABLES = "docs/write-a-study.md"
"""Where every key of a study is explained."""
MOST_KEYS = 24
"""More allowed keys than these are not listed in an error."""
NEAR = 0.75
"""Share of letters in common, in order, from which a word may be a misspelt other; of short ones all but one."""
FEWEST_LETTERS = 3
"""Of a word that may be misspelt, or begin an allowed one."""
MOST_SUGGESTED = 3
_PATH = "\0"


class Config(BaseModel):
    """Base of every configuration: immutable, no unknown keys, no infinite numbers.

    Each component owns its configuration and builds itself from it. Validate data that crosses a boundary (YAML,
    command line) with `Config.parse`, which turns pydantic's errors into a `UserError`.
    """

    model_config = ConfigDict(
        frozen=True, extra="forbid", validate_default=True, protected_namespaces=(), allow_inf_nan=False
    )

    @model_validator(mode="before")
    @classmethod
    def _numbers_are_no_booleans(cls, data: Any) -> Any:
        """Python counts `true` as 1: a learning rate of `true` would be trained with."""
        for key, value in data.items() if isinstance(data, Mapping) else ():
            if key in cls.model_fields and _is_mistaken(value, cls.model_fields[key].annotation):
                raise ConfigError(
                    key, f"{_PATH} = {shown_value(value)}", "a number, not true or false", f"change `{_PATH}`"
                )
        return data

    @classmethod
    def parse(cls, data: Any, where: str) -> Self:
        """Validate `data`.

        Args:
            data: a mapping, usually from YAML.
            where: what the reader knows this section as, e.g. `model`; empty for a whole study.

        Raises:
            UserError: naming the offending key and value, and the nearest allowed key.
        """
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            raise _explain(error, cls, where) from None


class ConfigError(UserError):
    """A key or value that a configuration refuses; the path to it grows while the error goes up.

    Args:
        path: of the key within its configuration, dotted.
        given, allowed, fix: as in `UserError`, with `PLACE` where the path belongs.
    """

    PLACE = _PATH

    def __init__(self, path: str, given: str, allowed: str, fix: str) -> None:
        self.path, self._texts = path, (given, allowed, fix)
        super().__init__(*(text.replace(_PATH, path) for text in self._texts))

    def __reduce__(self) -> tuple[type[ConfigError], tuple[str, ...]]:
        """From process to process with the texts as they were given: the path may still grow."""
        return type(self), (self.path, *self._texts)

    def under(self, where: str) -> ConfigError:
        """The same error as seen from a configuration that holds this one at `where`."""
        return self.at(_joined(where, self.path))

    def at(self, path: str) -> ConfigError:
        """The same error of another key."""
        return ConfigError(path, *self._texts)


def unknown_key(path: str, key: str, allowed: Iterable[str]) -> ConfigError:
    """The error for an unknown key: names the nearest allowed one, and all of them where they are few."""
    allowed = sorted(allowed)
    fix = did_you_mean(key, allowed, f"remove it; {KEY_TABLES} explains every key")
    return ConfigError(path, f"unknown key `{_PATH}`", listed_keys(allowed, nearest(key, allowed)), fix)


def did_you_mean(word: str, allowed: Iterable[str], otherwise: str) -> str:
    """The question after the nearest allowed word, or `otherwise` where none is near."""
    near = nearest(word, allowed)
    return f"did you mean `{near[0]}`?" if near else otherwise


def nearest(word: str, allowed: Iterable[str]) -> list[str]:
    """The allowed words that may be meant, nearest first: begun, misspelt, or told apart by whole words (`lr`).

    A word that shares no more than some letters is not among them: a wrong suggestion costs more than none.
    """
    words = set(allowed)
    alike = {each: _likeness(word, each) for each in words}
    related = [each for each in words if _related(word.casefold(), each.casefold())]
    near = sorted(related, key=lambda each: (-alike[each], each))
    return [*near, *(each for each in misspelt(word, words) if each not in near)][:MOST_SUGGESTED]


def misspelt(word: str, allowed: Iterable[str]) -> list[str]:
    """The allowed words that this one may be a misspelling of, nearest first."""
    enough = min(NEAR, (len(word) - 1) / len(word)) if len(word) >= FEWEST_LETTERS else 1.0
    alike = sorted((-_likeness(word, each), each) for each in set(allowed))
    return [each for less, each in alike if -less >= enough]


def _likeness(word: str, other: str) -> float:
    return difflib.SequenceMatcher(None, other.casefold(), word.casefold(), autojunk=False).ratio()


def _related(word: str, other: str) -> bool:
    mine, theirs = (set(re.split(r"[\W_]+", text)) for text in (word, other))
    return mine <= theirs or theirs <= mine or (len(word) >= FEWEST_LETTERS and other.startswith(word))


def listed_keys(allowed: Sequence[str], near: Sequence[str] = ()) -> str:
    """All keys where they are few, else the nearest ones and where the others are."""
    if not allowed:
        return "no keys here"
    if len(allowed) <= MOST_KEYS:
        return ", ".join(allowed)
    nearest = f"{', '.join(near)}, and others: " if near else ""
    return f"{nearest}{len(allowed)} keys, all in {KEY_TABLES}"


def shown_value(value: Any) -> str:
    """A value as YAML writes it, shortened."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


# --- from pydantic's errors to ours -----------------------------------------------------------------------------------


def _explain(error: ValidationError, config: type[BaseModel], where: str) -> UserError:
    details = error.errors()
    # An unknown key is almost always the cause of whatever else is wrong with the section.
    detail = next((d for d in details if d["type"] == "extra_forbidden"), details[0])
    keys, annotation = _locate(config, detail)
    if detail["type"].endswith("_type"):
        # Of the members of a union the one that got further into what was given is the one that was meant.
        further = (d for d in details if len(inner := _locate(config, d)[0]) > len(keys) and inner[: len(keys)] == keys)
        detail = next(further, detail)
        keys, annotation = _locate(config, detail)
    path = _joined(where, ".".join(keys))
    cause = detail.get("ctx", {}).get("error")
    if isinstance(cause, ConfigError):
        # A component that knows its own place in a study has said it.
        return cause if path and f"{cause.path}.".startswith(f"{path}.") else cause.under(path)
    if isinstance(cause, UserError):
        said = not path or cause.given.startswith((f"{path}.", f"{path}:", f"{path} "))
        return UserError(cause.given if said else f"{path}: {cause.given}", cause.allowed, cause.fix)
    if detail["type"] == "extra_forbidden":
        return unknown_key(path, keys[-1], _keys_of(annotation))
    if detail["type"] == "missing" and isinstance(detail["loc"][-1], int):
        holder = ".".join(keys[:-1])
        number = f"a list of at least {detail['loc'][-1] + 1}"
        return ConfigError(
            _joined(where, holder), f"{_PATH} = {shown_value(detail['input'])}", number, f"change `{_PATH}`"
        )
    if detail["type"] == "missing":
        return ConfigError(path, f"{_PATH} is missing", "a value: it has no default", f"add `{_PATH}`")
    # The members of a union fail one by one; each says what it would have taken.
    together = [d for d in details if d["input"] == detail["input"] and _locate(config, d)[0] == keys]
    wanted = list(dict.fromkeys(_wanted(d, annotation) for d in together))
    if _takes_none(annotation):
        wanted.append("null")
    return ConfigError(path, f"{_PATH} = {shown_value(detail['input'])}", _either(wanted), _fix(detail, wanted))


def _joined(*parts: str) -> str:
    return ".".join(filter(None, parts))


def _either(options: Sequence[str]) -> str:
    return options[0] if len(options) == 1 else f"{', '.join(options[:-1])} or {options[-1]}"


_WANTED = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "string": "text",
    "dict": "a mapping, e.g. `{key: value}`",
    "tuple": "a list, e.g. `[a, b]`",
    "list": "a list, e.g. `[a, b]`",
    "path": "the path of a file or folder",
    "none": "null",
    "finite": "a finite number",
}
"""The first word of pydantic's error types → what was wanted."""


def _wanted(detail: ErrorDetails, annotation: Any) -> str:
    """What one of pydantic's errors asks for, in words."""
    kind, context = detail["type"], detail.get("ctx", {})
    bounds = {"greater_than": "above {gt:g}", "greater_than_equal": "of {ge:g} or more", "less_than": "below {lt:g}",
              "less_than_equal": "of {le:g} or less"}  # fmt: skip
    if kind in bounds:
        number = "a whole number" if int in _members(annotation) and float not in _members(annotation) else "a number"
        return f"{number} {bounds[kind].format(**context)}"
    if kind in ("literal_error", "enum"):
        return ", ".join(_choices(detail))
    if kind in ("model_type", "model_attributes_type"):
        return f"a mapping with keys of: {', '.join(_keys_of(annotation))}"
    if kind in ("too_short", "too_long"):
        bound = context.get("min_length", context.get("max_length"))
        return f"a list of {'at least' if kind == 'too_short' else 'at most'} {bound}"
    message = detail["msg"].removeprefix("Value error, ").removeprefix("Input should be ")
    return _WANTED.get(kind.split("_")[0], message)


def _choices(detail: ErrorDetails) -> list[str]:
    expected = detail.get("ctx", {}).get("expected", "")
    return [choice.strip("'") for part in expected.split(", ") for choice in part.split(" or ")]


def _fix(detail: ErrorDetails, wanted: Sequence[str]) -> str:
    if detail["type"] == "literal_error":
        return did_you_mean(str(detail["input"]), _choices(detail), f"change `{_PATH}`")
    if isinstance(detail["input"], list) and not any("list" in each for each in wanted):
        return f"give one value, or make a subject of each with `vary.{_PATH}=[...]`"
    return f"change `{_PATH}`"


def _is_mistaken(value: Any, annotation: Any) -> bool:
    """Whether a boolean stands, also within a list or mapping, where a number and no boolean is meant."""
    members = _members(annotation)
    if isinstance(value, bool):
        taken = {*members, *(type(choice) for each in members for choice in typing.get_args(each))}
        return bool({int, float} & set(members)) and bool not in taken
    if not isinstance(value, list | tuple | Mapping):
        return False
    held = list(value.values()) if isinstance(value, Mapping) else list(value)
    holder = _holder(members, "" if isinstance(value, Mapping) else 0)
    inner = [each for each in typing.get_args(holder) if each is not Ellipsis] if holder else []
    return bool(inner) and any(_is_mistaken(each, inner[-1]) for each in held)


def _locate(config: type[BaseModel], detail: ErrorDetails) -> tuple[list[str], Any]:
    """The path of an error as the reader writes it (unions put names of their own into it), and what is wanted there.

    For an unknown key the second is the configuration that does not know it.
    """
    keys: list[str] = []
    annotation: Any = config
    for at, part in enumerate(detail["loc"]):
        members = _members(annotation)
        if _names_a_member(part, members):
            continue
        models = [each for each in members if isinstance(each, type) and issubclass(each, BaseModel)]
        owners = [model for model in models if part in model.model_fields]
        if owners:
            keys.append(str(part))
            annotation = owners[0].model_fields[str(part)].annotation
        elif detail["type"] == "extra_forbidden" and at == len(detail["loc"]) - 1:
            keys.append(str(part))
        elif holder := _holder(members, part):
            keys.append(str(part))
            annotation = next(each for each in reversed(typing.get_args(holder)) if each is not Ellipsis)
    return keys, annotation


def _names_a_member(part: int | str, members: Sequence[Any]) -> bool:
    """Whether a part of a path says which kind of value a union tried, as in `hub_splits.str`."""
    others = [each for each in members if each is not types.NoneType]
    kinds = {getattr(each, "__name__", "") for each in others if typing.get_origin(each) is None}
    return len(others) > 1 and isinstance(part, str) and (part in kinds or "[" in part)


def _holder(members: Sequence[Any], part: int | str) -> Any:
    """The list or mapping among some annotations that a part of a path leads into, None where none does."""
    kinds = (list, tuple) if isinstance(part, int) else (dict, Mapping)
    return next((each for each in members if typing.get_origin(each) in kinds), None)


def _members(annotation: Any) -> list[Any]:
    """The members of a union, nested ones too; an annotation that is none is its own."""
    origin = typing.get_origin(annotation)
    if origin is typing.Annotated:
        return _members(typing.get_args(annotation)[0])
    if origin in (typing.Union, types.UnionType):
        return [leaf for each in typing.get_args(annotation) for leaf in _members(each)]
    return [annotation]


def _takes_none(annotation: Any) -> bool:
    return types.NoneType in _members(annotation)


def _keys_of(annotation: Any) -> list[str]:
    models = [each for each in _members(annotation) if isinstance(each, type) and issubclass(each, BaseModel)]
    return [name for model in models for name in model.model_fields]
