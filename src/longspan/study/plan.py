"""What a study will do, before it does it: subjects, their match, their cost, and the jobs in order."""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from longspan.corpus.tokenizer import TokenizerConfig, tokenizer_fingerprint, train_tokenizer
from longspan.foundation.config import unknown_key
from longspan.foundation.errors import UserError
from longspan.foundation.files import sha256_file
from longspan.models.budget import Parameters, count_parameters, training_flops_per_token
from longspan.models.config import ModelConfig
from longspan.report.numbers import duration, relative, scaled
from longspan.study.expand import Expansion, Match, Subject, expand, match_model
from longspan.study.jobs import DOWNLOADS, Job
from longspan.study.schema import DEFAULT_PRIMARY, Study
from longspan.training.config import TrainingConfig

ASSUMED_EFFICIENCY = 0.35
"""Share of the measured matmul rate that a training step reaches; only for the predicted time."""


@dataclass(frozen=True)
class PlannedSubject:
    """A subject with its model solved and its jobs made."""

    subject: Subject
    model: ModelConfig
    vocab_size: int
    match: Match | None
    prepare: Job
    train: Job
    probes: dict[str, Job]

    @cached_property
    def parameters(self) -> Parameters:
        """Parameters by part."""
        return count_parameters(self.model, self.vocab_size)

    @property
    def mixers(self) -> tuple[str, ...]:
        """True mixer name of every layer."""
        return tuple(self.model.mixer(letter)[0].name for letter in self.model.layers())

    @cached_property
    def training_flops(self) -> float:
        """FLOPs of the whole training run (3 × forward, recomputation not counted)."""
        training = self.subject.config.training
        return training_flops_per_token(self.model, self.vocab_size, training.context) * trained_tokens(training)


@dataclass(frozen=True)
class Plan:
    """A study unfolded: its subjects with their jobs, and the table that a person sees first."""

    study: Study
    subjects: list[PlannedSubject]
    notes: list[str]
    seconds: float

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
                    describe_mixers(first.mixers),
                    scaled(first.parameters.total),
                    scaled(first.parameters.non_embedding),
                    residual,
                    scaled(trained_tokens(first.subject.config.training)),
                    scaled(first.training_flops),
                )
            )
        return rows

    def arms(self) -> dict[str, list[PlannedSubject]]:
        """label → its subjects, one a seed."""
        arms: dict[str, list[PlannedSubject]] = {}
        for planned in self.subjects:
            arms.setdefault(planned.subject.label, []).append(planned)
        return arms

    def jobs_until(self, stage: Literal["prepare", "train", "probe", "report"]) -> list[Job]:
        """All jobs up to a stage, each once, each after those it needs."""
        jobs = {planned.prepare.key: planned.prepare for planned in self.subjects}
        if stage != "prepare":
            jobs |= {planned.train.key: planned.train for planned in self.subjects}
        if stage in ("probe", "report"):
            jobs |= {job.key: job for planned in self.subjects for job in planned.probes.values()}
        return list(jobs.values())


def make_plan(study: Study, runs: Path) -> Plan:
    """Unfold a study, solve the matches and make the jobs.

    Raises:
        UserError: for any combination that cannot be built or matched.
    """
    expansion: Expansion = expand(study)
    _check_primary(study, expansion)
    # Items must be the same for every subject, whatever context it was trained at.
    context = max(subject.config.training.context for subject in expansion.subjects)
    subjects = [_plan_subject(subject, runs, study.plugins, context) for subject in expansion.subjects]
    pending = sum(planned.training_flops for planned in subjects if not planned.train.is_done(runs))
    notes = list(expansion.merged)
    seconds = pending / (matmul_rate() * ASSUMED_EFFICIENCY) if pending else 0.0
    if pending:
        notes.append(
            f"training needs {scaled(pending, 'FLOP')}, about {duration(seconds)} on this machine; probes come on top"
        )
    return Plan(study, subjects, notes, seconds)


