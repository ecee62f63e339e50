"""The tables of a report: shown on the page, in Markdown and in the terminal from the same rows."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import Any

from longspan.records.observation import Comparison, Measurement, Metric
from longspan.report import findings, numbers
from longspan.report.data import ProbeSection, ReportInput, SubjectFacts
from longspan.report.decision import difference_text, value_text
from longspan.report.findings import Finding

MOST_ROWS = 120
"""Rows that the page and its Markdown twin show of a table."""
MOST_DATA = 100_000
"""Characters of data that the page holds for one table; more lie in a file beside it."""


@dataclass(frozen=True)
class Table:
    """A table as text, with its numbers.

    Attributes:
        columns: headings; a heading that starts with `<` marks text, all others are numbers and aligned right.
        rows: cells as text, rounded for reading.
        subjects: the subject of every row, empty where rows are not subjects.
        records: the same numbers unrounded, for the download.
    """

    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    subjects: tuple[str, ...] = ()
    records: tuple[Mapping[str, Any], ...] = field(default=())

    @cached_property
    def csv_text(self) -> str:
        """`csv()`, worked out once."""
        return self.csv()

    @property
    def is_large(self) -> bool:
        """Whether its data lies in a file of its own beside the page."""
        return len(self.csv_text) > MOST_DATA

    def shortened(self) -> Table:
        """The first rows, as many as are shown; the data stays whole."""
        return replace(self, rows=self.rows[:MOST_ROWS])

    def without_empty(self) -> Table:
        """The table without the columns in which no row has anything."""
        keep = [i for i in range(len(self.columns)) if any(row[i] not in (numbers.MISSING, "") for row in self.rows)]
        rows = tuple(tuple(row[i] for i in keep) for row in self.rows)
        return replace(self, columns=tuple(self.columns[i] for i in keep), rows=rows)

    @property
    def headings(self) -> list[tuple[str, bool]]:
        """(heading, whether its cells are text)."""
        return [(name.removeprefix("<"), name.startswith("<")) for name in self.columns]

    def csv(self) -> str:
        """The unrounded records as CSV; the rows where there are none."""
        text = io.StringIO()
        if self.records:
            writer = csv.DictWriter(text, list(self.records[0]), lineterminator="\n", extrasaction="ignore")
            writer.writeheader()
            writer.writerows(self.records)
        else:
            plain = csv.writer(text, lineterminator="\n")
            plain.writerow([name for name, _ in self.headings])
            plain.writerows(self.rows)
        return text.getvalue()

    def markdown(self) -> str:
        """A GitHub table; hostile text cannot break out of its cell."""
        head = "| " + " | ".join(_markdown_cell(name) for name, _ in self.headings) + " |"
        rule = "|" + "|".join(" :-- " if text else " --: " for _, text in self.headings) + "|"
        body = ["| " + " | ".join(_markdown_cell(cell) for cell in row) + " |" for row in self.rows]
        return "\n".join([head, rule, *body])


def markdown_text(text: str) -> str:
    """Text that Markdown shows as it is."""
    for mark in "\\`*_[]<>#|":
        text = text.replace(mark, "\\" + mark if mark not in "<>" else {"<": "&lt;", ">": "&gt;"}[mark])
    return text


def _markdown_cell(text: str) -> str:
    return markdown_text(" ".join(text.split())) or " "


def summary_rows(report: ReportInput) -> Table:
    """The short table that a run ends with: best subject first, one column per quality probe."""
    primary = findings.primary_finding(report)
    quality = [f for section in report.probes if section.place == "quality" if (f := _finding(section, primary))]
    headings = _headings(quality)
    columns = ["<subject", "<mixers", "parameters", *headings, "tok/s", "peak memory"]
    rows: list[tuple[str, ...]] = []
    records: list[dict[str, Any]] = []
    for subject in _best_first(report, primary):
        cells = [_letters_cell(subject, primary), _mixers(subject), _total(subject)]
        values = [findings.measured(f).get(subject.label) for f in quality]
        cells += [value_text(f.metric, m) if m else numbers.MISSING for f, m in zip(quality, values, strict=True)]
        cells += [numbers.scaled(subject.tokens_per_second), numbers.byte_size(subject.peak_memory_bytes)]
        rows.append(tuple(cells))
        records.append(
            {"subject": subject.label}
            | {heading: m.value if m else None for heading, m in zip(headings, values, strict=True)}
            | {"tokens_per_second": subject.tokens_per_second, "peak_memory_bytes": subject.peak_memory_bytes}
        )
    labels = tuple(s.label for s in _best_first(report, primary))
    return Table(tuple(columns), tuple(rows), labels, tuple(records)).without_empty()


def _finding(section: ProbeSection, primary: Finding | None) -> Finding | None:
    return primary if primary and primary.section is section else findings.main_finding(section)


def _best_first(report: ReportInput, primary: Finding | None) -> list[SubjectFacts]:
    if primary is None:
        return list(report.subjects)
    order = [m.subject for m in findings.order(primary.metric, findings.measured(primary).values())]
    return sorted(report.subjects, key=lambda s: order.index(s.label) if s.label in order else len(order))


def _heading(finding: Finding) -> str:
    if finding.x is None:
        return finding.metric.title
    return f"{finding.metric.title} @ {numbers.count(finding.x)}"


def _headings(quality: Sequence[Finding]) -> list[str]:
    """A heading for each; probes that measure the same are told apart by their names."""
    plain = [_heading(f) for f in quality]
    return [
        f"{heading} ({f.section.kind})" if plain.count(heading) > 1 else heading
        for heading, f in zip(plain, quality, strict=True)
    ]


def _letters_cell(subject: SubjectFacts, primary: Finding | None) -> str:
    letters = findings.tie_letters(primary).get(subject.label, "") if primary else ""
    return f"{subject.label} ({letters})" if letters else subject.label


def _mixers(subject: SubjectFacts) -> str:
    return " + ".join(dict.fromkeys(subject.mixers)) or numbers.MISSING


def _total(subject: SubjectFacts) -> str:
    return numbers.scaled(subject.parameters.total) if subject.parameters else numbers.MISSING


def subjects_table(report: ReportInput) -> Table:
    """What the subjects are: mixers, parameters by part, and how well the match came out."""
    columns = ("<subject", "<mixers", "parameters", "non-embedding", "embedding", "mixers", "MLP", "match")
    rows: list[tuple[str, ...]] = []
    records: list[dict[str, Any]] = []
    for s in report.subjects:
        p = s.parameters
        parts = (p.total, p.non_embedding, p.embedding, p.mixers, p.mlp) if p else (None,) * 5
        rows.append((s.label, _mixers(s), *map(numbers.scaled, parts), numbers.relative(s.match_residual)))
        records.append(
            {"subject": s.label, "letters": s.letters, "mixers": " ".join(s.mixers), **s.factors}
            | dict(zip(("total", "non_embedding", "embedding", "mixer_parameters", "mlp"), parts, strict=True))
            | {"match_target": s.match_target, "match_residual": s.match_residual}
        )
    labels = tuple(s.label for s in report.subjects)
    return Table(columns, tuple(rows), labels, tuple(records)).without_empty()


def training_cost_table(report: ReportInput) -> Table:
    """What training them took."""
    columns = ("<subject", "training FLOPs", "tokens", "tok/s", "peak memory", "time", "loss (best)", "loss (last)")
    rows: list[tuple[str, ...]] = []
    records: list[dict[str, Any]] = []
    for s in report.subjects:
        losses = [f"{each:.3f}" if each is not None else numbers.MISSING for each in (s.best_loss, s.last_loss)]
        flops, tokens = numbers.scaled(s.training_flops), numbers.scaled(s.tokens_trained)
        speed, memory = numbers.scaled(s.tokens_per_second), numbers.byte_size(s.peak_memory_bytes)
        rows.append((s.label, flops, tokens, speed, memory, numbers.duration(s.wall_seconds), *losses))
        names = "training_flops tokens_trained tokens_per_second peak_memory_bytes wall_seconds best_loss last_loss"
        records.append({"subject": s.label} | {name: getattr(s, name) for name in names.split()})
    labels = tuple(s.label for s in report.subjects)
    return Table(columns, tuple(rows), labels, tuple(records)).without_empty()


def context_cost_table(report: ReportInput, name: str) -> Table:
    """`state_bytes` or `forward_flops` of every subject at every context known."""
    show = numbers.byte_size if name == "state_bytes" else numbers.scaled
    known: dict[str, dict[int, float]] = {s.label: getattr(s, name) for s in report.subjects}
    contexts = sorted({context for values in known.values() for context in values})
    rows = tuple((label, *(show(values.get(c)) for c in contexts)) for label, values in known.items())
    records = tuple(
        {"subject": label, "context": context, name: value}
        for label, values in known.items()
        for context, value in sorted(values.items())
    )
    return Table(("<subject", *(numbers.count(c) for c in contexts)), rows, tuple(known), records)


def three_contexts(report: ReportInput) -> list[int]:
    """The smallest, a middle and the largest context at which every subject's state is known."""
    known = [set(s.state_bytes) for s in report.subjects if s.state_bytes]
    shared = sorted(set.intersection(*known)) if known else []
    return sorted({shared[0], shared[len(shared) // 2], shared[-1]}) if shared else []


def state_table(report: ReportInput) -> Table:
    """Decoding state at three contexts, and FLOPs per token at the last."""
    contexts = three_contexts(report)
    rows: list[tuple[str, ...]] = []
    records: list[dict[str, Any]] = []
    for s in report.subjects:
        cells = [numbers.byte_size(s.state_bytes.get(c)) for c in contexts]
        rows.append((s.label, *cells, *(numbers.scaled(s.forward_flops.get(c)) for c in contexts[-1:])))
        records.append(
            {"subject": s.label}
            | {f"state_bytes_{c}": s.state_bytes.get(c) for c in contexts}
            | {f"forward_flops_{c}": s.forward_flops.get(c) for c in contexts}
        )
    heads = [f"state @ {numbers.count(c)}" for c in contexts]
    heads += [f"FLOPs/token @ {numbers.count(c)}" for c in contexts[-1:]]
    labels = tuple(s.label for s in report.subjects)
    return Table(("<subject", *heads), tuple(rows), labels, tuple(records)).without_empty()


def metric_table(section: ProbeSection, metric: Metric, labels: Sequence[str]) -> Table:
    """One metric that has an x axis: a row per subject, a column per x."""
    found = findings.points(section, metric.name)
    xs = sorted({m.x for m in found if m.x is not None})
    at = {(m.subject, m.x): m for m in found}
    present = _ordered(labels, found)
    rows = tuple((s, *(value_text(metric, at[s, x]) if (s, x) in at else numbers.MISSING for x in xs)) for s in present)
    return Table(("<subject", *map(axis_text, xs)), rows, tuple(present), _records(found))


def cell_table(section: ProbeSection, metric: Metric, labels: Sequence[str]) -> Table:
    """One metric in the cells of its table x × y: a row per subject and y, a column per x."""
    found = findings.cells(section, metric.name)
    xs, ys = ([*dict.fromkeys(sorted(getattr(m, axis) or 0.0 for m in found))] for axis in ("x", "y"))
    at = {(m.subject, m.x, m.y): m for m in found}
    rows, subjects = [], []
    for subject in _ordered(labels, found):
        for y in ys:
            row = [at.get((subject, x, y)) for x in xs]
            if any(row):
                cells = (value_text(metric, m) if m else numbers.MISSING for m in row)
                rows.append((subject, axis_text(y, metric.y_unit), *cells))
                subjects.append(subject)
    columns = ("<subject", metric.y_name or "y", *map(axis_text, xs))
    return Table(columns, tuple(rows), tuple(subjects), _records(found))


def axis_text(value: float, unit: str = "") -> str:
    """A place on an axis as text; small numbers that are not whole keep their digits."""
    if unit == "%":
        return f"{100 * value:.0f} %"
    return numbers.count(value) if value == round(value) or value >= 100 else numbers.significant(value)


def scalar_table(section: ProbeSection, metrics: Sequence[Metric], labels: Sequence[str]) -> Table:
    """All metrics of a probe that are single numbers: a row per subject, a column per metric."""
    found = {metric.name: {m.subject: m for m in findings.points(section, metric.name)} for metric in metrics}
    everything = [m for by_subject in found.values() for m in by_subject.values()]
    first = metrics[0]
    letters = findings.tie_letters(Finding(section, first, None))
    rows = []
    ranked = [m.subject for m in findings.order(first, found[first.name].values())]
    present = [*ranked, *(s for s in _ordered(labels, everything) if s not in ranked)]
    for subject in present:
        own = [found[metric.name].get(subject) for metric in metrics]
        cells = [value_text(metric, m) if m else numbers.MISSING for metric, m in zip(metrics, own, strict=True)]
        some = next(m for m in own if m)
        rows.append((subject, letters.get(subject, ""), *cells, numbers.count(some.n), str(some.seeds)))
    units = [f"{m.title} ({m.unit})" if m.unit else m.title for m in metrics]
    columns = ("<subject", "<ties", *units, first.counted, "seeds")
    return Table(columns, tuple(rows), tuple(present), _records(everything)).without_empty()


def comparison_table(metric: Metric, comparisons: Sequence[Comparison]) -> Table:
    """Paired differences with everything a reader needs to judge them."""
    with_x = any(c.x is not None for c in comparisons)
    columns = (
        "<a",
        "<b",
        *([metric.x_name or "x"] if with_x else []),
        "a − b",
        "p (Holm)",
        "detectable",
        metric.counted,
    )
    rows = []
    shown = list(comparisons)
    if len(shown) > MOST_ROWS:
        # Of many, the clearest first: not all rows are shown.
        shown.sort(key=lambda c: (1.0 if c.p_holm is None else c.p_holm, -abs(c.difference)))
    for c in shown:
        x = [numbers.count(c.x)] if with_x else []
        unit = 100.0 if metric.is_share else 1.0
        detectable = f"±{numbers.significant(unit * c.mde, 2)}{' pp' if unit > 1 else ''}" if c.mde else numbers.MISSING
        text = f"{difference_text(metric, c)}{' ✓' if c.decided else ''}"
        rows.append((c.a, c.b, *x, text, numbers.p_value(c.p_holm), detectable, numbers.count(c.n)))
    return Table(columns, tuple(rows), (), tuple(asdict(c) for c in comparisons))


def ledger_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """A ledger entry's own table."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    text = {name: any(isinstance(row.get(name), str) for row in rows) for name in names}
    cells = tuple(tuple(_plain(row.get(name)) for name in names) for row in rows)
    headings = {name: name.replace("_", " ") for name in names}
    return Table(tuple(f"<{headings[n]}" if text[n] else headings[n] for n in names), cells, (), tuple(rows))


def _plain(value: Any) -> str:
    if value is None:
        return numbers.MISSING
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    return numbers.count(value) if value == int(value) else numbers.significant(value, 4)


def _ordered(labels: Sequence[str], found: Sequence[Measurement]) -> list[str]:
    seen = dict.fromkeys(m.subject for m in found)
    return [label for label in labels if label in seen] + [label for label in seen if label not in labels]


def _records(found: Sequence[Measurement]) -> tuple[Mapping[str, Any], ...]:
    return tuple(asdict(m) for m in found)
