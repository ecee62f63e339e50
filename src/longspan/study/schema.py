"""The study file: from YAML, variants and `key=value` overrides to a study that is ready to unfold."""

from __future__ import annotations

import copy
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from longspan.engines.source import ModelSource
from longspan.foundation.config import misspelt, shown_value, unknown_key
from longspan.foundation.errors import UserError
from longspan.foundation.plugins import load_file
from longspan.models.mixers import registered as registered_mixers
from longspan.models.pattern import parse_pattern
from longspan.study.overlay import (
    OF_THE_WHOLE,
    apply_settings,
    apply_variant,
    checked_mapping,
    named_probes,
    resolve_key,
    set_path,
)
from longspan.study.sections import SubjectConfig
from longspan.study.shipped import find_study
from longspan.study.yaml_text import read_mapping, read_override

STUDY_KEYS = (
    "study", "question", "primary", "variants", "variant", "vary", "also", "plugins", "subjects", "probe_context",
    *SubjectConfig.model_fields,
)  # fmt: skip
DEFAULT_PRIMARY = "perplexity.bits_per_byte"
SEED = ("training", "seed")
HOW_TO_RUN = ("graph", "processes", "parallel")
"""Settings of training that change no result but by rounding."""
PATTERN = ("model", "pattern")
FOLDERS = {"jobs", "downloads"}
"""What else lies beside the studies' folders."""


@dataclass(frozen=True)
class Study:
    """A study file with its overrides applied, before it unfolds into subjects.

    Attributes:
        name: the study's name.
        question: what it asks, one sentence.
        base: the sections that all subjects share, as plain data.
        variants: name → overlay of sections; `variant` names those that apply to every subject.
        vary: key → values, or names of values; subjects are the product of all of them, in the order written.
        primary: `probe.metric` that decides.
        overrides: what the command line changed, as written.
        settings: the same as (path, value), in the order they are set; they come after every variant.
        plugins: the user's own files (mixers, probes) that the study needs.
        sources: models that are asked as they are, beside those that are trained.
        context: tokens of the items; None: the longest training context.
        also: name → overlay: a second part of the study, the same patterns and seeds trained on something else.
    """

    name: str
    question: str
    base: Mapping[str, Any]
    variants: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    variant: str = ""
    vary: Mapping[str, list[Any] | Mapping[str, Any]] = field(default_factory=dict)
    primary: str = DEFAULT_PRIMARY
    overrides: tuple[str, ...] = ()
    settings: tuple[tuple[tuple[str, ...], Any], ...] = ()
    plugins: tuple[str, ...] = ()
    sources: tuple[ModelSource, ...] = ()
    context: int | None = None
    also: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def resolved(self) -> dict[str, Any]:
        """The whole study as plain data: what is written beside every result.

        What changes how it is trained and not what comes of it (`HOW_TO_RUN`) is no part of it.
        """
        base = copy.deepcopy(dict(self.base))
        if isinstance(base.get("training"), Mapping):
            base["training"] = {key: value for key, value in base["training"].items() if key not in HOW_TO_RUN}
        return {
            "study": self.name,
            "question": self.question,
            "primary": self.primary,
            **({"variant": self.variant} if self.variant else {}),
            **({"plugins": list(self.plugins)} if self.plugins else {}),
            **({"subjects": [each.model_dump(exclude_defaults=True) for each in self.sources]} if self.sources else {}),
            **({"probe_context": self.context} if self.context else {}),
            **base,
            **({"vary": copy.deepcopy(dict(self.vary))} if self.vary else {}),
            **({"also": copy.deepcopy(dict(self.also))} if self.also else {}),
        }


