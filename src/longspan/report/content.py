"""Everything a report says, worked out once for the page, Markdown and the figure files."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from longspan.report import figures, numbers, tables
from longspan.report.arms import Arms, arrange
from longspan.report.comparison_figures import comparison_figures
from longspan.report.crossings import crossing_table
from longspan.report.data import LedgerEntry, ProbeSection, ReportInput
from longspan.report.decision import Decision, decide
from longspan.report.figure import Figure
from longspan.report.mastery_figures import mastery_figures
from longspan.report.tables import Table
from longspan.report.training_figures import training_figures

VERDICTS = {
    "winner": "Decided",
    "provisional": "Holds for these training runs; open for the architectures",
    "tie": "Tie",
    "undecided": "Cannot be decided with this data",
    "single": "One subject",
    "costs": "Costs alone",
    "nothing": "No results",
}


@dataclass(frozen=True)
class QualityPart:
    """One probe of quality with its figures and the table of its single numbers."""

    section: ProbeSection
    figures: list[Figure]
    table: Table | None
    ties: bool


@dataclass(frozen=True)
class LedgerPart:
    """A ledger entry with its table laid out."""

    entry: LedgerEntry
    table: Table | None


@dataclass(frozen=True)
class Content:
    """Everything on the page, worked out once for HTML, Markdown and figure files."""

    report: ReportInput
    arms: Arms
    decision: Decision
    answer: list[Figure]
    quality: list[QualityPart]
    cost: list[Figure]
    crossings: Table | None
    pareto: list[Figure]
    comparisons: list[Figure]
    training: list[Figure]
    ledger: list[LedgerPart]

    @property
    def figures(self) -> list[Figure]:
        """Every figure in reading order."""
        quality = [figure for part in self.quality for figure in part.figures]
        return [*self.answer, *quality, *self.cost, *self.pareto, *self.comparisons, *self.training]


def lay_out(report: ReportInput) -> Content:
    """Decide, draw and tabulate."""
    arms = arrange(report)
    quality = []
    for section in report.probes:
        if section.place == "quality":
            table = figures.scalar_table(section, arms)
            ties = bool(table and any(name == "ties" for name, _ in table.headings))
            quality.append(QualityPart(section, figures.quality_figures(report, section, arms), table, ties))
    ledger = sorted(report.ledger, key=lambda entry: entry.level != "warning")
    return Content(
        report,
        arms,
        decide(report),
        figures.answer_figure(report, arms),
        quality,
        figures.cost_figures(report, arms),
        crossing_table(report),
        figures.pareto_figures(report, arms),
        [f for section in report.probes for f in comparison_figures(section, arms)],
        [*mastery_figures(report, arms), *training_figures(report, arms)],
        [LedgerPart(entry, tables.ledger_table(entry.table) if entry.table else None) for entry in ledger],
    )


def same(report: ReportInput, read: Callable[[Any], Any]) -> Any:
    """The value all subjects share, None where they differ."""
    values = {read(subject) for subject in report.subjects}
    return values.pop() if len(values) == 1 else None


def compared_units(report: ReportInput) -> str:
    """What is the same for both subjects of the differences: `documents`, `strings`."""
    found: dict[str, None] = {}
    for section in report.probes:
        compared = {comparison.metric for comparison in section.summary.comparisons}
        found |= dict.fromkeys(metric.counted for metric in section.metrics if metric.name in compared)
    return " and ".join(filter(None, [", ".join(list(found)[:-1]), *list(found)[-1:]]))


def subjects_lead(report: ReportInput) -> str:
    """How many subjects, what varies between them and how well they are matched."""
    residuals = [abs(s.match_residual) for s in report.subjects if s.match_residual is not None]
    text = f"{len(report.subjects)} subject{'s' if len(report.subjects) != 1 else ''}."
    varied = [name for name in (report.subjects[0].factors if report.subjects else {})
              if len({s.factors.get(name) for s in report.subjects}) > 1]  # fmt: skip
    if varied:
        text += f" The study varies {', '.join(name.rsplit('.', 1)[-1] for name in varied)}."
    if residuals:
        held = " and ".join(
            dict.fromkeys(s.match_quantity.replace("_", " ") for s in report.subjects if s.match_quantity)
        )
        worst = numbers.significant(100 * max(residuals), 2)
        rest = len(report.subjects) - len(residuals)
        who = f"{len(residuals)} of them {'are' if len(residuals) > 1 else 'is'}" if rest else "They are"
        text += f" {who} matched in {held or 'size'}; the worst match is off by {worst} %."
        if rest:
            text += f" The other{'s are' if rest > 1 else ' is'} not matched."
    return text


def subject_notes(report: ReportInput) -> list[str]:
    """What a reader must know about the subjects: weights, what memory was measured, remarks."""
    weights = same(report, lambda s: s.weights)
    lines = []
    if any(s.kind == "trained" for s in report.subjects) and weights:
        which = "the lowest full-validation loss" if weights == "best" else "the end of training"
        lines.append(f"Probes examined the weights from {which}.")
    measured = list(dict.fromkeys(s.peak_memory_of for s in report.subjects if s.peak_memory_of))
    if measured:
        lines.append(f"Peak memory is {'; '.join(measured)}.")
    return lines + [f"{s.label}: {s.notes}" for s in report.subjects if s.notes]
