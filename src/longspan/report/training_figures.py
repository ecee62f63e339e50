"""The figures of training: loss, learning rate, gradient norm and throughput."""

from __future__ import annotations

import math
from collections.abc import Sequence

from longspan.report import charts, numbers, tables
from longspan.report.arms import Arms
from longspan.report.axes import Axis, Row, Scale
from longspan.report.data import ReportInput
from longspan.report.figure import Figure

MOST_POINTS = 240
"""Points drawn of one series; the table's data has every logged step."""


def training_figures(report: ReportInput, arms: Arms) -> list[Figure]:
    """Loss (smoothed over raw, with validation), learning rate, gradient norm, throughput."""
    curves = [curve for curve in report.training if curve.subject in arms and (curve.rows or curve.validation)]
    if not curves:
        return []
    found: list[Figure] = []
    for key, title in (
        ("loss", "Loss (nats per token)"),
        ("lr", "Learning rate"),
        ("grad_norm", "Gradient norm"),
        ("tokens_per_second", "Throughput (tokens/s)"),
    ):
        scale: Scale
        rows = [row for curve in curves for row in _training_rows(curve.subject, curve.seed, curve.rows, key)]
        checks = [
            {**row, "check": True}
            for curve in curves if key == "loss"
            for row in _training_rows(curve.subject, curve.seed, curve.validation, key, smooth=False)
        ]  # fmt: skip
        if not rows and not checks:
            continue
        shown = arms if key == "loss" else arms.in_one_panel()
        scale = "log" if key == "grad_norm" and all(r["y"] > 0 for r in rows) else "linear"
        y = Axis("", scale, "~s" if key == "tokens_per_second" else ",~r", zero=key in ("lr", "tokens_per_second"))
        labelled = key == "loss"
        spec = charts.training(rows, checks, shown, Axis("tokens trained", form="~s", zero=True), y, labelled=labelled)
        width = charts.width_of([shown[c.subject].short for c in curves]) if labelled else 8
        panels = len({shown[c.subject].panel for c in curves})
        columns = shown.columns if panels > 1 else 1
        caption = {
            "loss": "Thin: every logged step; thick: smoothed; points: full validation. The steep start is cut off, "
            "and the axis does not start at zero.",
            "lr": "Colours as in the loss chart.",
            "grad_norm": "Before clipping, smoothed over raw" + ("; logarithmic axis." if scale == "log" else "."),
            "tokens_per_second": "Every logged step and smoothed; evaluation and checkpoints excluded.",
        }[key]
        table = _training_table(report, key)
        found.append(
            Figure(
                f"training-{key.replace('_', '-')}",
                title,
                caption,
                spec,
                table,
                columns,
                width,
                panels,
                half=key != "loss",
            )
        )
    return found


def _training_rows(
    subject: str, seed: int, lines: Sequence[dict[str, float | None]], key: str, *, smooth: bool = True
) -> list[Row]:
    known = [(line.get("tokens"), line.get(key)) for line in lines]
    points = [(x, y) for x, y in known if x is not None and y is not None and math.isfinite(y)]
    smoothed = _smoothed([y for _, y in points]) if smooth else [y for _, y in points]
    every = max(1, math.ceil(len(points) / MOST_POINTS))
    chosen = [i for i in range(len(points)) if i % every == 0 or i == len(points) - 1]
    series = f"{subject} seed {seed}"
    return [
        {"subject": subject, "series": series, "x": points[i][0], "y": points[i][1], "smooth": smoothed[i],
         "text": numbers.significant(points[i][1], 4), "check": False}
        for i in chosen
    ]  # fmt: skip


def _smoothed(values: Sequence[float]) -> list[float]:
    """A centred running mean over about one twentieth of the run."""
    half = max(1, len(values) // 40)
    last = len(values) - 1
    sums = [0.0]
    for value in values:
        sums.append(sums[-1] + value)
    out = []
    for i in range(len(values)):
        # Symmetric at the steep start, so that it is not biased; the flat end may look back only.
        back = min(half, i)
        ahead = min(back, last - i)
        out.append((sums[i + ahead + 1] - sums[i - back]) / (ahead + back + 1))
    return out


def _training_table(report: ReportInput, key: str) -> tables.Table:
    rows, records, labels = [], [], []
    for curve in report.training:
        values = [v for line in curve.rows if (v := line.get(key)) is not None]
        checks = [v for line in curve.validation if (v := line.get(key)) is not None]
        if not values and not checks:
            continue
        shown = [values[0], values[-1], min(values), max(values)] if values else [math.nan] * 4
        best = [f"{min(checks):.3f}"] if checks else [numbers.MISSING]
        cells = [numbers.significant(v, 3) if math.isfinite(v) else numbers.MISSING for v in shown]
        rows.append((curve.subject, str(curve.seed), *cells, *(best if key == "loss" else ())))
        labels.append(curve.subject)
        records += [{"subject": curve.subject, "seed": curve.seed, "kind": kind, "step": line.get("step"),
                     "tokens": line.get("tokens"), key: line.get(key)}
                    for kind, lines in (("train", curve.rows), ("validation", curve.validation)) for line in lines
                    if line.get(key) is not None]  # fmt: skip
    columns = (
        "<subject",
        "seed",
        "first",
        "last",
        "lowest",
        "highest",
        *(("best validation",) if key == "loss" else ()),
    )
    return tables.Table(columns, tuple(rows), tuple(labels), tuple(records))
