"""Laying settings over a study: variants, `key=value` of the command line, and what takes the place of what."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from pydantic import BaseModel

from longspan.corpus.prepare import CorpusConfig
from longspan.corpus.sources import SOURCES
from longspan.corpus.tasks import registered as registered_tasks
from longspan.corpus.tokenizer import settings_of_kind
from longspan.foundation.config import shown_value, unknown_key
from longspan.foundation.errors import UserError
from longspan.foundation.registry import unknown_name
from longspan.study.sections import SECTIONS, SubjectConfig

OF_THE_WHOLE = ("subjects", "probe_context", "primary")
"""What a variant that is chosen for the whole study may replace beside sections."""
OF_THE_FILE = ("plugins", "variants")
"""What a command line cannot change."""
RIVALS = {"tokens": "steps", "steps": "tokens"}
"""Settings of training of which exactly one is given: the later takes the place of the other."""


def apply_variant(
    names: str,
    variants: Mapping[str, Mapping[str, Any]],
    base: dict[str, Any],
    vary: dict[str, Any],
    where: str = "variants",
) -> None:
    """Lay the named variants (comma-separated, in order) over the sections in `base` and the lists in `vary`.

    `where` is where they stand in the study, for errors.
    """
    for name in filter(None, (part.strip() for part in names.split(","))):
        if name not in variants:
            if not variants:
                raise UserError(f"variant = {name!r}", "no variant: this study has none", "leave `variant` out")
            raise unknown_name("variant", name, variants)
        for key, value in variants[name].items():
            if key == "vary":
                vary.update(copy.deepcopy(dict(checked_mapping(f"{where}.{name}.vary", value))))
            elif key == "probes":
                base["probes"] = named_probes(value)
            elif key in SECTIONS:
                below = base.get(key) or {}
                if key == "corpus" and "source" in (value or {}):
                    below = _with_source(below, value["source"])
                base[key] = _overlay(_without_rivals(key, below, value or {}), value)
            elif key in SubjectConfig.model_fields:
                base[key] = copy.deepcopy(value)
            elif key not in OF_THE_WHOLE:
                raise unknown_key(f"{where}.{name}.{key}", key, (*SubjectConfig.model_fields, "vary", *OF_THE_WHOLE))


def apply_settings(settings: Iterable[tuple[tuple[str, ...], Any]], base: dict[str, Any]) -> None:
    """Set what the command line changes."""
    for path, value in settings:
        if path == ("probes",):
            base["probes"] = named_probes(value)
        elif path == ("corpus", "source"):
            base["corpus"] = _with_source(base.get("corpus") or {}, value)
        else:
            if path == ("tokenizer", "kind"):
                base["tokenizer"] = {
                    k: v for k, v in (base.get("tokenizer") or {}).items() if k in settings_of_kind(value)
                }
            base[path[0]] = _without_rivals(path[0], base.get(path[0]), path[1:])
            set_path(base, path, copy.deepcopy(value))


def resolve_key(key: str) -> tuple[str, ...]:
    """The path of a setting: `training.tokens` → (training, tokens); `tokens` → the one section that has it."""
    parts = tuple(key.split("."))
    if parts[0] in OF_THE_FILE:
        raise UserError(f"override `{key}`", f"`{parts[0]}` in the study file alone", "write it there")
    if parts[0] in ("weights", "probes"):
        return parts
    if parts[0] in SECTIONS:
        if len(parts) > 1:
            fields = _fields(SECTIONS[parts[0]])
            # Source settings are flat in the file and belong to the source; they are checked when it is built.
            if parts[0] != "corpus" and parts[1] not in fields:
                raise unknown_key(key, parts[1], fields)
        return parts
    sections = [name for name, model in SECTIONS.items() if parts[0] in _fields(model)]
    if not sections and parts[0] in _source_keys():
        sections = ["corpus"]
    if len(sections) == 1:
        return (sections[0], *parts)
    if sections:
        choices = ", ".join(f"{section}.{key}" for section in sections)
        raise UserError(f"key `{key}` is in several sections", choices, "write the section before it")
    allowed = [
        *SECTIONS,
        "weights",
        "probes",
        "variant",
        *(name for model in SECTIONS.values() for name in _fields(model)),
    ]
    raise unknown_key(key, parts[0], set(allowed))


def set_path(data: dict[str, Any], path: tuple[str, ...], value: Any) -> None:
    """Set a nested value, making the mappings on the way."""
    for part in path[:-1]:
        if not isinstance(data.get(part), dict):
            data[part] = {}
        data = data[part]
    data[path[-1]] = value


def _fields(model: type[BaseModel]) -> list[str]:
    return list(model.model_fields)


def _source_keys() -> set[str]:
    """Settings of the sources: they stand beside the source's name in the corpus section."""
    return {name for source in (*SOURCES, *registered_tasks().values()) for name in _fields(source)}


def _overlay(below: Any, above: Any) -> Any:
    if not (isinstance(below, Mapping) and isinstance(above, Mapping)):
        return copy.deepcopy(above)
    return {**below, **{key: _overlay(below.get(key), value) for key, value in above.items()}}


def _with_source(corpus: Mapping[str, Any], source: Any) -> dict[str, Any]:
    """The corpus section with another source: settings that only the old source had go with it."""
    if corpus.get("source") == source:
        return dict(corpus)
    if source == "task":
        return {"source": source}
    return {**{key: value for key, value in corpus.items() if key in CorpusConfig.model_fields}, "source": source}


def _without_rivals(section: str, below: Any, given: Iterable[str]) -> Any:
    """A section without the setting that a given one stands for: `steps` replaces `tokens`, and the other way."""
    rivals = {RIVALS[key] for key in given if section == "training" and key in RIVALS} - set(given)
    return (
        {key: value for key, value in below.items() if key not in rivals}
        if rivals and isinstance(below, Mapping)
        else below
    )


def named_probes(probes: Any) -> dict[str, Any]:
    """name → settings, from a mapping or a list of names and of names with settings."""
    named: dict[str, Any] = {}
    for name, settings in probes.items() if isinstance(probes, Mapping) else _probe_entries(probes):
        if name in named:
            fix = f"give one another name: `{name}_again: {{kind: {name}}}`"
            raise UserError(f"the probe `{name}` stands twice", "each name once", fix)
        named[str(name)] = dict(checked_mapping(f"probes.{name}", settings))
    return named


def _probe_entries(probes: Any) -> Iterator[tuple[str, Any]]:
    for entry in probes if isinstance(probes, list) else [probes]:
        if isinstance(entry, str):
            yield entry, {}
        elif isinstance(entry, Mapping) and len(entry) == 1:
            yield next(iter(entry.items()))
        else:
            raise UserError(
                f"probes: {entry!r}", "a probe's name, or one name with its settings", "write `- perplexity: {..}`"
            )


def checked_mapping(key: str, value: Any) -> Mapping[str, Any]:
    """The mapping that stands under a key, empty where nothing does.

    Raises:
        UserError: anything else.
    """
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise UserError(f"{key} = {shown_value(value)}", "a mapping", f"write `{key}: {{name: ...}}`")
    return value
