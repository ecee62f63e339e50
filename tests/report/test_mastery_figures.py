"""What learning a task took: accuracy against samples, and samples to mastery, censored ones drawn as such."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from longspan.records.observation import Measurement, Metric, Summary
from longspan.report.arms import arrange
from longspan.report.data import ProbeSection, ReportInput, TrainingCurve
from longspan.report.figure import static_spec
from longspan.report.figures import quality_figures
from longspan.report.mastery_figures import mastery_figures


def curve(subject: str, shares: list[float], seed: int = 0, mastery: float | None = 0.99) -> TrainingCurve:
    lines: list[dict[str, Any]] = [
        {"step": 10 * i, "tokens": 1000 * i, "samples": 100 * i, "string_accuracy": share, "num_strings": 1024}
        for i, share in enumerate(shares, start=1)
    ]
    return TrainingCurve(subject, seed, validation=lines, mastery=mastery)


@pytest.fixture
def learned(quickstart_report: ReportInput) -> ReportInput:
    first, second, third = (subject.label for subject in quickstart_report.subjects)
    curves = [
        curve(first, [0.2, 0.8, 0.995]),
        curve(first, [0.5, 0.99], seed=1),
        curve(second, [0.0, 0.1, 0.3, 0.4]),
        curve(third, [1.0]),
    ]
    return replace(quickstart_report, training=curves)


def dots_of(report: ReportInput) -> dict[str, dict[str, Any]]:
    *_, figure = mastery_figures(report, arrange(report))
    assert figure.name == "samples-to-mastery"
    return {row["name"]: row for row in figure.spec["data"]["values"]}


def test_mastery_is_the_first_validation_that_reached_it(learned: ReportInput) -> None:
    first, _, third = (subject.label for subject in learned.subjects)
    rows = dots_of(learned)
    # Two seeds: 300 and 200 samples; neither had reached it at 200 and 100.
    assert (rows[first]["value"], rows[first]["low"], rows[first]["high"]) == (250, 100, 300)
    assert not rows[first]["hollow"]
    assert (rows[third]["value"], rows[third]["low"]) == (100, 0)


def test_a_subject_that_never_reached_it_is_censored_and_last(learned: ReportInput) -> None:
    second = learned.subjects[1].label
    row = dots_of(learned)[second]
    assert row["hollow"]
    assert row["value"] == 400
    assert row["text"].startswith("> 400")
    assert "40 % at best" in row["text"]
    assert list(dots_of(learned))[-1] == second


def test_half_is_reached_before_mastery_and_the_median_needs_most_seeds(learned: ReportInput) -> None:
    first, second, third = (subject.label for subject in learned.subjects)
    more = [*learned.training, curve(second, [0.0, 0.4, 0.6], seed=1)]
    _, half, _ = mastery_figures(replace(learned, training=more), arrange(learned))
    assert half.name == "samples-to-50"
    rows = {row["name"]: row for row in half.spec["data"]["values"]}
    assert (rows[first]["value"], rows[first]["low"], rows[first]["high"]) == (150, 0, 200)
    # One of two seeds: the median is above the middle of what is known.
    assert (rows[second]["value"], rows[second]["hollow"]) == (350, True)
    assert rows[second]["detail"] == "1 of 2 seeds reached it"
    assert not rows[third]["hollow"]


def test_accuracy_is_drawn_with_intervals_and_a_table(learned: ReportInput) -> None:
    accuracy, _, samples = mastery_figures(learned, arrange(learned))
    points = [row for row in accuracy.spec["data"]["values"] if row["kind"] == "point"]
    assert len(points) == 10
    assert all(row["low"] <= row["y"] <= row["high"] for row in points)
    # Samples to 50, 90 and 99 %.
    assert [row[2:5] for row in accuracy.table.rows] == [
        ("200", "300", "300"), ("100", "200", "200"), ("> 400", "> 400", "> 400"), ("100", "100", "100"),
    ]  # fmt: skip
    assert {record["samples"] for record in samples.table.records} == {100.0, 200.0, 300.0, 400.0}


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_both_charts_have_colours_in_both_themes(learned: ReportInput, theme: str) -> None:
    arms = arrange(learned)
    for figure in mastery_figures(learned, arms):
        assert "var(--" not in str(static_spec(figure, arms, theme))


def test_what_is_read_off_a_curve_has_a_figure_and_whole_numbers(quickstart_report: ReportInput) -> None:
    labels = [subject.label for subject in quickstart_report.subjects]
    overall = Metric("overall", "String accuracy", "", "proportion", "higher")
    reach = Metric("reach", "Longest", "", "derived", "higher", compare=False)
    measured = [Measurement("overall", label, None, 0.5, 0.4, 0.6, 256, 1, 256) for label in labels]
    measured += [Measurement("reach", label, None, 20.0, 15.0, 25.0, 256, 1, 256) for label in labels]
    section = ProbeSection("copying", "Task", "…", (overall, reach), Summary(tuple(measured), (), ()))
    (figure,) = [
        each for each in quality_figures(quickstart_report, section, arrange(quickstart_report)) if "reach" in each.name
    ]
    assert [row["text"] for row in figure.spec["data"]["values"]] == ["20 [15, 25]"] * len(labels)


def test_text_has_no_such_figures(quickstart_report: ReportInput) -> None:
    assert mastery_figures(quickstart_report, arrange(quickstart_report)) == []


def test_without_a_goal_there_are_no_samples_to_it(learned: ReportInput) -> None:
    open_ended = replace(learned, training=[replace(each, mastery=None) for each in learned.training])
    (accuracy,) = mastery_figures(open_ended, arrange(open_ended))
    assert accuracy.name == "string-accuracy-by-samples"
