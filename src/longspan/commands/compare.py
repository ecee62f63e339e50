"""`longspan compare`: paired differences between runs, from their records alone."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from longspan.commands.recorded_runs import Recorded, open_run
from longspan.foundation.config import did_you_mean
from longspan.foundation.errors import UserError
from longspan.probes.base import Probe, reader
from longspan.records.observation import Comparison, Metric, Observation, summarise
from longspan.records.statistics import holm, mcnemar
from longspan.records.store import Record
from longspan.report.numbers import difference, p_value, significant
from longspan.terminal import print_json, print_table


@dataclass(frozen=True)
class Pair:
    """A comparison with the counts behind it.

    Attributes:
        comparison: the paired difference.
        is_share: whether the values are shares, shown in percent.
        value_a, value_b: of both sides on the items they share.
        items: how many items both sides answered.
        only_a, only_b: items that one side alone got right, None where answers are not right or wrong.
        mcnemar_p: exact, on items; `comparison.p` is the one that is adjusted.
    """

    probe: str
    comparison: Comparison
    is_share: bool
    value_a: float
    value_b: float
    items: int
    only_a: int | None = None
    only_b: int | None = None
    mcnemar_p: float | None = None
    mcnemar_holm: float | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        counts = {key: value for key, value in asdict(self).items() if key not in ("comparison", "probe", "is_share")}
        return {"probe": self.probe, **asdict(self.comparison), **counts, "decided": self.comparison.decided}


def compare(
    runs: Sequence[str], *, metric: str | None, scorer: str | None, duplicates: str, across: bool, json: bool
) -> None:
    """Compare every two subjects of the runs on the items that both answered.

    Args:
        runs: one or more; see `open_run`.
        metric: only this one; None: every one that its probe compares.
        scorer: how answers are read, None for each probe's default.
        duplicates: what becomes of items that were answered more than once.
        across: compare contexts with each other too, every context of a subject on its own.
        json: print one JSON object.

    Raises:
        UserError: nothing to compare, with the reason.
    """
    opened = [open_run(run, duplicates) for run in runs]
    notes = list(dict.fromkeys(note for each in opened for note in each.notes))
    pairs: list[Pair] = []
    for kind, (probe, arms) in _arms(opened, scorer, across).items():
        for measured in probe.metrics:
            if (measured.name == metric) if metric else (measured.compare and measured.kind not in ("median", "exact")):
                pairs += _pairs(kind, measured, arms)
    if not pairs:
        raise _nothing(opened, metric)
    if any("bootstrap" in each.comparison.method for each in pairs):
        notes.append("p: paired bootstrap over documents where several items share one; exact McNemar elsewhere")
    notes.append("Holm over all comparisons of a metric; MDE: smallest true difference found 4 times in 5, unadjusted")
    if json:
        print_json(
            {
                "runs": list(runs),
                "duplicates": duplicates,
                "scorer": scorer,
                "comparisons": [p.to_json() for p in pairs],
                "notes": notes,
            }
        )
        return
    columns = (
        "<probe", "<metric", "<a", "<b", "at", "items", "documents", "a ", "b ", "a − b", "only a / b", "McNemar p",
        "p", "Holm p", "MDE",
    )  # fmt: skip
    print_table(columns, [_row(pair) for pair in pairs])
    for note in notes:
        print(f"note: {note}")


def _arms(
    opened: Sequence[Recorded], scorer: str | None, across: bool
) -> dict[str, tuple[Probe, dict[str, list[Observation]]]]:
    """kind of probe → its reader, and arm → observations; arms of equal name in two runs carry the run's name."""
    read: dict[str, Probe] = {}
    found: dict[str, dict[tuple[str, int], list[Observation]]] = defaultdict(lambda: defaultdict(list))
    for number, each in enumerate(opened):
        for record in each.records:
            kind = record.probe
            if kind not in read:
                offers = scorer is not None and "scorer" in type(reader(record.protocol)).model_fields
                read[kind] = reader(record.protocol, **({"scorer": scorer} if offers else {}))
            found[kind][_asked_how(record), number] += read[kind].observe(record)
    arms: dict[str, tuple[Probe, dict[str, list[Observation]]]] = {}
    for kind, sides in found.items():
        subjects = [subject for subject, _ in sides]
        unfolded = across or _unfold(sides)
        named = {
            (subject if subjects.count(subject) == 1 or unfolded else f"{subject} ({opened[number].run.name})"): seen
            for (subject, number), seen in sides.items()
        }
        if unfolded:
            named = _by_context(sides, [each.run.name for each in opened])
        arms[kind] = read[kind], named
    return arms


