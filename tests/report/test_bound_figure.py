"""What subjects hold against what limits them."""

from __future__ import annotations

import json
from dataclasses import replace

import vl_convert

from longspan.probes.base import make_probe
from longspan.records.observation import Measurement, Summary
from longspan.report import page
from longspan.report.arms import arrange
from longspan.report.bound_figure import bound_figure
from longspan.report.data import ProbeSection, ReportInput
from longspan.report.figure import static_spec
from longspan.report.figures import quality_figures


def measured(metric: str, subject: str, value: float, low: float, high: float, note: str = "") -> Measurement:
    return Measurement(metric, subject, None, value, low, high, 100, 3, 100, note, beyond=bool(note))


def held(report: ReportInput) -> ProbeSection:
    first, second, third = (subject.label for subject in report.subjects)
    found = (
        *(measured("overall", subject, 0.5, 0.4, 0.6) for subject in (first, second, third)),
        measured("half", first, 80.0, 80.0, 80.0, "3 of 3 seeds above half at the most asked"),
        measured("half", second, 20.0, 10.0, 40.0),
        measured("half", third, 10.0, 5.0, 20.0),
        measured("state_bits", first, 200_000.0, 200_000.0, 200_000.0),
        measured("state_bits", second, 2_000.0, 2_000.0, 2_000.0),
        measured("state_bits", third, 1_000.0, 1_000.0, 1_000.0),
    )
    return ProbeSection("recall", "MQAR", "", make_probe("mqar").metrics, Summary(found, (), ()))


def test_subjects_that_hold_in_proportion_lie_on_one_line_of_equal_share(quickstart_report: ReportInput) -> None:
    section, arms = held(quickstart_report), arrange(quickstart_report)
    (metric,) = (each for each in section.metrics if each.bound)
    figure = bound_figure("half", section, metric, arms)
    assert figure is not None
    rows = figure.spec["data"]["values"]
    points = {row["name"]: row for row in rows if "name" in row}
    first, second, third = (subject.label for subject in quickstart_report.subjects)
    assert points[second]["share"] == points[third]["share"] == "1.0 %"
    (start, end) = (row for row in rows if row.get("guide") == "1 %")
    assert start["y"] / start["x"] == end["y"] / end["x"] == 0.01
    # What nobody was asked is not known, and said so.
    assert [points[name]["open"] for name in (first, second, third)] == [True, False, False]
    assert "3 of 3 seeds above half" in figure.table.markdown()
    for theme in ("light", "dark"):
        spec = json.dumps(static_spec(figure, arms, theme))
        assert "<svg" in vl_convert.vegalite_to_svg(spec, vl_version=page.VEGA_LITE)


def test_the_most_that_the_bits_allow_is_a_line_above_all(quickstart_report: ReportInput) -> None:
    subject = quickstart_report.subjects[0].label
    (metric,) = (each for each in make_probe("mqar").metrics if each.ceiling)

    def at(name: str, x: float, value: float) -> Measurement:
        return Measurement(name, subject, x, value, value, value, 100, 3, 100)

    found = (
        *(at("load", x, y) for x, y in ((50.0, 0.9), (200.0, 0.5), (400.0, 0.3))),
        *(at("ceiling", x, y) for x, y in ((50.0, 1.0), (200.0, 0.7), (400.0, 0.49))),
    )
    section = ProbeSection("recall", "MQAR", "", make_probe("mqar").metrics, Summary(found, (), ()))
    figures = {
        figure.name: figure for figure in quality_figures(quickstart_report, section, arrange(quickstart_report))
    }
    drawn = figures["recall-load"]
    limit = [(row["x"], row["y"]) for row in drawn.spec["data"]["values"] if row["kind"] == "limit"]
    # It turns where every bit is in use, whoever was asked there.
    assert limit == [(50.0, 1.0), (metric.mark, 1.0), (200.0, 0.7), (400.0, 0.49)]
    assert "Nobody can be above the long dashes" in drawn.caption
    assert "recall-ceiling" not in figures
    spec = json.dumps(static_spec(drawn, arrange(quickstart_report), "light"))
    assert "<svg" in vl_convert.vegalite_to_svg(spec, vl_version=page.VEGA_LITE)


def test_a_name_stands_on_the_side_where_it_runs_over_no_other_subject(quickstart_report: ReportInput) -> None:
    first, second, third = (subject.label for subject in quickstart_report.subjects)
    found = (
        # A bar that reaches down beside the first point, and a point to the right of the second one.
        *(
            measured("half", *each)
            for each in ((first, 6.0, 6.0, 18.0), (second, 80.0, 5.0, 80.7), (third, 80.7, 80, 81))
        ),
        *(
            measured("state_bits", who, bits, bits, bits)
            for who, bits in ((first, 27e3), (second, 30e3), (third, 33e3))
        ),
    )
    section = ProbeSection("recall", "MQAR", "", make_probe("mqar").metrics, Summary(found, (), ()))
    (metric,) = (each for each in section.metrics if each.bound)
    figure = bound_figure("half", section, metric, arrange(quickstart_report))
    assert figure is not None
    left = {row["name"]: row["left"] for row in figure.spec["data"]["values"] if "name" in row}
    assert left == {first: True, second: True, third: False}


def test_a_name_at_the_right_edge_stands_at_the_left_of_its_point(quickstart_report: ReportInput) -> None:
    labels = [subject.label for subject in quickstart_report.subjects]
    places = zip(labels, (100.0, 200.0, 1e6), strict=True)
    found = [measured(name, who, bits, bits, bits) for who, bits in places for name in ("half", "state_bits")]
    section = ProbeSection("recall", "MQAR", "", make_probe("mqar").metrics, Summary(tuple(found), (), ()))
    (metric,) = (each for each in section.metrics if each.bound)
    long = "a name that is as long as half of the chart is wide"
    subjects = [*quickstart_report.subjects[:2], replace(quickstart_report.subjects[2], label=long)]
    found = [replace(each, subject=long) if each.subject == labels[2] else each for each in found]
    section = replace(section, summary=Summary(tuple(found), (), ()))
    figure = bound_figure("half", section, metric, arrange(replace(quickstart_report, subjects=subjects)))
    assert figure is not None
    left = {row["name"]: row["left"] for row in figure.spec["data"]["values"] if "name" in row}
    assert left == {labels[0]: False, labels[1]: False, long: True}


def test_a_subject_whose_state_is_not_known_is_named_and_not_passed_over(quickstart_report: ReportInput) -> None:
    section, first = held(quickstart_report), quickstart_report.subjects[0].label
    kept = tuple(m for m in section.summary.measurements if (m.metric, m.subject) != ("state_bits", first))
    section = replace(section, summary=replace(section.summary, measurements=kept))
    (metric,) = (each for each in section.metrics if each.bound)
    figure = bound_figure("half", section, metric, arrange(quickstart_report))
    assert figure is not None
    assert figure.caption.endswith(f"Not shown, since their state is not known: {first}.")
    assert first not in [row["name"] for row in figure.spec["data"]["values"] if "name" in row]


def test_without_a_known_state_the_loads_stand_alone(quickstart_report: ReportInput) -> None:
    section = held(quickstart_report)
    kept = tuple(m for m in section.summary.measurements if m.metric != "state_bits")
    bare = replace(section, summary=replace(section.summary, measurements=kept))
    (figure,) = (f for f in quality_figures(quickstart_report, bare, arrange(quickstart_report)) if "half" in f.name)
    assert "state" not in figure.caption
    assert "bars go from the lowest to the highest seed" in figure.caption
