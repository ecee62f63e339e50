"""The figures of learning a task: accuracy against samples seen, and the samples that mastery took."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from longspan.records.statistics import wilson
from longspan.report import charts, numbers, tables
from longspan.report.arms import Arms
from longspan.report.axes import Axis, Row
from longspan.report.data import ReportInput, TrainingCurve
from longspan.report.figure import Figure

HALF, MOST = 0.5, 0.9
"""String accuracies on the way to mastery: when a subject begins to be able to, and when it mostly is."""


@dataclass(frozen=True)
class _Reached:
    """When a training had a string accuracy for the first time.

    Attributes:
        samples: at the first validation that had it, None where none did.
        before: samples at the validation before that, or at the last one.
        tokens: at that validation, or at the last one.
    """

    samples: float | None
    before: float
    tokens: float

    @property
    def value(self) -> float:
        """Samples that it took, or took at least."""
        return self.before if self.samples is None else self.samples


@dataclass(frozen=True)
class _Learning:
    """One training of a task.

    Attributes:
        points: samples, string accuracy and strings of every validation.
        best: highest string accuracy.
    """

    curve: TrainingCurve
    points: list[tuple[float, float, int]]
    best: float

    def reached(self, level: float) -> _Reached:
        """When the string accuracy was first at least `level`."""
        at = next((i for i, (_, share, _) in enumerate(self.points) if share >= level), None)
        end = len(self.points) - 1 if at is None else at
        before = self.points[end][0] if at is None else self.points[end - 1][0] if end else 0.0
        tokens = float(self.curve.validation[end].get("tokens") or 0.0)
        return _Reached(None if at is None else self.points[at][0], before, tokens)


def mastery_figures(report: ReportInput, arms: Arms) -> list[Figure]:
    """String accuracy against training samples, and samples to half and to mastery; none where no task was trained."""
    found = [each for curve in report.training if curve.subject in arms and (each := _learning(curve))]
    if not found:
        return []
    table = _table(found)
    figures = [_accuracy(found, arms, table)]
    asked = [each for each in found if each.curve.mastery is not None]
    if asked:
        wanted = asked[0].curve.mastery or 0.0
        figures += [_samples(asked, level, arms, table) for level in _levels(wanted) if level != MOST]
    return figures


def _levels(wanted: float) -> list[float]:
    return [*(level for level in (HALF, MOST) if level < wanted), wanted]


def _learning(curve: TrainingCurve) -> _Learning | None:
    points = [
        (float(samples), float(share), int(line.get("num_strings") or 0))
        for line in curve.validation
        if (share := line.get("string_accuracy")) is not None and (samples := line.get("samples"))
    ]
    return _Learning(curve, points, max(p[1] for p in points)) if points else None


def _accuracy(found: Sequence[_Learning], arms: Arms, table: tables.Table) -> Figure:
    rows: list[Row] = []
    for each in found:
        for samples, share, strings in each.points:
            interval = wilson(share * strings, strings)
            rows.append(
                {"subject": each.curve.subject, "series": f"{each.curve.subject} seed {each.curve.seed}",
                 "x": samples, "y": share, "low": interval.low, "high": interval.high, "n": strings,
                 "text": numbers.percentage(share, interval.low, interval.high, None)}
            )  # fmt: skip
    spec = charts.lines(rows, arms, Axis("training samples", form="~s", zero=True), Axis("", form="~%", zero=True))
    labels = [arms[each.curve.subject].short for each in found]
    panels = len({arms[each.curve.subject].panel for each in found})
    caption = (
        "Strings of the fixed validation set with a whole answer right, teacher-forced, against the strings trained on "
        "so far; every string was new. Bands are Wilson's 95 % intervals over strings. A line ends where training did."
    )
    return Figure(
        "string-accuracy-by-samples",
        "String accuracy against training samples",
        caption,
        spec,
        table,
        arms.columns if panels > 1 else 1,
        charts.width_of(labels),
        panels,
    )


def _samples(found: Sequence[_Learning], level: float, arms: Arms, table: tables.Table) -> Figure:
    subjects: dict[str, list[_Learning]] = {}
    for each in found:
        subjects.setdefault(each.curve.subject, []).append(each)
    rows = [_dot(subject, runs, level, arms) for subject, runs in subjects.items()]
    rows.sort(key=lambda row: (row["hollow"], row["value"]))
    caption = (
        "Fewer is better. The bar reaches back to the last validation that had not reached it, over all seeds. Rings: "
        "not reached when training ended there, so that the number is above it."
    )
    mastery = level == found[0].curve.mastery
    return Figure(
        "samples-to-mastery" if mastery else f"samples-to-{100 * level:g}",
        f"Training samples to {100 * level:g} % of strings right",
        caption,
        charts.dots(rows, Axis("training samples", form="~s", zero=True)),
        table,
        1,
        charts.width_of([row["text"] for row in rows]) + 8,
    )


def _dot(subject: str, runs: Sequence[_Learning], level: float, arms: Arms) -> Row:
    reached = [each.reached(level) for each in runs]
    values = [each.value for each in reached]
    # The median of the seeds is known where more than half of them reached it.
    value = statistics.median(values)
    known = [each.samples for each in reached if each.samples is not None]
    censored = len(known) <= len(runs) // 2
    text = f"{'> ' if censored else ''}{numbers.scaled(value)}"
    best = min(each.best for each in runs)
    count = f"{len(known)} of {len(runs)} seeds reached it"
    return {"name": subject, "value": value, "low": min(each.before for each in reached), "high": max(values),
            "c": f"var({arms[subject].variable})", "hollow": censored,
            "text": f"{text} ({100 * best:.3g} % at best)" if censored else text, "detail": count}  # fmt: skip


def _table(found: Sequence[_Learning]) -> tables.Table:
    levels = sorted({level for each in found for level in _levels(each.curve.mastery or MOST)})
    titles = [f"samples to {100 * level:g} %" for level in levels]
    columns = ("<subject", "seed", *titles, "trained on", "tokens", "best string accuracy")
    rows, records = [], []
    for each in found:
        reached = [each.reached(level) for level in levels]
        said = [f"{'> ' if r.samples is None else ''}{numbers.count(r.value)}" for r in reached]
        rows.append(
            (each.curve.subject, str(each.curve.seed), *said, numbers.count(each.points[-1][0]),
             numbers.scaled(reached[-1].tokens), f"{100 * each.best:.1f} %")
        )  # fmt: skip
        records += [
            {"subject": each.curve.subject, "seed": each.curve.seed, "samples": samples_then, "string_accuracy": share,
             "strings": strings, "mastery": each.curve.mastery, "reached": reached[-1].samples}
            for samples_then, share, strings in each.points
        ]  # fmt: skip
    return tables.Table(columns, tuple(rows), tuple(each.curve.subject for each in found), tuple(records))
