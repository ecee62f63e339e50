"""What a study will do, before it does it: subjects, their match, their cost, and the jobs in order."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from longspan.corpus.prepare import CorpusConfig
from longspan.corpus.tasks.corpus import TaskCorpus
from longspan.corpus.tokenizer import TokenizerConfig, tokenizer_fingerprint, train_tokenizer
from longspan.engines import opening
from longspan.engines.opening import Described
from longspan.foundation.errors import UserError
from longspan.foundation.files import sha256_file
from longspan.models.budget import Parameters, count_parameters, training_flops_per_token
from longspan.models.config import ModelConfig
from longspan.report.numbers import duration, relative, scaled
from longspan.study.checks import check_primary, check_probes
from longspan.study.examined import examine
from longspan.study.expand import Expansion, Match, Subject, expand, match_model
from longspan.study.failures import failure
from longspan.study.jobs import DOWNLOADS, Job, Kind
from longspan.study.pinned import pinned, pinned_probes
from longspan.study.plugin_laws import check_own_mixers
from longspan.study.predicted_time import ASSUMED_EFFICIENCY, matmul_rate, trained_tokens, validation_share
from longspan.study.schema import Study
from longspan.study.sections import ExaminedConfig, SubjectConfig
from longspan.training.config import TrainingConfig


@dataclass(frozen=True)
class PlannedSubject:
    """A subject with its model solved and its jobs made.

    `train` imports a model that is asked as it is, or checks one that another engine runs (`elsewhere`); `model` and
    `vocab_size` are None for the latter.
    """

    subject: Subject
    model: ModelConfig | None
    vocab_size: int | None
    match: Match | None
    prepare: Job
    train: Job
    probes: dict[str, Job]
    trained_context: int | None
    elsewhere: Described | None = None

    @cached_property
    def parameters(self) -> Parameters | None:
        """Parameters by part; None where they are not known (a server's)."""
        if self.model is None:
            assert self.elsewhere is not None
            return opening.count_parameters(self.elsewhere)
        assert self.vocab_size is not None
        return count_parameters(self.model, self.vocab_size)

    @property
    def mixers(self) -> tuple[str, ...]:
        """True mixer name of every layer; empty where it is not known."""
        if self.model is None:
            shape = self.elsewhere.shape if self.elsewhere else None
            return shape.layers if shape else ()
        return tuple(self.model.mixer(letter)[0].name for letter in self.model.layers())

    @cached_property
    def training(self) -> TrainingConfig | None:
        """How it is trained; None for a model that is asked as it is."""
        config = self.subject.config
        return config.training if isinstance(config, SubjectConfig) else None

    @cached_property
    def training_flops(self) -> float:
        """FLOPs of the whole training run (3 × forward, recomputation not counted); 0 where nothing is trained."""
        training = self.training
        if training is None:
            return 0.0
        assert self.model is not None
        assert self.vocab_size is not None
        return training_flops_per_token(self.model, self.vocab_size, training.context) * trained_tokens(training)

    def validation_share(self, runs: Path) -> float | None:
        """See `predicted_time.validation_share`."""
        assert isinstance(self.subject.config, SubjectConfig)
        return validation_share(self.subject.config, self.prepare.result(runs) if self.prepare.is_done(runs) else None)


@dataclass(frozen=True)
class Plan:
    """A study unfolded: its subjects with their jobs, and the table that a person sees first.

    `context` is the tokens of the items, the same for every subject; `merged` says which arms are listed once, being
    the same run; `notes` is for the terminal, that included; `failed` is jobs that failed, by title, and why.
    """

    study: Study
    subjects: list[PlannedSubject]
    notes: list[str]
    seconds: float
    context: int
    merged: tuple[str, ...] = ()
    failed: tuple[tuple[str, str], ...] = ()

    columns = ("<subject", "seeds", "<mixers", "parameters", "non-embedding", "match", "tokens", "training FLOPs")

    @property
    def rows(self) -> list[tuple[str, ...]]:
        """One row an arm."""
        rows: list[tuple[str, ...]] = []
        for arm in self.arms().values():
            first = arm[0]
            residual = "–" if first.match is None else relative(first.match.residual)
            rows.append(
                (
                    first.subject.label,
                    str(len(arm)),
                    describe_mixers(first.mixers) or "–",
                    scaled(first.parameters.total) if first.parameters else "–",
                    scaled(first.parameters.non_embedding) if first.parameters else "–",
                    residual,
                    scaled(trained_tokens(first.training)) if first.training else "as it is",
                    scaled(first.training_flops) if first.training else "–",
                )
            )
        return rows

    @property
    def trained(self) -> list[PlannedSubject]:
        """The subjects that the study trains."""
        return [planned for planned in self.subjects if planned.training is not None]

    def arms(self) -> dict[str, list[PlannedSubject]]:
        """label → its subjects, one a seed."""
        arms: dict[str, list[PlannedSubject]] = {}
        for planned in self.subjects:
            arms.setdefault(planned.subject.label, []).append(planned)
        return arms

    def jobs_until(self, stage: Literal["prepare", "train", "probe", "report"]) -> list[Job]:
        """All jobs up to a stage, each after those it needs; a subject is asked before the next is trained."""
        jobs = {planned.prepare.key: planned.prepare for planned in self.subjects}
        for planned in self.subjects if stage != "prepare" else ():
            jobs[planned.train.key] = planned.train
            if stage in ("probe", "report"):
                jobs |= {job.key: job for job in planned.probes.values()}
        return list(jobs.values())


def make_plan(study: Study, runs: Path) -> Plan:
    """Unfold a study, solve the matches and make the jobs.

    Raises:
        UserError: for any combination that cannot be built or matched.
    """
    expansion: Expansion = expand(study)
    check_primary(study, expansion)
    check_probes(expansion)
    if study.plugins:
        own = [each.config for each in expansion.subjects if isinstance(each.config, SubjectConfig)]
        check_own_mixers(config.model.unmatched() for config in own)
    # Items must be the same for every subject, whatever context it was trained at.
    context = _items_context(study, expansion)
    subjects = [_plan_subject(subject, runs, study.plugins, context) for subject in expansion.subjects]
    waiting = [planned for planned in subjects if planned.training_flops and _is_due(planned.train, runs)]
    notes = list(expansion.merged)
    seconds = 0.0
    if waiting:
        shares = [planned.validation_share(runs) for planned in waiting]
        pending = sum(
            planned.training_flops * (1 + (share or 0.0)) for planned, share in zip(waiting, shares, strict=True)
        )
        seconds = pending / (matmul_rate() * ASSUMED_EFFICIENCY)
        work = "training needs" if None in shares else "training and validation need"
        beside = "validation and probes come on top" if None in shares else "probes come on top"
        notes.append(f"{work} {scaled(pending, 'FLOP')}, about {duration(seconds)} on this machine; {beside}")
    return Plan(study, subjects, notes, seconds, context, tuple(expansion.merged))


def _is_due(job: Job, runs: Path) -> bool:
    return not job.is_done(runs) and not failure(job, runs)


def _items_context(study: Study, expansion: Expansion) -> int:
    """Tokens of the items, the same for every subject."""
    contexts = [study.context] if study.context else []
    contexts += [each.config.training.context for each in expansion.subjects if isinstance(each.config, SubjectConfig)]
    if not contexts:
        raise UserError(
            "nothing is trained, so no training context says how long the items are",
            "a number of tokens in `probe_context`",
            "add `probe_context: 1024`",
        )
    return max(contexts)


def _plan_subject(subject: Subject, runs: Path, plugins: tuple[str, ...], context: int) -> PlannedSubject:
    probes = pinned_probes(subject.config.make_probes(), runs / DOWNLOADS)
    subject = replace(subject, config=subject.config.model_copy(update={"probes": probes}))
    config = subject.config
    if isinstance(config, ExaminedConfig):
        return _plan_examined(subject, config, runs, plugins, context)
    prepare = _prepare_job(config.corpus, config.tokenizer, runs, plugins)
    vocab_size = prepare.result(runs)["vocab_size"] if prepare.is_done(runs) else _vocab_size(config.tokenizer)
    model, match = match_model(config, vocab_size)
    packing = config.packing.model_dump(mode="json")
    # A user's own mixer or probe is part of what a job computes; studies without one keep their keys.
    code = {"plugins": [sha256_file(Path(plugin)) for plugin in plugins]} if plugins else {}
    places = {"prepare": prepare.folder(runs).name, "plugins": list(plugins)}
    train = Job(
        "train",
        f"train {subject.who}",
        {
            "model": model.model_dump(mode="json"),
            "vocab_size": vocab_size,
            "packing": packing,
            "training": config.training.model_dump(mode="json"),
            **code,
        },
        needs=(prepare.key,),
        details={
            **places,
            "tracking": config.tracking.model_dump(mode="json"),
            "graph": config.training.graph,
            "processes": config.training.processes,
            "parallel": config.training.parallel,
        },
    )
    shared = {"model": train.specification["model"], "packing": packing, **code}
    probes = _probe_jobs(subject, train, runs, places, shared, context, config.training.context)
    return PlannedSubject(subject, model, vocab_size, match, prepare, train, probes, config.training.context)


def _plan_examined(
    subject: Subject, config: ExaminedConfig, runs: Path, plugins: tuple[str, ...], context: int
) -> PlannedSubject:
    config = config.model_copy(update={"source": pinned(config.source, runs / DOWNLOADS)})
    subject = replace(subject, config=config)
    found = examine(config.source)
    prepare = _prepare_job(config.corpus, found.tokenizer, runs, plugins)
    # How it was trained is how it is asked.
    kept = {"markers": found.markers, "isolation": found.isolation}
    packing = config.packing.model_copy(update=kept).model_dump(mode="json")
    places = {
        "prepare": prepare.folder(runs).name,
        "plugins": list(plugins),
        "source": config.source.model_dump(mode="json", exclude_defaults=True),
    }
    kind: Kind = "import" if found.elsewhere is None else "check"
    load = Job(
        kind, f"{kind} {subject.who}", {"source": found.fingerprint, **kept}, needs=(prepare.key,), details=places
    )
    model = None if found.model is None else found.model.model_dump(mode="json")
    shared = {"model": model, "packing": packing, "asked": config.source.asked_how()}
    probes = _probe_jobs(subject, load, runs, places, shared, context, found.context)
    return PlannedSubject(
        subject, found.model, found.vocab_size, None, prepare, load, probes, found.context, found.elsewhere
    )


def _prepare_job(
    corpus: CorpusConfig | TaskCorpus, tokenizer: TokenizerConfig, runs: Path, plugins: tuple[str, ...]
) -> Job:
    return Job(
        "prepare",
        "prepare corpus",
        {"corpus": corpus.fingerprint(runs / DOWNLOADS), "tokenizer": tokenizer_fingerprint(tokenizer)},
        # Where the inputs lie is not part of what they are.
        details={
            "plugins": list(plugins),
            # As written: settings that exclude each other are told apart by what was given.
            "corpus": corpus.model_dump(mode="json", exclude_unset=True),
            "tokenizer": tokenizer.model_dump(mode="json", exclude_unset=True),
        },
    )


def _probe_jobs(
    subject: Subject,
    weights: Job,
    runs: Path,
    places: dict[str, Any],
    shared: dict[str, Any],
    context: int,
    trained_context: int | None,
) -> dict[str, Job]:
    """name in the study → job."""
    asked = {
        **shared,
        "seed": subject.seed,
        "weights": subject.stored_weights,
        "context": context,
        "trained_context": trained_context,
    }
    probes = subject.config.make_probes()
    return {
        name: Job(
            "probe",
            f"{name} {subject.who}",
            # How answers are read is no part of what is asked.
            {**asked, "probe": probe.protocol(), "name": name},
            needs=(weights.key,),
            details={
                **places,
                "train": weights.folder(runs).name,
                "name": name,
                "subject": subject.label,
                "settings": probe.model_dump(mode="json"),
            },
        )
        for name, probe in probes.items()
    }


def _vocab_size(tokenizer: TokenizerConfig) -> int:
    """Rows the model needs: known from the settings, or from the file of a pretrained tokenizer."""
    return train_tokenizer(tokenizer, ()).vocab_size if tokenizer.kind == "pretrained" else tokenizer.vocab_size


def describe_mixers(mixers: tuple[str, ...]) -> str:
    """`2 × attention, 2 × mamba2` in the order of first appearance."""
    return ", ".join(f"{mixers.count(name)} × {name}" for name in dict.fromkeys(mixers))
