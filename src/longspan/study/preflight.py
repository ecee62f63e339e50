"""What this machine lacks for a study, found before anything of it is prepared: devices, packages, folders, room."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from longspan.engines import graphs
from longspan.engines.source import VllmArguments
from longspan.engines.vllm import find_python
from longspan.foundation.errors import MachineError, UserError
from longspan.foundation.extras import require
from longspan.foundation.machine import num_launched
from longspan.probes.base import make_probe
from longspan.report.numbers import byte_size
from longspan.study.executors.local import places_for
from longspan.study.executors.processes import processes_of, together
from longspan.study.jobs import Job
from longspan.study.plan import Plan, PlannedSubject
from longspan.study.sections import SubjectConfig

BYTES_KEPT, BYTES_REPLACED = 16, 12
"""For each parameter in fp32: a run keeps its best weights, and its last with two moments, which are replaced whole."""


def check_machine(
    plan: Plan, runs: Path, *, until: Literal["prepare", "train", "probe", "report"], devices: Sequence[str]
) -> None:
    """Refuse what would fail here after the corpus is prepared, perhaps hours from now.

    Args:
        plan: of the study; what is done already is not looked at.
        runs: folder of all runs.
        until: the last stage that is to run.
        devices: that jobs run on, once for each at a time.

    Raises:
        UserError: a setting that this machine cannot honour, or a package that is missing.
        MachineError: a folder that cannot be written, or too little room.
    """
    _check_folders(runs)
    for planned in plan.subjects:
        _check_preparing(planned, runs)
    if until == "prepare":
        return
    if all(job.is_done(runs) for job in plan.jobs_until(until)):
        return
    _check_environment(devices)
    due = [planned for planned in plan.subjects if not planned.train.is_done(runs)]
    for planned in due:
        _check_training(planned, devices)
    _check_room(due, runs)
    if until == "train":
        return
    for planned in plan.subjects:
        _check_asking(planned, [job for job in planned.probes.values() if not job.is_done(runs)])


def _check_folders(runs: Path) -> None:
    """Jobs and downloads are written under the folder of all runs."""
    for folder in (runs / "jobs", runs / "downloads"):
        there = next(each for each in (folder.absolute(), *folder.absolute().parents) if each.exists())
        if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
            problem = "cannot be written" if there.is_dir() else "is a file"
            raise MachineError(
                f"--runs {runs}: {there} {problem}",
                "a folder that can be made and written",
                "change its permissions, or choose another folder with --runs",
            )


def _check_preparing(planned: PlannedSubject, runs: Path) -> None:
    if planned.prepare.is_done(runs):
        return
    if planned.prepare.details["tokenizer"].get("kind") == "sentencepiece":
        require("sentencepiece")


def _check_training(planned: PlannedSubject, devices: Sequence[str]) -> None:
    """Whether the devices can train a subject as its settings demand."""
    training, config = planned.training, planned.subject.config
    if training is None or planned.model is None or planned.vocab_size is None:
        return
    assert isinstance(config, SubjectConfig)
    import torch

    from longspan.models.language_model import LanguageModel
    from longspan.training.compilation import check_compiler
    from longspan.training.micro_steps import why_no_graph
    from longspan.training.precision import resolve_dtype
    from longspan.training.trackers import make_trackers

    _check_processes(planned.train, devices)
    device = torch.device(devices[0])
    resolve_dtype(training.dtype, device)
    if training.graph is True:
        model = LanguageModel(planned.model, planned.vocab_size, device="meta")
        why_no_graph(True, model, device)
    if training.compile is True:
        check_compiler(device)
    make_trackers(config.tracking, planned.subject.who)


def _check_processes(job: Job, devices: Sequence[str]) -> None:
    """What the executors would say of a training when its turn comes."""
    if num_launched() > 1:
        from longspan.study.executors.torchrun import check_processes

        check_processes(job, num_launched())
    else:
        together(job, places_for(devices, processes_of(job))[0])


def _check_room(due: Sequence[PlannedSubject], runs: Path) -> None:
    """Refuse to begin trainings whose checkpoints the disk cannot hold."""
    new = [planned for planned in due if planned.training and not planned.train.folder(runs).exists()]
    sizes = [planned.parameters.total for planned in new if planned.parameters]
    needed = BYTES_KEPT * sum(sizes) + BYTES_REPLACED * max(sizes, default=0)
    there = next(each for each in (runs.absolute(), *runs.absolute().parents) if each.exists())
    free = shutil.disk_usage(there).free
    if needed > free:
        raise MachineError(
            f"{byte_size(free)} free under {runs}; the checkpoints of {len(sizes)} trainings take {byte_size(needed)}",
            "room for them, and for the corpus beside them",
            "free some space, choose a folder on another disk with --runs, or run a part of the study at a time",
        )


def _check_environment(devices: Sequence[str]) -> None:
    """The variables that ops and decoding follow."""
    import torch

    from longspan.ops import kernels

    graphs.choice()
    kernels.wanted(torch.device(devices[0]))


def _check_asking(planned: PlannedSubject, jobs: Sequence[Job]) -> None:
    """What a subject's engine needs, and what its probes say of their settings and files without a corpus."""
    if jobs and planned.elsewhere is not None:
        source = planned.elsewhere.source
        if source.engine in ("openai", "vllm"):
            require("endpoint")
        arguments = source.engine_arguments()
        if isinstance(arguments, VllmArguments):
            find_python(arguments)
    for job in jobs:
        name = job.specification["name"]
        try:
            make_probe(name, job.details["settings"]).check_before(job.specification["context"])
        except UserError as error:
            error.given = f"probes.{name}: {error.given}"
            raise
