"""The study file: from YAML, variants and `key=value` overrides to one checked configuration per subject."""

from __future__ import annotations

import copy
import difflib
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import BaseModel, Discriminator, Field, Tag, field_validator, model_validator

from longspan.corpus.packing import PackingConfig
from longspan.corpus.prepare import CorpusConfig
from longspan.corpus.sources import SOURCES
from longspan.corpus.tasks import registered as registered_tasks
from longspan.corpus.tasks.batches import check_task
from longspan.corpus.tasks.corpus import TaskCorpus
from longspan.corpus.tokenizer import TokenizerConfig, settings_of_kind
from longspan.engines.source import ModelSource
from longspan.engines.trained_run import Weights
from longspan.foundation.config import Config, ConfigError, shown_value, unknown_key
from longspan.foundation.errors import UserError
from longspan.foundation.plugins import load_file
from longspan.foundation.registry import unknown_name
from longspan.models.config import ModelConfig
from longspan.models.matching import MatchConfig
from longspan.models.mixers import registered as registered_mixers
from longspan.models.pattern import parse_pattern
from longspan.probes.base import Probe, make_probe
from longspan.study.shipped import find_study
from longspan.study.yaml_text import read_mapping, read_override
from longspan.training.config import TrainingConfig
from longspan.training.trackers import TrackingConfig


class ModelSection(ModelConfig):
    """A model, and what `match` holds equal between the subjects of a study."""

    match: MatchConfig | None = None

    def unmatched(self) -> ModelConfig:
        """The model as written, without the match."""
        return ModelConfig(**self.model_dump(exclude={"match"}))


def _kind_of_corpus(value: Any) -> str:
    source = value.get("source") if isinstance(value, Mapping) else getattr(value, "source", None)
    return "task" if source == "task" else "text"


AnyCorpus = Annotated[
    Annotated[CorpusConfig, Tag("text")] | Annotated[TaskCorpus, Tag("task")], Discriminator(_kind_of_corpus)
]
"""Documents, or the strings of a task."""


class AskedConfig(Config):
    """What any subject is asked, on which text."""

    corpus: AnyCorpus
    packing: PackingConfig = PackingConfig()
    probes: dict[str, Any] = Field(default_factory=dict)

    @field_validator("probes", mode="after")
    @classmethod
    def _probes_exist(cls, probes: dict[str, Any]) -> dict[str, Any]:
        return {name: make_probe(name, settings).model_dump(mode="json") for name, settings in probes.items()}

    def make_probes(self) -> dict[str, Probe]:
        """name in the study → probe."""
        return {name: make_probe(name, settings) for name, settings in self.probes.items()}


class SubjectConfig(AskedConfig):
    """Everything that determines one trained subject and what it is asked; one arm of a study at one seed.

    `weights` says which weights the probes see: those with the lowest full-validation loss, or the last ones.
    """

    tokenizer: TokenizerConfig
    model: ModelSection
    training: TrainingConfig
    tracking: TrackingConfig = TrackingConfig()
    weights: Weights = "best"

    @model_validator(mode="before")
    @classmethod
    def _task_brings_its_tokenizer(cls, data: Any) -> Any:
        if not isinstance(data, Mapping) or _kind_of_corpus(data.get("corpus")) != "task":
            return data
        given = data.get("tokenizer")
        if given is not None and not (isinstance(given, Mapping) and given.get("kind") == "task"):
            raise ConfigError(
                "tokenizer",
                f"`{ConfigError.PLACE}` with a task as the corpus",
                "none: a task brings its own",
                f"remove `{ConfigError.PLACE}`, or write `{ConfigError.PLACE}: null`",
            )
        corpus = TaskCorpus.parse(data["corpus"], "corpus")
        return {**data, "corpus": corpus, "tokenizer": corpus.tokenizer()}

    @model_validator(mode="after")
    def _rows_hold_a_string(self) -> Self:
        if isinstance(self.corpus, TaskCorpus):
            check_task(self.corpus.task, self.packing, self.training.context)
        elif self.training.mastery is not None:
            raise UserError(
                f"training.mastery = {self.training.mastery} with text as the corpus",
                "mastery of a task (`corpus: {source: task, ...}`)",
                "remove it; `patience` ends training on text early",
            )
        return self

    @model_validator(mode="after")
    def _rows_advance(self) -> Self:
        overlap, context = self.packing.overlap, self.training.context
        if overlap >= context:
            raise UserError(f"packing.overlap = {overlap}", f"less than the context ({context})", "lower the overlap")
        return self

    @model_validator(mode="after")
    def _positions_suffice(self) -> Self:
        rows, context = self.model.max_positions, self.training.context
        if self.model.positions == "learned" and rows is not None and rows < context:
            raise UserError(
                f"model.max_positions = {rows} with training.context = {context}",
                "a learned position for every token of a row",
                f"set model.max_positions to {context} or more, or train at a shorter context",
            )
        return self


class ExaminedConfig(AskedConfig):
    """Everything that determines what a model that is asked as it is answers."""

    source: ModelSource


