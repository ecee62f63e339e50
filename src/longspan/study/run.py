"""From a study's name to its report: plan, execute what is missing, collect, write."""

from __future__ import annotations

import shlex
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Protocol

from longspan.corpus.prepare import PreparedCorpus
from longspan.engines.run_index import ListedRun, list_runs
from longspan.foundation.errors import LongspanError, UserError
from longspan.foundation.files import DEFAULT_RUNS, digest
from longspan.foundation.machine import num_launched
from longspan.foundation.progress import Progress
from longspan.probes.base import make_probe
from longspan.records.store import RECORDS, RecordStore
from longspan.report.numbers import duration, scaled, share
from longspan.study.asked import letting_go
from longspan.study.environment import devices
from longspan.study.executors.base import Executor
from longspan.study.executors.local import LocalExecutor
from longspan.study.executors.processes import processes_of
from longspan.study.failures import known_failures, standing, told
from longspan.study.jobs import DONE, Job
from longspan.study.plan import Plan, PlannedSubject, make_plan
from longspan.study.preflight import check_machine
from longspan.study.run_folder import claim_study_folder, study_folder
from longspan.study.schema import load_study
from longspan.study.stages import open_corpus, probe_data

Stage = Literal["prepare", "train", "probe", "report"]
STAGES: tuple[Stage, ...] = ("prepare", "train", "probe", "report")
SHOWN_MISSING = 3
"""Missing jobs that a report of an unfinished study names."""


class Observer(Protocol):
    """Whoever shows a run to a person."""

    def plan(self, plan: Plan) -> None:
        """Show the plan before anything runs."""

    def observe(self, job: Job, progress: Progress) -> None:
        """Show the progress of a job; may raise `Stopped`."""

    def finished(self, job: Job, text: str) -> None:
        """Say that a job is done."""

    def failed(self, job: Job, text: str) -> None:
        """Say that a job failed and the others go on."""

    def line(self, text: str) -> None:
        """Print one line that stays."""


@dataclass(frozen=True)
class Outcome:
    """What a command ends with: a table for people, lines below it, the same as data, and what failed."""

    columns: tuple[str, ...] = ()
    rows: list[tuple[str, ...]] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)
    data: dict[str, Any] = field(default_factory=dict)
    error: LongspanError | None = None

    def to_json(self) -> dict[str, Any]:
        """One JSON object."""
        return self.data


def run_study(
    name: str, overrides: Iterable[str], runs: Path, *, until: Stage, terminal: Observer, side_by_side: int = 1
) -> Outcome:
    """Run a study up to a stage; only what is missing runs.

    Args:
        name: a shipped study, or the path of a study file.
        overrides: `key=value` of the command line.
        runs: folder of all runs.
        until: the last stage that runs.
        terminal: told of the plan and of every job.
        side_by_side: jobs at a time where there is no GPU; what a probe measures in seconds is measured alone.

    Returns:
        What was done; where subjects failed, that of the others, and the error to end with.

    Raises:
        UserError: for anything wrong with the study file or the data.
        LongspanError: every subject failed.
        Stopped: the person asked to stop; the same command goes on.
    """
    started = time.monotonic()
    study = load_study(name, overrides)
    places = _places(side_by_side)
    plan = make_plan(study, runs)
    check_machine(plan, runs, until=until, devices=places)
    terminal.plan(plan)
    folder = study_folder(study, runs)
    if moved := claim_study_folder(study, folder):
        terminal.line(f"note: {moved}")
    list_runs(folder, (listed(planned, runs) for planned in plan.subjects))
    jobs = plan.jobs_until(until)
    first = [job for job in jobs if side_by_side == 1 or not is_timed(job)]
    if any(processes_of(job) > 1 for job in jobs):
        # Probes would wait for as many devices as a training takes.
        first = plan.jobs_until("prepare" if until == "prepare" else "train")
    done_before = [job for job in jobs if job.is_done(runs)]
    if done_before:
        terminal.line(f"{len(done_before)} of {len(jobs)} jobs were done before")

    def finished(job: Job, result: dict[str, Any]) -> None:
        terminal.finished(job, headline(job, result))

    failed: list[tuple[Job, str]] = []

    def lost(job: Job, reason: str) -> None:
        failed.append((job, reason))
        terminal.failed(job, reason)

    def run_all(executor: Executor, jobs: list[Job]) -> None:
        left = standing(jobs, [job.key for job, _ in failed])
        executor.run(left, runs, terminal.observe, finished, lost)

    with letting_go(), _executor(places) as executor:
        run_all(executor, plan.jobs_until("prepare"))
        if until != "prepare":
            check_items(plan, runs)
        run_all(executor, first)
        if until in ("probe", "report"):
            for text in forget_stale_probes(plan, runs):
                terminal.line(f"note: {text}")
        alone = executor if side_by_side == 1 else LocalExecutor(devices())
        run_all(alone, jobs)
    seconds = time.monotonic() - started
    error = told(failed, runs) if failed else None
    if until != "report":
        outcome = _stage_outcome(standing(jobs, [job.key for job, _ in failed]), runs, seconds)
    else:
        plan = _without(plan, failed, runs)
        if error is not None and not plan.subjects:
            raise error
        outcome = _write_report(plan, runs, folder, name, seconds, _notes(failed))
    if error is not None:
        outcome.data["failed"] = {job.title: reason for job, reason in failed}
    return replace(outcome, error=error)


