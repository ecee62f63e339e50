"""Frozen, strict configuration: unknown keys are errors that name the nearest key."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import ErrorDetails

from longspan.foundation.errors import UserError


class Config(BaseModel):
    """Base of every configuration: immutable, no unknown keys.

    Each component owns its configuration and builds itself from it. Validate data that crosses a boundary (YAML,
    command line) with `Config.parse`, which turns pydantic's errors into a `UserError`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, protected_namespaces=())

    @classmethod
    def parse(cls, data: Any, where: str) -> Self:
        """Validate `data`.

        Args:
            data: a mapping, usually from YAML.
            where: what the reader knows this section as, e.g. `study.model`.

        Raises:
            UserError: naming the offending key and value, and the nearest allowed key.
        """
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            raise _explain(error, cls, where) from None


def _explain(error: ValidationError, config: type[BaseModel], where: str) -> UserError:
    details = error.errors()
    # An unknown key is almost always the cause of whatever else is wrong with the section.
    detail = next((d for d in details if d["type"] == "extra_forbidden"), details[0])
    path = ".".join([where, *(str(part) for part in detail["loc"])])
    if detail["type"] == "extra_forbidden":
        return unknown_key(path, str(detail["loc"][-1]), _keys_at(config, detail))
    cause = detail.get("ctx", {}).get("error")
    if isinstance(cause, UserError):
        return UserError(f"{path}: {cause.given}", cause.allowed, cause.fix)
    if detail["type"] == "missing":
        return UserError(f"{path} is missing", "a value for every required key", f"add `{detail['loc'][-1]}:` there")
    message = detail["msg"].removeprefix("Value error, ")
    return UserError(f"{path} = {detail['input']!r}", message, f"change `{path}`")


def unknown_key(path: str, key: str, allowed: Iterable[str]) -> UserError:
    """The error for an unknown key: names the nearest allowed one."""
    allowed = sorted(allowed)
    near = difflib.get_close_matches(key, allowed, n=1, cutoff=0.5)
    fix = f"did you mean `{near[0]}`?" if near else "remove it"
    return UserError(f"unknown key `{path}`", ", ".join(allowed) or "no keys", fix)


def _keys_at(config: type[BaseModel], detail: ErrorDetails) -> list[str]:
    current: type[BaseModel] | None = config
    for part in detail["loc"][:-1]:
        if current is None:
            break
        field = current.model_fields.get(str(part))
        annotation = field.annotation if field else None
        models = [a for a in _flatten(annotation) if isinstance(a, type) and issubclass(a, BaseModel)]
        if field is None:
            # A tagged union puts the tag into the location; stay on the model that carries it.
            continue
        current = _by_tag(models, detail) or (models[0] if models else None)
    return list(current.model_fields) if current else []


def _by_tag(models: list[type[BaseModel]], detail: ErrorDetails) -> type[BaseModel] | None:
    tags = {str(part) for part in detail["loc"]}
    for model in models:
        for field in model.model_fields.values():
            if tags & {str(value) for value in getattr(field.annotation, "__args__", ())}:
                return model
    return None


def _flatten(annotation: Any) -> list[Any]:
    arguments = getattr(annotation, "__args__", None)
    if not arguments:
        return [annotation]
    return [leaf for argument in arguments for leaf in _flatten(argument)]
