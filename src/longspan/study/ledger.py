"""What was dropped, padded, deduplicated, merged or interrupted, as entries of the report."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from longspan.corpus.prepare import PreparedCorpus
from longspan.records.store import RECORDS, RecordStore
from longspan.report.data import LedgerEntry
from longspan.study.plan import Plan

Row = dict[str, str | int | float | None]


def ledger(plan: Plan, runs: Path, prepared: dict[str, PreparedCorpus]) -> list[LedgerEntry]:
    """All entries of a study, corpus first."""
    entries = []
    for corpus in prepared.values():
        entries += corpus_entries(corpus.ledger)
    entries += [LedgerEntry("info", "subjects", note) for note in plan.merged]
    entries += _benchmarks(plan)
    entries += _oracle(plan, runs)
    entries += _packing(plan, runs)
    entries += [LedgerEntry("warning", "failed", f"{title}: {reason}") for title, reason in plan.failed]
    entries += _training(plan, runs)
    entries += _shared(plan, runs)
    entries += _not_measured(plan, runs)
    return entries


def corpus_entries(facts: dict[str, Any]) -> list[LedgerEntry]:
    """The ledger of a prepared corpus as entries."""
    if "task" in facts:
        text = "Strings of a task: training draws new ones in every step, from its seed and the number of the step."
        return [LedgerEntry("info", "corpus", text, [_flat(facts["task"])])]
    splits: list[Row] = [{"split": name, **_flat(split)} for name, split in facts["splits"].items()]
    entries = [LedgerEntry("info", "corpus", f"Tokens of {facts['tokenizer']['name']} by split.", splits)]
    dropped: list[Row] = [
        {"reason": reason, "documents": entry["documents"], "examples": ", ".join(entry["examples"][:5])}
        for reason, entry in facts["dropped"].items()
        if entry["documents"]
    ]
    seen = facts["seen"].get("documents", facts["dedup"]["documents"])
    what = "what was dropped, and why:" if dropped else "none was dropped."
    entries.append(LedgerEntry("info", "corpus", f"{seen:,} documents seen; {what}", dropped))
    if facts["cut"]["documents"]:
        text = f"{facts['cut']['documents']:,} documents cut, {facts['cut']['characters']:,} characters left out."
        entries.append(LedgerEntry("info", "corpus", text))
    dedup = facts["dedup"]
    if examples := dedup["examples"]:
        removed, across = dedup["documents"] - dedup["kept"], _total(dedup["across_splits"])
        text = f"{removed:,} duplicates removed, {across:,} across splits."
        rows: list[Row] = [_flat(example) for example in examples[:20]]
        entries.append(LedgerEntry("info", "corpus", text, rows))
    return entries


def agreement(checks: list[dict[str, Any]]) -> str:
    """Whether the ways of asking a model agree, in one line."""
    differ = [check["name"] for check in checks if check["verdict"] == "differs"]
    if differ:
        return f"ORACLE FAILED: {', '.join(differ)}"
    equal = [check["name"] for check in checks if check["verdict"] == "equal"]
    if not equal:
        return "oracle: nothing could be compared"
    # What is no difference in lower precision is measured against the rounding of the model itself.
    rounded = any(check.get("rounding") is not None for check in checks)
    return f"oracle: {', '.join(equal)}{' (within rounding)' if rounded else ''}"


def _benchmarks(plan: Plan) -> list[LedgerEntry]:
    """Which commit of a data set on the hub was asked."""
    found = {}
    for planned in plan.subjects:
        for name, probe in planned.subject.config.make_probes().items():
            if dataset := probe.hub_dataset():
                text = f"The items are those of {dataset} at commit {probe.model_dump()['revision']}."
                found[name] = LedgerEntry("info", name, text)
    return list(found.values())


def _oracle(plan: Plan, runs: Path) -> list[LedgerEntry]:
    """Whether the ways of asking each model agree; a model whose ways differ is warned about."""
    entries = []
    for planned in plan.subjects:
        result = planned.train.result(runs)
        if "oracle" not in result:
            continue
        failed = any(check["verdict"] == "differs" for check in result["oracle"])
        advice = " Do not believe its numbers before that is understood." if failed else ""
        text = f"{planned.subject.who}: {agreement(result['oracle'])}.{advice}"
        rows: list[Row] = [_flat(check) for check in result["oracle"]]
        entries.append(LedgerEntry("warning" if failed else "info", "oracle", text, rows))
        entries += [LedgerEntry("info", "oracle", f"{planned.subject.who}: {note}.") for note in result["notes"]]
    return entries


def _total(counts: Any) -> int:
    return sum(map(_total, counts.values())) if isinstance(counts, dict) else int(counts)


def _packing(plan: Plan, runs: Path) -> list[LedgerEntry]:
    rows: list[Row] = []
    for planned in plan.trained:
        facts = planned.train.result(runs)["packing"]
        rows.append({"subject": planned.subject.label, "seed": planned.subject.seed, **_flat(facts)})
    text = "What packing did with the tokens of the training split."
    return [LedgerEntry("info", "packing", text, rows)] if rows else []


def _training(plan: Plan, runs: Path) -> list[LedgerEntry]:
    entries = []
    for planned in plan.trained:
        training = planned.train.result(runs)["training"]
        who = planned.subject.who
        if training["sessions"] > 1:
            text = f"{who}: resumed, {training['sessions']} sessions; the result equals an uninterrupted run on CPU"
            entries.append(LedgerEntry("info", "training", text))
        if training["stopped_early"]:
            entries.append(LedgerEntry("info", "training", f"{who}: stopped early at step {training['steps']}"))
        if training["best"]["step"] != training["steps"]:
            text = f"{who}: the best weights are of step {training['best']['step']} of {training['steps']}"
            entries.append(LedgerEntry("info", "training", text))
    return entries


def _shared(plan: Plan, runs: Path) -> list[LedgerEntry]:
    """What was saved by computing common beginnings of prompts once, as far as engines in this process know."""
    rows: list[Row] = []
    for planned in plan.subjects:
        for name, job in planned.probes.items():
            result = job.result(runs)
            if shared := result.get("shared_tokens"):
                who: Row = {"subject": planned.subject.label, "seed": planned.subject.seed, "probe": name}
                asked = result["asked_tokens"]
                rows.append({**who, "prompt tokens": asked, "computed once": shared, "share": round(shared / asked, 3)})
    text = "Prompt tokens that were computed once for several prompts which begin alike."
    return [LedgerEntry("info", "probes", text, rows)] if rows else []


def _not_measured(plan: Plan, runs: Path) -> list[LedgerEntry]:
    """Contexts whose cost is not known, and why."""
    rows: list[Row] = []
    for planned in plan.subjects:
        # A study may give a probe another name than its kind.
        kinds = {name: probe.kind for name, probe in planned.subject.config.make_probes().items()}
        for job in (job for name, job in planned.probes.items() if kinds[name] == "efficiency"):
            asked = job.result(runs)["fingerprint"]
            for record in RecordStore(job.folder(runs) / RECORDS):
                answer = record.answer if record.fingerprint == asked else {}
                if reason := answer.get("not_evaluable") or answer.get("not_counted"):
                    rows.append({"subject": planned.subject.who, "context": answer["context"], "reason": reason})
    return [LedgerEntry("info", "probes", "Contexts whose cost was not measured.", rows)] if rows else []


def _flat(facts: dict[str, Any], prefix: str = "") -> Row:
    row: Row = {}
    for key, value in facts.items():
        if isinstance(value, dict):
            row |= _flat(value, f"{prefix}{key} ")
        elif isinstance(value, str | int | float) or value is None:
            row[f"{prefix}{key}".strip()] = value
    return row