SECTIONS: dict[str, type[BaseModel]] = {
    "corpus": CorpusConfig,
    "tokenizer": TokenizerConfig,
    "packing": PackingConfig,
    "model": ModelSection,
    "training": TrainingConfig,
    "tracking": TrackingConfig,
}
STUDY_KEYS = (
    "study", "question", "primary", "variants", "variant", "vary", "also", "plugins", "subjects", "probe_context",
    *SubjectConfig.model_fields,
)  # fmt: skip
OF_THE_WHOLE = ("subjects", "probe_context", "primary")
"""What a variant that is chosen for the whole study may replace beside sections."""
DEFAULT_PRIMARY = "perplexity.bits_per_byte"
SEED = ("training", "seed")
HOW_TO_RUN = ("graph", "processes", "parallel")
"""Settings of training that change no result but by rounding."""
PATTERN = ("model", "pattern")
FOLDERS = {"jobs", "downloads"}
"""What else lies beside the studies' folders."""
RIVALS = {"tokens": "steps", "steps": "tokens"}
"""Settings of training of which exactly one is given: the later takes the place of the other."""


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
    raw["probes"] = _named_probes(raw.get("probes") or [])
    overrides = tuple(overrides)
    changes = [read_override(text) for text in overrides]
    _refuse_bare_groups(overrides, changes)
    chosen = next((str(value) for key, value in reversed(changes) if key == "variant"), str(raw.get("variant") or ""))
    variants = {
        name: _mapping(f"variants.{name}", overlay)
        for name, overlay in _mapping("variants", raw.get("variants")).items()
    }
    base = {key: raw[key] for key in SubjectConfig.model_fields if key in raw}
    vary = dict(_mapping("vary", raw.get("vary")))
    apply_variant(chosen, variants, base, vary)
    for name in filter(None, (part.strip() for part in chosen.split(","))):
        raw |= {key: variants[name][key] for key in OF_THE_WHOLE if key in variants[name]}
    for name in vary.get("variant") or []:
        for key in OF_THE_WHOLE:
            if key in variants.get(str(name), {}):
                fix = "choose the variant on the command line"
                raise UserError(f"vary.variant = {name!r}, which sets `{key}`", "variants that set sections", fix)
    varied = {resolve_key(key): key for key in vary if key != "variant"}
    settings: list[tuple[tuple[str, ...], Any]] = []
    mixers = _mapping("model.mixers", _mapping("model", base.get("model")).get("mixers"))
    # Another source or kind takes the settings of the one before it away, so it comes first wherever it was written.
    for key, value in sorted(
        changes, key=lambda change: change[0] not in ("source", "corpus.source", "tokenizer.kind")
    ):
        if key == "variant":
            continue
        if key in ("question", "study", "primary", "subjects", "probe_context", "also"):
            raw[key] = value
        elif key.startswith("also."):
            raw["also"] = copy.deepcopy(dict(_mapping("also", raw.get("also"))))
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
    apply_settings(settings, base)
    for key in vary:
        if key != "variant":
            resolve_key(key)
        if not isinstance(vary[key], list | Mapping) or not vary[key]:
            raise UserError(
                f"vary.{key} = {vary[key]!r}",
                "a list with at least one value, or a mapping from names to values",
                f"write `{key}: [..]`",
            )
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
        also={name: _mapping(f"also.{name}", part) for name, part in _mapping("also", raw.get("also")).items()},
    )


def _refuse_bare_groups(overrides: Iterable[str], changes: Iterable[tuple[str, Any]]) -> None:
    """`pattern=[AM]` is a list to YAML and one layer with two mixers to a reader: neither is taken silently."""
    for text, (key, value) in zip(overrides, changes, strict=True):
        bare = re.fullmatch(r"\[\s*([A-Za-z]{2,})\s*\]", text.partition("=")[2].strip())
        if bare and value == [bare[1]] and resolve_key(key.removeprefix("vary.")) == PATTERN:
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


def _mapping(key: str, value: Any) -> Mapping[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise UserError(f"{key} = {shown_value(value)}", "a mapping", f"write `{key}: {{name: ...}}`")
    return value


def _context(value: Any) -> int | None:
    if value is not None and (not isinstance(value, int) or value < 1):
        raise UserError(f"probe_context = {value!r}", "a number of tokens, at least 1", "change it")
    return value


def apply_variant(
    names: str, variants: Mapping[str, Mapping[str, Any]], base: dict[str, Any], vary: dict[str, Any]
) -> None:
    """Lay the named variants (comma-separated, in order) over the sections in `base` and the lists in `vary`."""
    for name in filter(None, (part.strip() for part in names.split(","))):
        if name not in variants:
            if not variants:
                raise UserError(f"variant = {name!r}", "no variant: this study has none", "leave `variant` out")
            raise unknown_name("variant", name, variants)
        for key, value in variants[name].items():
            if key == "vary":
                vary.update(copy.deepcopy(dict(_mapping(f"variants.{name}.vary", value))))
            elif key == "probes":
                base["probes"] = _named_probes(value)
            elif key in SECTIONS:
                below = base.get(key) or {}
                if key == "corpus" and "source" in (value or {}):
                    below = _with_source(below, value["source"])
                base[key] = _overlay(_without_rivals(key, below, value or {}), value)
            elif key in SubjectConfig.model_fields:
                base[key] = copy.deepcopy(value)
            elif key not in OF_THE_WHOLE:
                raise unknown_key(f"variants.{name}.{key}", key, (*SubjectConfig.model_fields, "vary", *OF_THE_WHOLE))


def apply_settings(settings: Iterable[tuple[tuple[str, ...], Any]], base: dict[str, Any]) -> None:
    """Set what the command line changes."""
    for path, value in settings:
        if path == ("probes",):
            base["probes"] = _named_probes(value)
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
        near = difflib.get_close_matches(each, named, n=1, cutoff=0.75)
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


def _named_probes(probes: Any) -> dict[str, Any]:
    """name → settings, from a mapping or a list of names and of names with settings."""
    named: dict[str, Any] = {}
    for name, settings in probes.items() if isinstance(probes, Mapping) else _probe_entries(probes):
        if name in named:
            fix = f"give one another name: `{name}_again: {{kind: {name}}}`"
            raise UserError(f"the probe `{name}` stands twice", "each name once", fix)
        named[str(name)] = dict(_mapping(f"probes.{name}", settings))
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