def _asked_how(record: Record) -> str:
    """The subject, and the variant of the protocol where it is not the usual one."""
    variant = record.protocol.get("variant", "direct")
    return record.subject if variant == "direct" else f"{record.subject} ({variant})"


def _unfold(sides: dict[tuple[str, int], list[Observation]]) -> bool:
    """Whether no context is common to all sides, so that each context is an arm of its own."""
    contexts = [{seen.x for seen in observations} for observations in sides.values() if observations]
    return len(contexts) > 1 and not set.intersection(*contexts)


def _by_context(sides: dict[tuple[str, int], list[Observation]], names: Sequence[str]) -> dict[str, list[Observation]]:
    arms: dict[str, list[Observation]] = defaultdict(list)
    owner: dict[str, int] = {}
    for (subject, number), observations in sides.items():
        for seen in observations:
            label = subject if seen.x is None else f"{subject} @ {seen.x:,.0f}"
            if owner.setdefault(label, number) != number:
                label = f"{label} ({names[number]})"
            arms[label].append(replace(seen, x=None))
    return arms


def _pairs(kind: str, metric: Metric, arms: dict[str, list[Observation]]) -> list[Pair]:
    observations = [
        replace(seen, subject=label)
        for label, all_seen in arms.items()
        for seen in all_seen
        if seen.metric == metric.name
    ]
    if len({seen.subject for seen in observations}) < 2:
        return []
    summary = summarise(observations, [replace(metric, compare=True)])
    sums: dict[tuple[str, float | None], dict[str, list[float]]] = defaultdict(dict)
    for seen in observations:
        row = sums[seen.subject, seen.x].setdefault(seen.item, [0.0, 0.0])
        row[0] += seen.numerator
        row[1] += seen.denominator
    pairs = []
    for found in summary.comparisons:
        of_a, of_b = sums[found.a, found.x], sums[found.b, found.x]
        shared = [item for item in of_a if item in of_b]
        values = [sum(side[i][0] for i in shared) / sum(side[i][1] for i in shared) for side in (of_a, of_b)]
        pair = Pair(kind, found, metric.is_share, values[0], values[1], len(shared))
        if metric.kind == "proportion" and all(
            side[i] in ([0.0, 1.0], [1.0, 1.0]) for side in (of_a, of_b) for i in shared
        ):
            only_a = sum(of_a[i][0] > of_b[i][0] for i in shared)
            only_b = sum(of_b[i][0] > of_a[i][0] for i in shared)
            pair = replace(pair, only_a=only_a, only_b=only_b, mcnemar_p=mcnemar(only_a, only_b))
        pairs.append(pair)
    tested = [pair.mcnemar_p for pair in pairs if pair.mcnemar_p is not None]
    adjusted = iter(holm(tested))
    return [pair if pair.mcnemar_p is None else replace(pair, mcnemar_holm=next(adjusted)) for pair in pairs]


def _row(pair: Pair) -> list[str]:
    found = pair.comparison
    share = pair.is_share
    values = [f"{100 * each:.1f} %" if share else significant(each, 4) for each in (pair.value_a, pair.value_b)]
    mde = "–" if found.mde is None else f"{100 * found.mde:.1f} pp" if share else f"{found.mde:.3g}"
    return [
        pair.probe,
        found.metric,
        found.a,
        found.b,
        "" if found.x is None else f"{found.x:,.0f}",
        str(pair.items),
        str(found.n),
        *values,
        difference(found.difference, found.low, found.high, proportion=share),
        "–" if pair.only_a is None else f"{pair.only_a} / {pair.only_b}",
        p_value(pair.mcnemar_p),
        p_value(found.p),
        p_value(found.p_holm),
        mde,
    ]


def _nothing(opened: Iterable[Recorded], metric: str | None) -> UserError:
    records = [record for each in opened for record in each.records]
    held = sorted({f"{record.subject} ({record.probe})" for record in records})
    known = {each.name for record in {r.probe: r for r in records}.values() for each in reader(record.protocol).metrics}
    if metric is not None and metric not in known:
        fix = did_you_mean(metric, known, "name one of these")
        given = f"--metric {metric!r}, which none of {', '.join(sorted({r.probe for r in records}))} measures"
        return UserError(given, ", ".join(sorted(known)), fix)
    what = f"metric {metric!r} of " if metric else ""
    return UserError(
        f"nothing to compare: {what}{', '.join(held[:6])}",
        "two subjects that answered the same items of one probe",
        "name two runs with the same probe (and --metric by its name in `longspan rescore --json`)",
    )
