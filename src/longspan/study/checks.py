"""What a study is refused for before anything is prepared: a primary metric or a probe that comes to nothing."""

from __future__ import annotations

from typing import Any

from longspan.corpus.tasks.corpus import TaskCorpus
from longspan.foundation.config import did_you_mean
from longspan.foundation.errors import UserError
from longspan.probes.base import Probe
from longspan.study.expand import Expansion
from longspan.study.schema import DEFAULT_PRIMARY, Study


def check_primary(study: Study, expansion: Expansion) -> None:
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
        fix = did_you_mean(study.primary, metrics, "name one of these")
        raise UserError(f"primary = {study.primary!r}", ", ".join(sorted(metrics)), fix)


def check_probes(expansion: Expansion) -> None:
    """Refuse probes that can draw no item from their corpus, as far as that is known before it is prepared.

    Raises:
        UserError: with the name that the study gave the probe.
    """
    checked: list[tuple[Probe, Any]] = []
    for subject in expansion.subjects:
        corpus = subject.config.corpus
        task = corpus.task if isinstance(corpus, TaskCorpus) else None
        for name, probe in subject.config.make_probes().items():
            if (probe, task) in checked:
                continue
            checked.append((probe, task))
            try:
                probe.check_task(task)
            except UserError as error:
                raise UserError(f"probes.{name}: {error.given}", error.allowed, error.fix) from None
