"""The figures of learning a task: accuracy against samples seen, and the samples that mastery took."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from longspan.records.statistics import wilson
from longspan.report import charts, numbers, tables
from longspan.report.arms import Arms
from longspan.report.axes import Axis, Row
from longspan.report.charts import Figure
from longspan.report.data import ReportInput, TrainingCurve


@dataclass(frozen=True)
class _Learning:
    """One training of a task.

    Attributes:
        reached: samples at the first validation with the wanted accuracy, None where none had it.
        before: samples at the validation before it, or at the last one.
        best: highest string accuracy.
    """

    curve: TrainingCurve
    points: list[tuple[float, float, int]]
    reached: float | None
    before: float
    tokens: float
    best: float


def mastery_figures(report: ReportInput, arms: Arms) -> list[Figure]:
    """String accuracy against training samples, and samples to mastery; none where no task was trained."""
    found = [each for curve in report.training if curve.subject in arms and (each := _learning(curve))]
    if not found:
        return []
    table = _table(found)
    figures = [_accuracy(found, arms, table)]
    if any(each.curve.mastery is not None for each in found):
        figures.append(_samples(found, arms, table))
    return figures


def _learning(curve: TrainingCurve) -> _Learning | None:
    points = [
        (float(samples), float(share), int(line.get("num_strings") or 0))
        for line in curve.validation
        if (share := line.get("string_accuracy")) is not None and (samples := line.get("samples"))
    ]
    if not points:
        return None
    wanted = curve.mastery
    at = next((i for i, (_, share, _) in enumerate(points) if wanted is not None and share >= wanted), None)
    end = len(points) - 1 if at is None else at
    before = points[end][0] if at is None else points[end - 1][0] if end else 0.0
    tokens = float(curve.validation[end].get("tokens") or 0.0)
    return _Learning(curve, points, None if at is None else points[at][0], before, tokens, max(p[1] for p in points))


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


def _samples(found: Sequence[_Learning], arms: Arms, table: tables.Table) -> Figure:
    subjects: dict[str, list[_Learning]] = {}
    for each in found:
        if each.curve.mastery is not None:
            subjects.setdefault(each.curve.subject, []).append(each)
    rows = [_dot(subject, runs, arms) for subject, runs in subjects.items()]
    rows.sort(key=lambda row: (row["hollow"], row["value"]))
    wanted = next(each.curve.mastery for each in found if each.curve.mastery is not None)
    caption = (
        "Fewer is better. The bar reaches back to the last validation that had not reached it, over all seeds. Rings: "
        "not reached when training ended there, so that the number is above it."
    )
    return Figure(
        "samples-to-mastery",
        f"Training samples to {100 * wanted:g} % of strings right",
        caption,
        charts.dots(rows, Axis("training samples", form="~s")),
        table,
        1,
        charts.width_of([row["text"] for row in rows]) + 8,
    )


def _dot(subject: str, runs: Sequence[_Learning], arms: Arms) -> Row:
    reached = [each.reached for each in runs]
    values = [each.reached if each.reached is not None else each.before for each in runs]
    censored = any(each is None for each in reached)
    value = statistics.median(values)
    text = f"{'> ' if censored else ''}{numbers.scaled(value)}"
    best = min(each.best for each in runs)
    count = f"{sum(each is not None for each in reached)} of {len(runs)} seeds reached it"
    return {"name": subject, "value": value, "low": min(each.before for each in runs), "high": max(values),
            "c": f"var({arms[subject].variable})", "hollow": censored,
            "text": f"{text} ({100 * best:.3g} % at best)" if censored else text, "detail": count}  # fmt: skip


def _table(found: Sequence[_Learning]) -> tables.Table:
    columns = ("<subject", "seed", "samples", "tokens", "<reached", "best string accuracy")
    rows, records = [], []
    for each in found:
        samples = each.before if each.reached is None else each.reached
        wanted = each.curve.mastery
        said = "" if wanted is None else "yes" if each.reached is not None else "no: more are needed"
        rows.append(
            (each.curve.subject, str(each.curve.seed), numbers.count(samples), numbers.scaled(each.tokens), said,
             f"{100 * each.best:.1f} %")
        )  # fmt: skip
        records += [
            {"subject": each.curve.subject, "seed": each.curve.seed, "samples": samples_then, "string_accuracy": share,
             "strings": strings, "mastery": wanted, "reached": each.reached}
            for samples_then, share, strings in each.points
        ]  # fmt: skip
    return tables.Table(columns, tuple(rows), tuple(each.curve.subject for each in found), tuple(records))