def _places(side_by_side: int) -> list[str]:
    """The devices that jobs run on, once for each job at a time; with torchrun this process's own.

    Raises:
        UserError: more jobs at a time than there is room for.
    """
    if num_launched() == 1:
        return devices(side_by_side)
    if side_by_side > 1:
        raise UserError(f"--jobs {side_by_side} with torchrun", "one job at a time, in all processes", "leave it out")
    from longspan.study.executors.torchrun import own_device

    return [own_device()]


@contextmanager
def _executor(places: Sequence[str]) -> Iterator[Executor]:
    """All devices of this machine, or the processes that torchrun started."""
    if num_launched() > 1:
        from longspan.study.executors.torchrun import leading

        with leading() as executor:
            yield executor
    else:
        yield LocalExecutor(places)


def listed(planned: PlannedSubject, runs: Path) -> ListedRun:
    """What the study's folder says of a subject, so that its run can be named by what the study varies."""
    subject = planned.subject
    return ListedRun(subject.label, subject.factors, subject.seed, planned.train.folder(runs))


def is_timed(job: Job) -> bool:
    """Whether a job measures seconds, which other work beside it would change."""
    return job.kind == "probe" and make_probe(job.specification["name"], job.details["settings"]).place == "cost"


def check_items(plan: Plan, runs: Path) -> None:
    """Draw every probe's items before anything is trained, so that a test split that cannot serve is refused now.

    Raises:
        UserError: too few or too short documents, with the numbers and what to do.
    """
    asked = set()
    corpora: dict[str, PreparedCorpus] = {}
    for planned in plan.subjects:
        for job in planned.probes.values():
            question = digest([planned.prepare.key, job.details["settings"], job.specification["context"]])
            if question in asked or job.is_done(runs):
                continue
            asked.add(question)
            if planned.prepare.key not in corpora:
                corpora[planned.prepare.key] = open_corpus(planned.prepare.folder(runs))
            data = probe_data(job, corpora[planned.prepare.key])
            name = job.specification["name"]
            try:
                make_probe(name, job.details["settings"]).items(data)
            except UserError as error:
                raise UserError(f"probes.{name}: {error.given}", error.allowed, error.fix) from None


def forget_stale_probes(plan: Plan, runs: Path) -> list[str]:
    """Take the completion marker from probe jobs that lost answers, or asked other weights than those there are now.

    Returns:
        A line for each, for the terminal.
    """
    lines = []
    for planned in plan.subjects:
        if not planned.train.is_done(runs):
            continue
        weights = planned.train.result(runs)["weights"].get(planned.subject.stored_weights)
        for job in planned.probes.values():
            if not job.is_done(runs):
                continue
            reason = f"{job.title} has lost {lost} answers: asked again" if (lost := lost_answers(job, runs)) else ""
            if job.result(runs)["weights"] != weights:
                reason = f"{job.title} asked other weights than those of {planned.train.title} now: asked again"
            if reason:
                (job.folder(runs) / DONE).unlink()
                lines.append(reason)
    return lines


def lost_answers(job: Job, runs: Path) -> int:
    """How many answers of a finished probe job are not in its records any more."""
    result = job.result(runs)
    asked: int = result["items"]
    kept: int = sum(record.fingerprint == result["fingerprint"] for record in RecordStore(job.folder(runs) / RECORDS))
    return max(0, asked - kept)


def report_only(name: str, overrides: Iterable[str], runs: Path) -> Outcome:
    """Write the report of a study from its records; of an unfinished study, of what is there, saying what is missing.

    Raises:
        UserError: no subject is trained yet; names the command that goes on.
    """
    study = load_study(name, overrides)
    plan = make_plan(study, runs)
    command = command_line(name, study.overrides, runs)
    jobs = plan.jobs_until("report")
    failed = known_failures(jobs, runs)
    missing = [job for job in standing(jobs, [job.key for job, _ in failed]) if not _is_whole(job, runs)]
    if failed:
        plan = _without(plan, failed, runs)
        if not plan.subjects and not missing:
            raise told(failed, runs)
    notes = _notes(failed)
    if missing:
        finished = _finished_part(plan, runs)
        said = f"{len(missing)} of {len(jobs)} jobs of {study.name} are not done in {runs}"
        lost = next((job for job in missing if job.is_done(runs)), None)
        if lost is not None or not finished.subjects:
            # Answers that were there and are gone are no part that is still to come.
            allowed = "records that are whole" if lost is not None else "a study with a subject that is trained"
            raise UserError(f"{said}, first `{(lost or missing[0]).title}`", allowed, command)
        titles = ", ".join(job.title for job in missing[:SHOWN_MISSING])
        more = f" and {len(missing) - SHOWN_MISSING} more" if len(missing) > SHOWN_MISSING else ""
        notes.insert(0, f"Unfinished: {said}; missing are {titles}{more}. `{command}` goes on.")
        plan = finished
    folder = study_folder(study, runs)
    moved = claim_study_folder(study, folder)
    outcome = _write_report(plan, runs, folder, name, 0.0, notes)
    return replace(outcome, lines=[*notes, *outcome.lines, *([f"note: {moved}"] if moved else [])])


