"""`longspan rescore`: stored answers under another rule, without a model."""

from __future__ import annotations

import typing
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from longspan.commands.recorded_runs import Recorded, open_run
from longspan.foundation.errors import UserError
from longspan.probes.base import Probe, reader, registered
from longspan.probes.longbench_v2 import LongBenchV2
from longspan.probes.longbench_v2.extraction import Scorer
from longspan.probes.longbench_v2.scores import Score, Scores, score
from longspan.records.observation import Observation, summarise
from longspan.records.store import Record
from longspan.report.numbers import estimate, percentage
from longspan.terminal import print_json, print_table


def rescore(run: str, scorer: str | None, duplicates: str, *, json: bool) -> None:
    """Score every stored answer of a run and print what comes out.

    Args:
        run: where the records are.
        scorer: a rule of the probes' own, None for each one's default.
        duplicates: what becomes of items that were answered more than once.
        json: print one JSON object.

    Raises:
        UserError: no record of the run can be read by that rule.
    """
    recorded = open_run(run, duplicates)
    groups: dict[str, list[Record]] = defaultdict(list)
    for record in recorded.records:
        groups[str(record.protocol.get("kind"))].append(record)
    able = {kind: records for kind, records in groups.items() if scorer is None or scorer in scorers(kind)}
    if not able:
        offered = "; ".join(f"{kind}: {', '.join(scorers(kind)) or 'one rule only'}" for kind in groups)
        raise UserError(f"--scorer {scorer}", offered, "name a rule of a probe that the run holds")
    passed = [kind for kind in groups if kind not in able]
    notes = [*recorded.notes, *(f"records of {kind} have no rule `{scorer}`: left out" for kind in passed)]
    tables = [
        _LongBench(records, scorer) if kind == "longbench_v2" else _Any(records, scorer)
        for kind, records in able.items()
    ]
    if json:
        print_json(_json(recorded, scorer, duplicates, tables, notes))
        return
    for table in tables:
        table.show()
    for note in notes:
        print(f"note: {note}")


def scorers(kind: str) -> tuple[str, ...]:
    """The rules that a probe's records can be read with."""
    probe = registered().get(kind)
    field = probe.model_fields.get("scorer") if probe else None
    return typing.get_args(field.annotation) if field is not None else ()


def _json(
    recorded: Recorded, scorer: str | None, duplicates: str, tables: Sequence[_LongBench | _Any], notes: Sequence[str]
) -> dict[str, Any]:
    return {
        "run": str(recorded.run),
        "scorer": scorer,
        "duplicates": duplicates,
        "records": len(recorded.records),
        "results": [row for table in tables for row in table.to_json()],
        "notes": list(notes),
    }


class _LongBench:
    """Strict, null, answered and compensated by group, with letters and causes, for each subject and context."""

    def __init__(self, records: Sequence[Record], scorer: str | None) -> None:
        self.scorer: Scorer = LongBenchV2.model_fields["scorer"].default if scorer is None else scorer  # type: ignore[assignment]
        groups: dict[tuple[str, Any, str, bool], list[Mapping[str, Any]]] = defaultdict(list)
        self.not_evaluable = 0
        for record in records:
            if "response" not in record.answer:
                self.not_evaluable += 1
                continue
            variant = str(record.protocol.get("variant", "direct"))
            again = bool(record.protocol.get("re_ask"))
            groups[record.subject, record.answer.get("context"), variant, again].append(record.answer)
        self.scores: dict[tuple[str, Any, str, bool], Scores] = {
            key: score(answers, self.scorer, re_ask=key[3]) for key, answers in groups.items()
        }

    def to_json(self) -> list[dict[str, Any]]:
        """One object a subject, context and variant."""
        return [
            {
                "probe": "longbench_v2",
                "scorer": self.scorer,
                "subject": s,
                "context": c,
                "variant": v,
                **found.to_json(),
            }
            for (s, c, v, _), found in self.scores.items()
        ]

    def show(self) -> None:
        """Two tables a subject and context, and the two baselines."""
        columns = ("<group", "n", "right", "strict", "no answer", "on answered", "compensated")
        for (subject, context, variant, _), found in self.scores.items():
            at = "" if context is None else f", context {context:,}"
            how = "" if variant == "direct" else f", {variant}"
            print(f"{subject}{at}{how}, scorer {self.scorer}")
            print_table(columns, [self._row(each) for each in found.groups])
            letters = "  ".join(f"{name} {count}" for name, count in found.letters.items())
            gold = "  ".join(f"{name} {count}" for name, count in found.gold.items())
            causes = ", ".join(f"{cause.replace('_', ' ')} {count}" for cause, count in found.causes.items())
            letter, share = found.constant
            print(f"letters said: {letters}; right: {gold}")
            print(f"no answer because: {causes or 'every reply had one'}")
            print(f"baselines: chance 25.0 %, always {letter} {100 * share:.1f} %\n")
            if found.asked_again is not None:
                print(f"{subject}{at}{how}, {found.asked_again:,} without an answer asked again (another protocol)")
                print_table(columns, [self._row(each) for each in found.re_asked])
                print()
        if self.not_evaluable:
            print(f"note: {self.not_evaluable:,} items could not be asked and count nowhere")

    def _row(self, each: Score) -> list[str]:
        facts = each.to_json()
        answered = "–"
        if each.answered is not None:
            answered = percentage(each.answered, *facts["answered_interval"])
        return [
            each.group.removeprefix("domain: "),
            str(each.n),
            str(each.correct),
            percentage(each.strict, *facts["strict_interval"]),
            percentage(each.null_rate, *facts["null_interval"]),
            answered,
            f"{100 * each.compensated:.1f} %",
        ]


class _Any:
    """The measurements of any other probe."""

    def __init__(self, records: Sequence[Record], scorer: str | None) -> None:
        self.scorer = scorer
        reading = {} if scorer is None else {"scorer": scorer}
        probes: dict[str, Probe] = {}
        observations: dict[str, list[Observation]] = defaultdict(list)
        for record in records:
            if record.probe not in probes:
                probes[record.probe] = reader(record.protocol, **reading)
            observations[record.probe] += probes[record.probe].observe(record)
        self.summaries = {
            name: (probes[name], summarise(seen, [_alone(metric) for metric in probes[name].metrics]))
            for name, seen in observations.items()
            if seen
        }

    def to_json(self) -> list[dict[str, Any]]:
        """One object a probe."""
        return [
            {
                "probe": probe.kind,
                "name": name,
                "scorer": self.scorer,
                "measurements": summary.to_json()["measurements"],
                "remarks": probe.remarks(summary),
            }
            for name, (probe, summary) in self.summaries.items()
        ]

    def show(self) -> None:
        """One table a probe."""
        for name, (probe, summary) in self.summaries.items():
            metrics = {metric.name: metric for metric in probe.metrics}
            print(f"{probe.title} ({name})")
            rows = []
            for found in summary.measurements:
                metric = metrics[found.metric]
                shown = percentage if metric.kind == "proportion" else estimate
                value = shown(found.value, found.low, found.high)
                at = "" if found.x is None else f"{found.x:,.0f}"
                rows.append([found.subject, metric.title, at, f"{value} {metric.unit}".strip(), str(found.n)])
            print_table(("<subject", "<metric", "at", "value", "n"), rows)
            for line in probe.remarks(summary):
                print(line)


def _alone(metric: Any) -> Any:
    """The metric without comparisons, which `longspan compare` makes."""
    return replace(metric, compare=False)