def _check_primary(study: Study, expansion: Expansion) -> None:
    """Refuse a primary metric that no probe of quality measures and compares (where the study has probes at all)."""
    metrics = {
        f"{name}.{metric.name}"
        for subject in expansion.subjects[:1]
        for name, probe in subject.config.make_probes().items()
        if probe.place == "quality"
        for metric in probe.metrics
        if metric.compare
    }
    if metrics and study.primary not in metrics and study.primary != DEFAULT_PRIMARY:
        error = unknown_key(f"primary: {study.primary}", study.primary, metrics)
        raise UserError(f"primary = {study.primary!r}", error.allowed, error.fix)


def _plan_subject(subject: Subject, runs: Path, plugins: tuple[str, ...], context: int) -> PlannedSubject:
    config = subject.config
    prepare = Job(
        "prepare",
        "prepare corpus",
        {
            "corpus": config.corpus.fingerprint(runs / DOWNLOADS),
            "tokenizer": tokenizer_fingerprint(config.tokenizer),
        },
        # Where the inputs lie is not part of what they are.
        details={
            "plugins": list(plugins),
            # As written: settings that exclude each other are told apart by what was given.
            "corpus": config.corpus.model_dump(mode="json", exclude_unset=True),
            "tokenizer": config.tokenizer.model_dump(mode="json", exclude_unset=True),
        },
    )
    vocab_size = prepare.result(runs)["vocab_size"] if prepare.is_done(runs) else _vocab_size(config.tokenizer)
    model, match = match_model(config, vocab_size)
    packing = config.packing.model_dump(mode="json")
    # A user's own mixer or probe is part of what a job computes; studies without one keep their keys.
    code = {"plugins": [sha256_file(Path(plugin)) for plugin in plugins]} if plugins else {}
    who = f"{subject.label} seed {subject.seed}"
    places = {"prepare": prepare.folder(runs).name, "plugins": list(plugins)}
    train = Job(
        "train",
        f"train {who}",
        {
            "model": model.model_dump(mode="json"),
            "vocab_size": vocab_size,
            "packing": packing,
            "training": config.training.model_dump(mode="json"),
            **code,
        },
        needs=(prepare.key,),
        details={**places, "tracking": config.tracking.model_dump(mode="json")},
    )
    shared: dict[str, Any] = {
        "model": model.model_dump(mode="json"),
        "packing": packing,
        "seed": subject.seed,
        "weights": config.weights,
        "context": context,
        "trained_context": config.training.context,
        **code,
    }
    probes = {
        name: Job(
            "probe",
            f"{name} {who}",
            # How answers are read is no part of what is asked.
            {**shared, "probe": probe.protocol(), "name": name},
            needs=(train.key,),
            details={
                **places,
                "train": train.folder(runs).name,
                "name": name,
                "subject": subject.label,
                "settings": probe.model_dump(mode="json"),
            },
        )
        for name, probe in config.make_probes().items()
    }
    return PlannedSubject(subject, model, vocab_size, match, prepare, train, probes)


def trained_tokens(training: TrainingConfig) -> int:
    """Positions trained on, whole steps."""
    return training.num_steps * training.batch_tokens


def _vocab_size(tokenizer: TokenizerConfig) -> int:
    """Rows the model needs: known from the settings, or from the file of a pretrained tokenizer."""
    return train_tokenizer(tokenizer, ()).vocab_size if tokenizer.kind == "pretrained" else tokenizer.vocab_size


def describe_mixers(mixers: tuple[str, ...]) -> str:
    """`2 × attention, 2 × mamba2` in the order of first appearance."""
    return ", ".join(f"{mixers.count(name)} × {name}" for name in dict.fromkeys(mixers))


def matmul_rate() -> float:
    """FLOP/s of a dense fp32 (CPU) or bf16 (CUDA) matrix product, measured in about 0.1 s."""
    import torch

    cuda = torch.cuda.is_available()
    size = 4096 if cuda else 512
    a = torch.ones(size, size, device="cuda" if cuda else "cpu", dtype=torch.bfloat16 if cuda else torch.float32)
    a.normal_(generator=torch.Generator(a.device).manual_seed(0))
    repeats = 20
    a @ a
    if cuda:
        torch.cuda.synchronize()
    started = time.perf_counter()
    for _ in range(repeats):
        product = a @ a
    if cuda:
        torch.cuda.synchronize()
    del product
    rate = 2 * size**3 * repeats / (time.perf_counter() - started)
    return rate * max(torch.cuda.device_count(), 1)
