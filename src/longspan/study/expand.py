"""From a study to its subjects: every combination of what varies, each with a label and a seed."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from longspan.engines.trained_run import Weights
from longspan.foundation.errors import UserError
from longspan.models.config import ModelConfig
from longspan.models.matching import match
from longspan.study.overlay import apply_settings, apply_variant, resolve_key, set_path
from longspan.study.schema import Study
from longspan.study.sections import AskedConfig, ExaminedConfig, SubjectConfig

PART = "part"
"""The factor that tells the parts of a study apart (`also:`)."""
SHARED = ("pattern", "seed")
"""What the parts of a study vary together."""


@dataclass(frozen=True)
class Subject:
    """One arm of a study at one seed.

    Attributes:
        label: the arm, the same for all its seeds, e.g. `AMAM` or `MMMM · full · markers`.
        factors: what distinguishes the arm, key → value as shown.
        seed: seeds initialisation and data order.
        config: everything that determines the subject; `ExaminedConfig` for a model that is asked as it is.
    """

    label: str
    factors: dict[str, str]
    seed: int
    config: SubjectConfig | ExaminedConfig

    @property
    def who(self) -> str:
        """The arm and its seed, e.g. `AMAM seed 0`; a model that is asked as it is has no seed."""
        return self.label if isinstance(self.config, ExaminedConfig) else f"{self.label} seed {self.seed}"

    @property
    def stored_weights(self) -> Weights:
        """Which weights the probes see, of those that its run's folder holds."""
        return "best" if isinstance(self.config, ExaminedConfig) else self.config.weights


@dataclass(frozen=True)
class Match:
    """How well a match came out: target and reached value, and the relative difference (signed)."""

    quantity: str
    target: float
    reached: float

    @property
    def residual(self) -> float:
        """(reached − target) / target."""
        return (self.reached - self.target) / self.target


@dataclass(frozen=True)
class Expansion:
    """All subjects of a study, and what was left out because it would have been the same run twice."""

    subjects: list[Subject]
    merged: list[str]


def expand(study: Study) -> Expansion:
    """Unfold a study.

    Arms whose isolation differs only in what none of their layers can leak are the same run: they are listed once,
    under the plainer name, and that is said (for a pure attention model, isolation `attention` is `full`).

    Raises:
        UserError: naming the offending key, for any combination that cannot be built.
    """
    subjects: dict[tuple[str, int], Subject] = {}
    given: dict[tuple[str, int], dict[str, str]] = {}
    same: dict[str, set[str]] = {}
    for factors, seed, config in _combinations(study) if _trains(study) else ():
        told_apart = _effective(config)
        isolation, named = told_apart.packing.isolation, config.packing.isolation
        effective = {**factors, "isolation": isolation} if "isolation" in factors else factors
        label = " · ".join(effective.values()) or config.model.pattern
        if study.also:
            main, part = _part_of(study), effective.pop(PART)
            label = " · ".join(effective.values()) or config.model.pattern
            label, effective = label if part == main else f"{part} · {label}", {**effective, PART: part}
        if isolation != named:
            same.setdefault(config.model.pattern, set()).add(f"`{named}` is `{isolation}`")
        if (label, seed) in subjects:
            if given[label, seed] == factors:
                raise UserError(f"vary gives {label!r} with seed {seed} twice", "each combination once", "mend `vary:`")
            continue
        given[label, seed] = factors
        subjects[label, seed] = Subject(label, effective, seed, told_apart)
    for source in study.sources:
        if any(source.label == subject.label for subject in subjects.values()):
            raise UserError(
                f"two subjects are called {source.label!r}", "a name each", "give the model another `name:`"
            )
        shared = {key: study.base[key] for key in AskedConfig.model_fields if key in study.base}
        examined = ExaminedConfig.parse({**shared, "source": source.model_dump(exclude_defaults=True)}, "")
        subjects[source.label, 0] = Subject(source.label, {}, 0, examined)
    return Expansion(
        list(subjects.values()),
        [
            f"{pattern} has one kind of layer only, so for it isolation {' and '.join(sorted(names))}: listed once"
            for pattern, names in same.items()
        ],
    )


def _trains(study: Study) -> bool:
    """Whether a study trains anything: one that only names `subjects:` has no model of its own."""
    return not (study.sources and "model" not in study.base and "training" not in study.base)