def _is_whole(job: Job, runs: Path) -> bool:
    return job.is_done(runs) and not (job.kind == "probe" and lost_answers(job, runs))


def _without(plan: Plan, failed: Sequence[tuple[Job, str]], runs: Path) -> Plan:
    """The plan as far as it is done, where something failed, with that."""
    if not failed:
        return plan
    return replace(_finished_part(plan, runs), failed=tuple((job.title, reason) for job, reason in failed))


def _notes(failed: Sequence[tuple[Job, str]]) -> list[str]:
    return [f"Failed, so not in this report: {job.title} ({reason.splitlines()[0]})." for job, reason in failed]


def _finished_part(plan: Plan, runs: Path) -> Plan:
    """The subjects that are trained, with the probes that they were asked."""
    trained = [planned for planned in plan.subjects if planned.train.is_done(runs)]
    subjects = [
        replace(planned, probes={name: job for name, job in planned.probes.items() if _is_whole(job, runs)})
        for planned in trained
    ]
    return replace(plan, subjects=subjects)


def command_line(name: str, overrides: Iterable[str], runs: Path = DEFAULT_RUNS) -> str:
    """The command that runs a study, for a shell."""
    where = [] if runs == DEFAULT_RUNS else ["--runs", str(runs)]
    return shlex.join(["longspan", "run", name, *overrides, *where])


def _write_report(
    plan: Plan, runs: Path, folder: Path, name: str, seconds: float, notes: Sequence[str] = ()
) -> Outcome:
    from longspan.report import data as report_data
    from longspan.report.decision import decide
    from longspan.report.page import write_report
    from longspan.report.tables import summary_rows
    from longspan.study.results import collect

    facts = collect(plan, runs, command_line(name, plan.study.overrides), notes)
    report_data.save(facts, folder / "report.json")
    page = write_report(facts, folder)
    decision = decide(facts)
    table = summary_rows(facts)
    lines = [decision.answer, *decision.also, decision.certainty, f"report: {page}"]
    if seconds:
        lines.append(f"took {duration(seconds)}")
    data = {
        "study": plan.study.name,
        "answer": decision.answer,
        "verdict": decision.verdict,
        "certainty": decision.certainty,
        "report": str(page),
        "subjects": report_data.to_json(list(table.records)),
        "probes": {section.kind: report_data.to_json(section.summary) for section in facts.probes},
        "seconds": round(seconds, 1),
    }
    return Outcome(table.columns, list(table.rows), [line for line in lines if line], data)


def _stage_outcome(jobs: list[Job], runs: Path, seconds: float) -> Outcome:
    rows: list[tuple[str, ...]] = [(job.title, headline(job, job.result(runs)), str(job.folder(runs))) for job in jobs]
    data = {
        "jobs": [
            {"job": job.title, "kind": job.kind, "folder": str(job.folder(runs)), "result": job.result(runs)}
            for job in jobs
        ],
        "seconds": round(seconds, 1),
    }
    return Outcome(("<job", "<result", "<folder"), rows, [f"took {duration(seconds)}"], data)


def headline(job: Job, result: dict[str, Any]) -> str:
    """The one thing worth saying about a finished job."""
    if job.kind == "prepare":
        splits = ", ".join(
            f"{name} {facts['documents']} documents {facts['tokens']:,} tokens"
            for name, facts in result["splits"].items()
        )
        return f"{result['tokenizer']}: {splits}"
    if job.kind == "train":
        training = result["training"]
        rate = training["tokens_per_second"]
        speed = f", {scaled(rate, 'tok/s')}" if rate else ""
        if (strings := training["final"]["string_accuracy"]) is not None:
            return f"{share(strings, 1)} of strings right after {training['samples']:,} samples{speed}"
        return f"validation {training['best']['bits_per_byte']:.4f} bits/byte{speed}"
    if job.kind in ("import", "check"):
        differ = [check["name"] for check in result["oracle"] if check["verdict"] == "differs"]
        agree = f"WARNING: {', '.join(differ)} differ" if differ else "the ways of asking it agree"
        return f"weights {result['weights']['best'][:8]}, {agree}"
    return f"{result['items']} items"
