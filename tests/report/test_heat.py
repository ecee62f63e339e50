"""Claims about tables of two conditions: every cell drawn, one scale, subjects compared at each x only."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import vl_convert

from longspan.foundation.randomness import numpy_generator
from longspan.records.observation import Metric, Observation, summarise
from longspan.report import charts, figures, page, palette
from longspan.report.arms import arrange
from longspan.report.data import ProbeSection, ReportInput
from longspan.report.figure import THEMES, static_spec
from longspan.report.heat import STEPS, step_of

FOUND = Metric(
    "accuracy", "Accuracy", "", "proportion", "higher", "context", 0.25, y_name="depth", y_unit="%", floor="floor"
)
FLOOR = Metric("floor", "Without the text", "", "proportion", "higher", chance=0.25, compare=False)
CONTEXTS, DEPTHS = (128.0, 512.0, 2048.0), (0.0, 0.5, 1.0)
SKILL = {"AAAA": 0.9, "MMMM": 0.25, "AMAM": 0.6}


def observations() -> list[Observation]:
    seen = []
    for subject, skill in SKILL.items():
        for x in CONTEXTS:
            rng = numpy_generator(0, subject, x)
            for d, y in enumerate(DEPTHS):
                for i in range(20):
                    name = f"{d}-{i}"
                    seen.append(Observation(subject, 0, name, name, "accuracy", x, float(rng.random() < skill), 1.0, y))
        seen += [Observation(subject, 0, f"{i}", f"{i}", "floor", None, float(i % 4 == 0), 1.0) for i in range(20)]
    return seen


@pytest.fixture(scope="module")
def report(quickstart_report: ReportInput) -> ReportInput:
    summary = summarise(observations(), [FOUND, FLOOR], resamples=2_000)
    section = ProbeSection("needle", "Needles", "Where is it?", (FOUND, FLOOR), summary)
    return replace(quickstart_report, probes=[section], primary="needle.accuracy")


def heat_of(report: ReportInput) -> charts.Figure:
    drawn = figures.quality_figures(report, report.probes[0], arrange(report))
    (found,) = [f for f in drawn if f.table.columns[1] in ("depth", "pairs")]
    return found


def rows_of(figure: charts.Figure) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = figure.spec["data"]["values"]
    return rows


def test_every_cell_of_every_subject_is_drawn_and_tabulated(report: ReportInput) -> None:
    figure = heat_of(report)
    assert len(rows_of(figure)) == len(figure.table.records) == len(SKILL) * len(CONTEXTS) * len(DEPTHS)
    assert len(figure.table.rows) == len(SKILL) * len(DEPTHS)
    assert [name for name, _ in figure.table.headings] == ["subject", "depth", "128", "512", "2,048"]
    assert all("[" in cell for row in figure.table.rows for cell in row[2:])
    assert figure.panels == 3


def test_one_row_of_cells_is_the_curve_and_no_figure_of_its_own(report: ReportInput) -> None:
    seen = [replace(each, y=DEPTHS[0]) if each.metric == "accuracy" else each for each in observations()]
    section = replace(report.probes[0], summary=summarise(seen, [FOUND, FLOOR], resamples=2_000))
    found = figures.quality_figures(replace(report, probes=[section]), section, arrange(report))
    assert [figure.name for figure in found if "by" in figure.name] == []
    assert "needle-accuracy" in [figure.name for figure in found]


def test_the_curve_beside_it_shows_all_cells_of_an_x_together(report: ReportInput) -> None:
    found = figures.quality_figures(report, report.probes[0], arrange(report))
    curve = next(f for f in found if f.name == "needle-accuracy")
    assert len([row for row in rows_of(curve) if row.get("kind") != "label"]) == len(SKILL) * len(CONTEXTS)
    assert {c.x for c in report.probes[0].summary.comparisons} == set(CONTEXTS)


def test_cells_whose_interval_holds_guessing_have_a_ring_and_the_floor_is_named(report: ReportInput) -> None:
    figure = heat_of(report)
    for row in rows_of(figure):
        assert row["open"] == (0.1 <= row["value"] <= 0.4), row
        assert row["panel"].endswith("· floor 25 %")
    assert "A ring marks cells whose interval holds guessing (25 %)" in figure.caption
    assert "20 questions a cell" in figure.caption
    assert "not cell by cell" in figure.caption


def test_it_draws_in_both_themes_with_one_scale(report: ReportInput) -> None:
    figure = heat_of(report)
    scale = figure.spec["spec"]["layer"][0]["encoding"]["fill"]["scale"]
    assert scale["domain"] == [0.0, 1.0]
    assert len(scale["range"]) == STEPS
    for theme in ("light", "dark"):
        spec = static_spec(figure, arrange(report), theme)
        assert "var(--" not in json.dumps(spec)
        svg = vl_convert.vegalite_to_svg(json.dumps(spec), vl_version=page.VEGA_LITE)
        for colour in (palette.heat_shades()["heat9"], palette.heat_shades()["heat2"]):
            assert getattr(colour, theme) in svg


def test_the_page_knows_its_colours(report: ReportInput) -> None:
    styles = page._styles(arrange(report), {})
    for theme in ("light", "dark"):
        assert f"--heat9: {getattr(palette.heat_shades()['heat9'], theme)};" in styles
    assert "--on-heat9:" in styles


def test_a_gain_is_scaled_to_what_was_measured(report: ReportInput) -> None:
    metric = Metric("gain", "Gain", "nats", "ratio", "higher", "context", y_name="pairs")
    seen = [replace(o, metric="gain", numerator=o.numerator * 2.5, y=4.0 + 4 * (o.y or 0)) for o in observations()
            if o.metric == "accuracy"]  # fmt: skip
    section = ProbeSection("recall", "Recall", "", (metric,), summarise(seen, [metric], resamples=2_000))
    figure = heat_of(replace(report, probes=[section]))
    values = [row["value"] for row in rows_of(figure)]
    assert figure.spec["spec"]["layer"][0]["encoding"]["fill"]["scale"]["domain"] == [min(values), max(values)]
    assert "A ring" not in figure.caption


def test_an_axis_reaches_the_bound_of_a_metric_and_its_table_keeps_small_places_apart(report: ReportInput) -> None:
    metric = Metric(
        "load", "Load", "", "proportion", "higher", "bits needed", mark=8192.0, mark_name="the bound", compare=False
    )
    seen = [replace(o, metric="load", x=(o.x or 1.0) / 3000, y=None) for o in observations() if o.metric == "accuracy"]
    section = ProbeSection("recall", "Recall", "", (metric,), summarise(seen, [metric], resamples=200), mark=2.0)
    (figure,) = figures.quality_figures(replace(report, probes=[section]), section, arrange(report))
    drawn = json.dumps(figure.spec)
    assert '"x": {"datum": 8192.0}' in drawn
    assert '"datum": 2.0' not in drawn
    assert "marks the bound (8,192)" in figure.caption
    places = figure.table.columns[1:]
    assert len(set(places)) == len(places) > 1
    assert all(float(place) < 10 for place in places)


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_colours_run_steadily_away_from_the_paper_and_their_text_is_readable(theme: str) -> None:
    shades = {name: getattr(shade, theme) for name, shade in palette.heat_shades().items()}
    paper = THEMES[theme]["paper"]
    away = [palette.contrast(shades[palette.heat_name(step)], paper) for step in range(STEPS)]
    assert all(b > 1.1 * a for a, b in pairwise(away)), away
    for step in range(STEPS):
        assert palette.contrast(shades[palette.heat_name(step)], shades[palette.heat_ink_name(step)]) > 4.5


def test_values_fall_into_equal_steps() -> None:
    assert [step_of(value, (0.0, 1.0)) for value in (0.0, 0.09, 0.1, 0.55, 1.0, 2.0, -1.0)] == [0, 0, 1, 5, 9, 9, 0]
    assert step_of(3.0, (3.0, 3.0)) == 0
