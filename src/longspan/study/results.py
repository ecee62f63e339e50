"""From job directories to the facts of a report: reads records and metrics, needs no model."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from longspan.corpus.prepare import PreparedCorpus
from longspan.engines.source import ModelSource
from longspan.engines.trained_run import TRAINING
from longspan.foundation.files import digest, read_json
from longspan.models.budget import Parameters, forward_flops_per_token, state_bytes
from longspan.models.config import ModelConfig
from longspan.probes.base import Probe
from longspan.records.observation import Metric, Observation, Summary, summarise
from longspan.records.store import RECORDS, Record, RecordStore
from longspan.report.data import (
    ItemAnswer,
    ItemRow,
    ParameterFacts,
    ProbeSection,
    ReportInput,
    Reproduce,
    SubjectFacts,
    TrainingCurve,
)
from longspan.study.jobs import DONE, finished_job
from longspan.study.ledger import agreement, ledger
from longspan.study.plan import Plan, PlannedSubject
from longspan.study.predicted_time import trained_tokens
from longspan.study.run_folder import resolved_yaml
from longspan.study.sections import ExaminedConfig
from longspan.study.stages import open_corpus, probe_data
from longspan.training.metrics import read_metrics

COST_CONTEXTS = tuple(2**power for power in range(8, 18))
"""256 to 131,072 tokens: where state bytes and FLOPs per token are shown."""
REPLY_SHOWN = 240
"""Characters of a reply that a reader of the report sees."""
ITEMS_SHOWN = 40
"""Items of each probe that a reader of the report can look into."""


def collect(plan: Plan, runs: Path, command: str, notes: Sequence[str] = ()) -> ReportInput:
    """All that the report shows, from the records of finished jobs; `notes` stand before its own."""
    prepared = {
        planned.prepare.key: open_corpus(planned.prepare.folder(runs), verify=False) for planned in plan.subjects
    }
    sections, items = [], []
    for name in dict.fromkeys(name for planned in plan.subjects for name in planned.probes):
        section, rows = _probe(plan, runs, name, prepared)
        sections.append(section)
        items += rows
    return ReportInput(
        study=plan.study.name,
        variant=plan.study.variant,
        question=" ".join(plan.study.question.split()),
        created=max(_finished(job.folder(runs)) for job in plan.jobs_until("report")),
        subjects=[_subject(label, arm, runs) for label, arm in plan.arms().items()],
        probes=sections,
        primary=plan.study.primary,
        training=[_curve(planned, runs) for planned in plan.trained],
        ledger=ledger(plan, runs, prepared),
        items=items,
        notes=[*notes, *_notes(plan, runs)],
        context=next((each.training.context for each in plan.subjects if each.training), plan.context),
        tokenizer=", ".join(dict.fromkeys(corpus.tokenizer.name for corpus in prepared.values())),
        reproduce=Reproduce(
            command=command,
            study_yaml=resolved_yaml(plan.study),
            **_made_by(plan, runs),
            hashes=_hashes(plan, runs),
        ),
    )


def _made_by(plan: Plan, runs: Path) -> dict[str, dict[str, str]]:
    """Versions, hardware and git state of the jobs that made the numbers; several values where jobs differ."""
    made: dict[str, dict[str, dict[str, None]]] = {}
    for job in plan.jobs_until("report"):
        for section, facts in read_json(job.folder(runs) / DONE)["environment"].items():
            for key, value in facts.items():
                made.setdefault(section, {}).setdefault(key, {})[value] = None
    return {section: {key: " / ".join(values) for key, values in facts.items()} for section, facts in made.items()}


def _finished(folder: Path) -> str:
    return str(read_json(folder / DONE)["finished"])


def _subject(label: str, arm: Sequence[PlannedSubject], runs: Path) -> SubjectFacts:
    first = arm[0]
    facts = _model_facts(label, first, runs)
    if first.training is None:
        return facts
    results = [planned.train.result(runs)["training"] for planned in arm]
    rates = [result["tokens_per_second"] for result in results if result["tokens_per_second"]]
    # Early stopping may have ended a run before its budget.
    tokens = statistics.mean(result["tokens"] for result in results)
    return replace(
        facts,
        training_flops=first.training_flops * tokens / trained_tokens(first.training),
        tokens_trained=round(tokens),
        tokens_per_second=statistics.median(rates) if rates else None,
        peak_memory_bytes=max(result["peak_memory_bytes"] for result in results),
        peak_memory_of=results[0]["peak_memory_of"],
        match_quantity=first.match.quantity if first.match else "",
        match_target=first.match.target if first.match else None,
        match_residual=first.match.residual if first.match else None,
        seeds=tuple(planned.subject.seed for planned in arm),
        device=results[0]["device"],
        dtype=results[0]["dtype"],
        best_loss=statistics.mean(result["best"]["loss"] for result in results),
        last_loss=statistics.mean(result["final"]["loss"] for result in results),
        wall_seconds=statistics.mean(result["seconds"] for result in results),
    )


def _model_facts(label: str, planned: PlannedSubject, runs: Path) -> SubjectFacts:
    """What a subject is and costs, whoever trained it."""
    counted, model = planned.parameters, planned.model
    source = planned.subject.config.source if isinstance(planned.subject.config, ExaminedConfig) else None
    facts = SubjectFacts(
        label=label,
        mixers=planned.mixers,
        kind="trained" if source is None else source.kind,
        factors=planned.subject.factors,
        parameters=None if counted is None else _parameters(counted),
        weights=planned.subject.stored_weights,
        notes="" if source is None else _asked_as(source, planned.train.result(runs)),
    )
    if model is not None:
        assert planned.vocab_size is not None
        vocab_size = planned.vocab_size
        # What is trained is counted in fp32, as everywhere; what is asked as it is, in the dtype that it runs in.
        dtype = torch.float32 if source is None or source.dtype == "fp32" else torch.bfloat16
        return replace(
            facts,
            letters="".join(model.layers()),
            state_bytes={context: float(state_bytes(model, context, dtype)) for context in COST_CONTEXTS},
            forward_flops=_forward_flops(model, vocab_size),
        )
    if planned.elsewhere and planned.elsewhere.counted_as:
        facts = replace(facts, forward_flops=_forward_flops(*planned.elsewhere.counted_as))
    shape = planned.elsewhere.shape if planned.elsewhere else None
    if shape is None:
        return facts
    assert source is not None
    size = 4 if source.dtype == "fp32" else 2
    predicted = {context: float(shape.bytes(context, size)) for context in COST_CONTEXTS}
    return replace(facts, letters=shape.letters, state_bytes=predicted, dtype=source.dtype)


def _forward_flops(model: ModelConfig, vocab_size: int) -> dict[int, float]:
    return {context: forward_flops_per_token(model, vocab_size, context) for context in COST_CONTEXTS}


def _parameters(counted: Parameters) -> ParameterFacts:
    embedding = counted.embedding + counted.head
    return ParameterFacts(counted.total, embedding, counted.non_embedding, counted.mixers, counted.mlp)


def _asked_as(source: ModelSource, result: dict[str, Any]) -> str:
    """How a model that was not trained here was asked, and whether the ways of asking it agree."""
    how = [f"engine {source.engine}", source.dtype]
    if source.template is not None:
        how.append(f"template {source.template}")
    if source.revision is not None:
        how.append(f"revision {source.revision}")
    told = [f"asked as it is: {source.place} ({', '.join(how)})", agreement(result["oracle"]), *result["notes"]]
    return "; ".join(told)


def _curve(planned: PlannedSubject, runs: Path) -> TrainingCurve:
    with finished_job(planned.train.folder(runs)) as folder:
        lines = read_metrics(folder / TRAINING / "metrics.jsonl")
    return TrainingCurve(
        subject=planned.subject.label,
        seed=planned.subject.seed,
        rows=_rows(line for line in lines if line["kind"] == "train"),
        validation=_rows(line for line in lines if line["kind"] == "validation"),
        best_step=planned.train.result(runs)["training"]["best"]["step"],
        mastery=planned.training.mastery if planned.training else None,
    )


def _rows(lines: Iterable[dict[str, Any]]) -> list[dict[str, float | None]]:
    return [{key: value for key, value in line.items() if key != "kind"} for line in lines]


def _probe(
    plan: Plan, runs: Path, name: str, prepared: dict[str, PreparedCorpus]
) -> tuple[ProbeSection, list[ItemRow]]:
    observations: list[Observation] = []
    answers: dict[str, list[tuple[PlannedSubject, Record]]] = defaultdict(list)
    runs_records: list[list[Record]] = []
    probe: Probe | None = None
    context = 0
    for planned in plan.subjects:
        if name not in planned.probes:
            continue
        probe = planned.subject.config.make_probes()[name]
        asked = planned.probes[name].result(runs)["fingerprint"]
        together = []
        for record in RecordStore(planned.probes[name].folder(runs) / RECORDS):
            if record.fingerprint != asked:
                # Of weights that were trained again since.
                continue
            # The record keeps the label it was asked under; here the arm may have another name.
            record = record.model_copy(update={"subject": planned.subject.label, "seed": planned.subject.seed})
            observations += probe.observe(record)
            together.append(record)
            if isinstance(taken := record.answer.get("context"), int):
                context = max(context, taken)
            if len(answers) < ITEMS_SHOWN or record.item in answers:
                answers[record.item].append((planned, record))
        observations += probe.observe_together(together)
        runs_records.append(together)
    assert probe is not None
    factors = {planned.subject.label: planned.subject.factors for planned in plan.subjects}
    summary = summarise(observations, probe.metrics, factors=factors) if observations else Summary((), (), (), ())
    derived = (*probe.derive(summary), *probe.derive_of_runs(runs_records))
    summary = replace(summary, measurements=(*summary.measurements, *derived))
    section = ProbeSection(
        kind=name,
        # A second probe of a kind carries the name that the study gave it.
        title=probe.title if name == probe.kind else f"{probe.title} ({name})",
        explanation=probe.explanation,
        metrics=probe.metrics,
        summary=summary,
        x_scale=probe.x_scale,
        place=probe.place,
        empty_because="" if observations else "the probe had no items",
        **_marked(plan, name, probe, prepared),
        asked_context=context or None,
        remarks=tuple(probe.remarks(summary)),
    )
    return section, _items(plan, name, probe, answers, prepared)


def _marked(plan: Plan, name: str, probe: Probe, prepared: dict[str, PreparedCorpus]) -> dict[str, Any]:
    """The x that the probe wants marked, from the first subject that was asked."""
    first = next(planned for planned in plan.subjects if name in planned.probes)
    found = probe.mark(probe_data(first.probes[name], prepared[first.prepare.key]))
    return {} if found is None else {"mark": found[0], "mark_name": found[1]}


def _items(
    plan: Plan,
    name: str,
    probe: Probe,
    answers: dict[str, list[tuple[PlannedSubject, Record]]],
    prepared: dict[str, PreparedCorpus],
) -> list[ItemRow]:
    if probe.place == "cost" or not answers:
        return []
    first = next(planned for planned in plan.subjects if name in planned.probes)
    corpus = prepared[first.prepare.key]
    data = probe_data(first.probes[name], corpus)
    items = {item.id: item for item in probe.items(data)}
    metric = probe.metrics[0]
    rows = []
    for item_id, given in answers.items():
        if item_id not in items:
            continue
        asked = probe.describe(items[item_id], data)
        contexts = {seen.x for _, record in given for seen in probe.observe(record) if seen.metric == metric.name}
        context = contexts.pop() if metric.x_name == "context" and len(contexts) == 1 else None
        found = [_answer(metric, probe, planned, record, context) for planned, record in given]
        rows.append(
            ItemRow(
                probe=name,
                item=item_id,
                x=context,
                asked=asked.asked,
                expected=asked.expected,
                answers=[answer for answer in found if answer is not None],
                correct=metric.kind == "proportion",
            )
        )
    return rows


def _answer(
    metric: Metric, probe: Probe, planned: PlannedSubject, record: Record, context: float | None
) -> ItemAnswer | None:
    """What a subject answered to an item; where that has no single `context`, its longest, or its last position."""
    seen = [each for each in probe.observe(record) if each.metric == metric.name]
    if not seen:
        return None
    # The longest context is the one a reader wants to see; an item may ask several questions there.
    end = max(each.x or 0.0 for each in seen)
    last = [each for each in seen if (each.x or 0.0) == end]
    reply = probe.reply(record)
    at = "" if last[0].x is None or context is not None else f"at {end:g}"
    return ItemAnswer(
        subject=planned.subject.label,
        seed=planned.subject.seed,
        text=": ".join(part for part in (at, " ".join(reply.text.split())[:REPLY_SHOWN]) if part),
        score=sum(each.numerator for each in last) / sum(each.denominator for each in last),
        scored=metric.title,
        null=reply.null,
    )


def _notes(plan: Plan, runs: Path) -> list[str]:
    dtypes = {planned.train.result(runs)["training"]["dtype"] for planned in plan.trained}
    if not dtypes:
        sources = [
            each.subject.config.source for each in plan.subjects if isinstance(each.subject.config, ExaminedConfig)
        ]
        used = ", ".join(sorted({source.dtype for source in sources if source.kind != "endpoint"}))
        where = _asked_on(plan, runs) if used else ""
        how = "".join(f", {word} {what}" for word, what in (("in", used), ("on", where)) if what)
        return [f"Nothing was trained: the models were asked as they are{how}."]
    return [f"Trained in {', '.join(sorted(dtypes))}; the probes ran in fp32."] if dtypes != {"fp32"} else []


def _asked_on(plan: Plan, runs: Path) -> str:
    """The devices that models in this process were asked on, several where jobs differ."""
    hardware = _made_by(plan, runs)["hardware"]
    return hardware.get("cuda:0") or f"{hardware['cores']} cores of {hardware['processor']}"


def _hashes(plan: Plan, runs: Path) -> dict[str, str]:
    hashes = {"study": digest(plan.study.resolved())}
    for planned in plan.subjects:
        who = planned.subject.who
        hashes[f"corpus {planned.prepare.key[:8]}"] = planned.prepare.key
        hashes[f"weights {who}"] = planned.train.result(runs)["weights"].get(planned.subject.stored_weights, "")
    return hashes