def load_study(name: str, overrides: Iterable[str] = ()) -> Study:
    """Read a study and apply `key=value` overrides.

    A key is a dotted path (`training.tokens`, `vary.pattern`, `probes.perplexity.stride`) or any setting's own name
    where only one section has it (`tokens`, `pattern`, `isolation`). Values are YAML.

    Raises:
        UserError: for unknown keys (with the nearest one), unreadable YAML or a missing section.
    """
    path = find_study(name)
    raw = read_mapping(path)
    for key in raw:
        if key not in STUDY_KEYS:
            raise unknown_key(str(key), str(key), STUDY_KEYS)
    plugins = tuple(str((path.parent / plugin).resolve()) for plugin in _plugins(raw.get("plugins")))
    for plugin in plugins:
        load_file(plugin)
    raw.setdefault("study", path.stem)
    raw["probes"] = named_probes(raw.get("probes") or [])
    overrides = tuple(overrides)
    changes = [read_override(text) for text in overrides]
    _refuse_bare_groups(overrides, changes, _named_patterns(raw.get("vary")))
    chosen = next((value for key, value in reversed(changes) if key == "variant"), raw.get("variant"))
    chosen = "" if chosen is None else str(chosen)
    variants = {
        name: checked_mapping(f"variants.{name}", overlay)
        for name, overlay in checked_mapping("variants", raw.get("variants")).items()
    }
    base = {key: raw[key] for key in SubjectConfig.model_fields if key in raw}
    vary = dict(checked_mapping("vary", raw.get("vary")))
    apply_variant(chosen, variants, base, vary)
    for name in filter(None, (part.strip() for part in chosen.split(","))):
        raw |= {key: variants[name][key] for key in OF_THE_WHOLE if key in variants[name]}
    for name in vary.get("variant") or []:
        for key in OF_THE_WHOLE:
            if key in variants.get(str(name), {}):
                fix = "choose the variant on the command line"
                raise UserError(f"vary.variant = {name!r}, which sets `{key}`", "variants that set sections", fix)
    settings = _apply_changes(changes, raw, base, vary)
    apply_settings(settings, base)
    _check_varied(vary)
    return Study(
        name=_name(raw["study"]),
        question=_question(path, raw.get("question")),
        base=base,
        variants=variants,
        variant=chosen,
        vary=vary,
        primary=str(raw.get("primary", DEFAULT_PRIMARY)),
        overrides=overrides,
        settings=tuple(settings),
        plugins=plugins,
        sources=_sources(raw.get("subjects") or []),
        context=_context(raw.get("probe_context")),
        also={
            name: checked_mapping(f"also.{name}", part)
            for name, part in checked_mapping("also", raw.get("also")).items()
        },
    )


def _apply_changes(
    changes: Iterable[tuple[str, Any]], raw: dict[str, Any], base: Mapping[str, Any], vary: dict[str, Any]
) -> list[tuple[tuple[str, ...], Any]]:
    """Lay overrides over what the study asks (`raw`) and over the lists in `vary`; what settings are left, in order."""
    varied = {resolve_key(key): key for key in vary if key != "variant"}
    settings: list[tuple[tuple[str, ...], Any]] = []
    mixers = checked_mapping("model.mixers", checked_mapping("model", base.get("model")).get("mixers"))
    # Another source or kind takes the settings of the one before it away, so it comes first wherever it was written.
    for key, value in sorted(
        changes, key=lambda change: change[0] not in ("source", "corpus.source", "tokenizer.kind")
    ):
        if key == "variant":
            continue
        if key in ("question", "study", "primary", "subjects", "probe_context", "also"):
            raw[key] = value
        elif key.startswith("also."):
            raw["also"] = copy.deepcopy(dict(checked_mapping("also", raw.get("also"))))
            set_path(raw, tuple(key.split(".")), value)
        elif key == "vary" or key.startswith("vary."):
            name = key.removeprefix("vary").removeprefix(".")
            if not name:
                raise UserError(
                    f"override `{key}`", "one varied key each", "write `vary.KEY=[...]`, e.g. vary.width=[64, 96]"
                )
            path_of = ("variant",) if name == "variant" else resolve_key(name)
            called = varied.setdefault(path_of, name)
            vary[called] = value if isinstance(value, Mapping) else _chosen(key, value, vary.get(called), mixers)
        elif (path_of := resolve_key(key)) in varied:
            vary[varied[path_of]] = _chosen(key, value, vary[varied[path_of]], mixers)
        elif path_of == SEED and isinstance(value, list):
            vary["seed"] = value
            varied[SEED] = "seed"
        else:
            settings.append((path_of, value))
    return settings