def _combinations(study: Study) -> Iterator[tuple[dict[str, str], int, SubjectConfig]]:
    """Factors, seed and configuration of every subject; in a study with several parts, the part is a factor too."""
    if not study.also:
        yield from _product(study)
        return
    for factors, seed, config in _product(study):
        yield {**factors, PART: _part_of(study)}, seed, config
    for name, overlay in study.also.items():
        # A part lies over everything that the study and the command line say, and varies what it shares with it.
        base = copy.deepcopy(dict(study.base))
        vary: dict[str, Any] = {key: values for key, values in study.vary.items() if key in SHARED}
        apply_variant(name, {name: overlay}, base, vary, where="also")
        for factors, seed, config in _product(replace(study, base=base, vary=vary, also={})):
            yield {**factors, PART: name}, seed, config


def _part_of(study: Study) -> str:
    """What the first part of a study is called beside the others: after what it is trained on."""
    corpus = study.base.get("corpus")
    source = corpus.get("source") if isinstance(corpus, Mapping) else None
    return str(corpus.get("task")) if source == "task" and isinstance(corpus, Mapping) else "text"


def _product(study: Study) -> Iterator[tuple[dict[str, str], int, SubjectConfig]]:
    keys = list(study.vary)
    for levels in itertools.product(*(_levels(key, values) for key, values in study.vary.items())):
        base = copy.deepcopy(dict(study.base))
        factors: dict[str, str] = {}
        given = {key: value for key, (_, value) in zip(keys, levels, strict=True)}
        if "variant" in given:
            # A variant is the ground that everything else is set on: the variant chosen for all subjects (a size, say)
            # lies over the one that varies, and the command line over both.
            apply_variant(str(given.pop("variant")), study.variants, base, {})
            apply_variant(study.variant, study.variants, base, {})
            apply_settings(study.settings, base)
        for key, value in given.items():
            set_path(base, resolve_key(key), value)
        for key, (shown, _) in zip(keys, levels, strict=True):
            name = key.rpartition(".")[2]
            if name != "seed":
                factors[name] = shown
        if missing := next((each for each in _needed(base) if each not in base), None):
            raise UserError(f"the study has no `{missing}` section", ", ".join(_needed(base)), f"add `{missing}:`")
        config = SubjectConfig.parse(base, "")
        yield factors, config.training.seed, config


def _levels(key: str, values: Any) -> list[tuple[str, Any]]:
    """(how a level is shown, its value) of a varied key."""
    if isinstance(values, Mapping):
        return [(str(name), value) for name, value in values.items()]
    return [(_shown(key.rpartition(".")[2], value), value) for value in values]


def _needed(base: Mapping[str, Any]) -> tuple[str, ...]:
    """The sections without which nothing can be trained; a task brings its tokenizer."""
    corpus = base.get("corpus")
    of_task = isinstance(corpus, Mapping) and corpus.get("source") == "task"
    return ("corpus", "model", "training") if of_task else ("corpus", "tokenizer", "model", "training")


def _shown(name: str, value: Any) -> str:
    if isinstance(value, bool):
        return name if value else f"no {name}"
    return str(value)


def _effective(config: SubjectConfig) -> SubjectConfig:
    """The configuration with the isolation that its layers can tell apart."""
    model = config.model
    kinds = {model.mixer(letter)[0].isolated_as for letter in model.layers()}
    isolation = config.packing.isolation
    if kinds == {"attention"}:
        isolation = {"attention": "full", "state": "none"}.get(isolation, isolation)  # type: ignore[assignment]
    elif kinds == {"state"} and model.positions != "learned":
        # Learned positions start again with each document where attention is isolated, and every layer sees them.
        isolation = {"state": "full", "attention": "none"}.get(isolation, isolation)  # type: ignore[assignment]
    packing = config.packing.model_copy(update={"isolation": isolation})
    return config.model_copy(update={"packing": packing})


def match_model(config: SubjectConfig, vocab_size: int) -> tuple[ModelConfig, Match | None]:
    """Solve the model's free width, if the study asks for a match."""
    model = config.model.unmatched()
    if config.model.match is None:
        return model, None
    matched = match(model, config.model.match, vocab_size, config.training.context)
    return matched.config, Match(config.model.match.quantity, matched.target, matched.reached)
