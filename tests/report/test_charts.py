"""Claims about charts that no figure of the quickstart shows."""

from __future__ import annotations

import pytest

from longspan.report import charts
from longspan.report.arms import arrange
from longspan.report.axes import Axis
from longspan.report.data import ReportInput


@pytest.mark.parametrize("unit", [1e-5, 1.0, 1e5])
def test_lines_that_end_together_are_named_as_they_ran_and_others_as_they_end(
    unit: float, quickstart_report: ReportInput
) -> None:
    """In any unit: what counts is what can be seen."""
    arms = arrange(quickstart_report).in_one_panel()
    first, second, third = (subject.label for subject in quickstart_report.subjects)
    curves = {first: (30.0, 50.01), second: (20.0, 50.02), third: (10.0, 55.0)}
    rows = [
        {"subject": who, "x": float(x), "y": unit * y, "text": "", "n": 1}
        for who, ys in curves.items()
        for x, y in enumerate(ys, start=1)
    ]
    spec = charts.lines(rows, arms, Axis("x"), Axis("y"))
    labels = {row["text"]: row["at"] for row in spec["data"]["values"] if row["kind"] == "label"}
    assert sorted(labels, key=lambda name: labels[name]) == [arms[name].short for name in (second, first, third)]


def test_the_way_to_the_label_of_a_line_that_ends_early_is_grey_and_dotted(quickstart_report: ReportInput) -> None:
    arms = arrange(quickstart_report).in_one_panel()
    long, short = (subject.label for subject in quickstart_report.subjects[:2])
    rows = [
        {"subject": who, "x": float(x), "y": float(x), "text": "", "n": 1}
        for who, xs in ((long, (1, 2, 4)), (short, (1, 2)))
        for x in xs
    ]
    spec = charts.lines(rows, arms, Axis("x"), Axis("y"))
    early = {row["text"]: row["early"] for row in spec["data"]["values"] if row["kind"] == "label"}
    assert early == {arms[long].short: False, arms[short].short: True}
    rules = {
        layer["transform"][-1]["filter"]: layer
        for layer in spec.get("spec", spec)["layer"]
        if layer["mark"]["type"] == "rule" and "early" in layer["transform"][-1]["filter"]
    }
    assert rules["datum.early"]["mark"]["strokeDash"] == [1, 4]
    assert "color" not in rules["datum.early"]["encoding"]
    assert "color" in rules["!datum.early"]["encoding"]