def _check_varied(vary: Mapping[str, Any]) -> None:
    """Refuse to vary what no section has, and lists without values."""
    for key in vary:
        if key != "variant":
            resolve_key(key)
        if not isinstance(vary[key], list | Mapping) or not vary[key]:
            raise UserError(
                f"vary.{key} = {vary[key]!r}",
                "a list with at least one value, or a mapping from names to values",
                f"write `{key}: [..]`",
            )


def _named_patterns(vary: Any) -> set[str]:
    """The names that the study gives to its patterns."""
    patterns = vary.get("pattern", vary.get(".".join(PATTERN))) if isinstance(vary, Mapping) else None
    return {str(name) for name in patterns} if isinstance(patterns, Mapping) else set()


def _refuse_bare_groups(overrides: Iterable[str], changes: Iterable[tuple[str, Any]], named: Collection[str]) -> None:
    """`pattern=[AM]` is a list to YAML and one layer with two mixers to a reader: neither is taken silently.

    `pattern=[RoPE]` is the pattern of that name where the study has one.
    """
    for text, (key, value) in zip(overrides, changes, strict=True):
        if key == "vary.variant":
            continue
        bare = re.fullmatch(r"\[\s*([A-Za-z]{2,})\s*\]", text.partition("=")[2].strip())
        if bare and value == [bare[1]] and bare[1] not in named and resolve_key(key.removeprefix("vary.")) == PATTERN:
            layer, fix = bare[1], f"""write {key}={bare[1]}, or '{key}="[{bare[1]}]"', quotes and all"""
            raise UserError(
                f"override {text!r}, which can mean two things",
                f"the pattern {layer}, or one layer with {layer} side by side",
                fix,
            )


def _sources(entries: Any) -> tuple[ModelSource, ...]:
    if not isinstance(entries, list):
        raise UserError(f"subjects = {entries!r}", "a list of models", "write `- {pretrained: FOLDER_OR_ID}`")
    sources = tuple(ModelSource.parse(entry, f"subjects[{number}]") for number, entry in enumerate(entries))
    labels = [source.label for source in sources]
    for label in labels:
        if labels.count(label) > 1:
            raise UserError(f"two subjects are called {label!r}", "a name each", "add `name:` to one of them")
    return sources


def _name(value: Any) -> str:
    """The study's name, which is a folder under that of all runs."""
    name = "" if value is None else str(value).strip()
    if not name or name in FOLDERS or name.startswith(".") or set(name) & set("/\\\0"):
        taken = " and ".join(sorted(FOLDERS))
        raise UserError(
            f"study = {shown_value(value)}",
            f"a name for its folder: no slash, no dot in front, not {taken}",
            "rename it",
        )
    return name


def _question(path: Path, value: Any) -> str:
    if not isinstance(value, str) or not value.strip():
        raise UserError(f"{path} has no `question`", "one sentence that the report answers", "add `question: ...`")
    return value


def _plugins(value: Any) -> list[str]:
    if value is None:
        return []
    if not isinstance(value, list) or not all(isinstance(each, str) for each in value):
        raise UserError(f"plugins = {shown_value(value)}", "a list of Python files", "write `plugins: [FILE.py]`")
    return value


def _context(value: Any) -> int | None:
    # Python counts `true` as 1.
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
        raise UserError(f"probe_context = {shown_value(value)}", "a number of tokens, at least 1", "change it")
    return value


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _chosen(key: str, value: Any, named: Any, mixers: Iterable[str]) -> Any:
    """The values to vary, as a list; of levels that the study has names for, those that are named.

    Raises:
        UserError: a value that is nearly a name and nothing else that could be meant.
    """
    values = _listed(value)
    if not isinstance(named, Mapping):
        return values
    texts = [each for each in values if isinstance(each, str)]
    for each in texts:
        near = misspelt(each, named)
        if each not in named and near and not (key.endswith("pattern") and _has_mixers(each, mixers)):
            raise UserError(f"{key} = {shown_value(each)}", ", ".join(named), f"did you mean `{near[0]}`?")
    if len(texts) < len(values) or not any(each in named for each in texts):
        return values
    # One that is no name stands for itself.
    return {each: named.get(each, each) for each in texts}


def _has_mixers(pattern: str, mixers: Iterable[str]) -> bool:
    try:
        parse_pattern(pattern, {*registered_mixers(), *mixers})
    except UserError:
        return False
    return True
