"""The table of crossover lengths: every pair, every measure, in words where nothing crosses."""

from __future__ import annotations

from dataclasses import replace

import pytest

from longspan.records.measures import Kind
from longspan.records.observation import Measurement, Metric, Summary
from longspan.report import page
from longspan.report.crossings import crossing_table
from longspan.report.data import ProbeSection, ReportInput, Reproduce, SubjectFacts
from longspan.report.markdown import markdown

LATENCY = Metric("first_token", "Time to first token", "ms", "median", "lower", "context", crossing=True)
RATE = Metric("batch_rate", "Decoding", "tok/s", "median", "higher", "context", crossing=True)
READ = Metric("bandwidth", "Read", "GB/s", "median", "higher", "context")
CONTEXTS = (1024.0, 4096.0, 16384.0)
Values = dict[str, tuple[float | None, ...]]


def report(*measured: tuple[Metric, Values, float]) -> ReportInput:
    """A report of costs alone; a measure is its values at the contexts and the half width of every interval."""
    found = tuple(
        Measurement(metric.name, subject, x, value, value - half, value + half, 3, 3, 1)
        for metric, values, half in measured
        for subject, row in values.items()
        for x, value in zip(CONTEXTS, row, strict=True)
        if value is not None
    )
    names = dict.fromkeys(subject for _, values, _ in measured for subject in values)
    section = ProbeSection(
        "efficiency", "Cost", "", tuple(m for m, _, _ in measured), Summary(found, (), ()), place="cost"
    )
    subjects = [SubjectFacts(name, "") for name in names]
    return ReportInput("costs", "What does it cost?", "now", subjects, [section], Reproduce("", ""))


def rows(given: ReportInput) -> dict[tuple[str, str], tuple[str, ...]]:
    table = crossing_table(given)
    assert table is not None
    return {(row[0], row[1]): row[2:] for row in table.rows}


SIX: Values = {
    "one": (1.0, 4.0, 16.0),
    "two": (2.0, 4.5, 8.0),
    "three": (3.0, 5.0, 7.0),
    "four": (4.0, 4.2, 6.0),
    "five": (5.0, 5.5, 5.8),
    "six": (50.0, 50.0, 50.0),
}


def test_all_pairs_of_six_subjects_are_told() -> None:
    told = rows(report((LATENCY, SIX, 0.0)))
    assert len(told) == 15
    assert all("from" in told["one", other][0] for other in ("two", "three", "four", "five"))
    assert {told[name, "six"] for name in SIX if name != "six"} == {("not crossed (a)",)}


def test_more_is_better_for_a_rate_and_less_for_a_time() -> None:
    values: Values = {"A": (1.0, 2.0, 4.0), "M": (2.0, 2.0, 2.0)}
    (cells,) = rows(report((LATENCY, values, 0.0), (RATE, values, 0.0), (READ, values, 0.0))).values()
    assert cells == ("b from 4,100", "a from 4,100")


@pytest.mark.parametrize(
    ("values", "half", "cell"),
    [
        ({"A": (1.0, 2.0, 4.0), "M": (2.0, 3.0, 3.9)}, 0.2, "b from 15,000 [4,096, 16,384]"),
        ({"A": (1.0, 2.0, 4.0), "M": (1.1, 1.9, 4.1)}, 0.2, "not told apart"),
        ({"A": (1.0, 2.0, 4.0), "M": (1.0, 2.0, 4.0)}, 0.0, "equal"),
        ({"A": (1.0, 2.0, 4.0), "M": (0.5, 1.0, None)}, 0.0, "not crossed (b, 1,024 to 4,096)"),
    ],
)
def test_a_cell_says_what_is_known(values: Values, half: float, cell: str) -> None:
    # A third subject keeps two that are equal in everything measured here apart.
    given = report((LATENCY, values, half), (RATE, {"A": (1.0, 1.0, 1.0), "M": (2.0, 2.0, 2.0)}, 0.0))
    assert rows(given)["A", "M"][0] == cell


def test_what_is_equal_in_everything_has_one_row() -> None:
    values: Values = {"A": (1.0, 2.0, 4.0), "packed A": (1.0, 2.0, 4.0), "M": (2.0, 2.0, 2.0)}
    assert list(rows(report((LATENCY, values, 0.0)))) == [("A", "M")]


def test_one_context_makes_no_table() -> None:
    assert crossing_table(report((LATENCY, {"A": (1.0, None, None), "M": (2.0, None, None)}, 0.0))) is None


def test_page_and_markdown_show_the_table_and_captions_point_to_it() -> None:
    content = page.lay_out(report((LATENCY, SIX, 0.0), (READ, SIX, 0.0)))
    first, read = content.cost
    assert "table of crossover lengths" in first.caption
    assert len(first.caption) < 250
    assert "crossover" not in read.caption
    html, text = page.html(content), markdown(content)
    for shown in (html, text):
        assert shown.count("Crossover lengths (tokens)") == 1
        assert "not crossed (a)" in shown
    bare = page.lay_out(replace(content.report, probes=[]))
    assert "Crossover" not in page.html(bare)


@pytest.mark.parametrize(("kind", "low", "words"), [
    ("median", 1.5, "Lower is better; bars are quartiles over repeats. The axis"),
    ("median", 2.0, "Lower is better. The axis"),
    ("exact", 2.0, "Lower is better. The axis"),
    ("ratio", None, "Lower is better. The axis"),
])  # fmt: skip
def test_a_caption_tells_of_bars_only_where_there_are_some(kind: Kind, low: float | None, words: str) -> None:
    number = replace(LATENCY, name="fixed", kind=kind, x_name=None, crossing=False)
    found = Measurement("fixed", "A", None, 2.0, low, 2.0, 3, 1, 3)
    section = ProbeSection("efficiency", "Cost", "", (number,), Summary((found,), (), ()), place="cost")
    (figure,) = page.lay_out(replace(report(), probes=[section], subjects=[SubjectFacts("A", "")])).cost
    assert words in figure.caption


@pytest.mark.parametrize(("runs", "words"), [
    ((1, 1), "Single runs, without bands."),
    ((3, 1), "Medians over repeats; bands are their quartiles, and single runs have none."),
    ((3, 3), "Medians over repeats; bands are their quartiles."),
])  # fmt: skip
def test_a_caption_tells_of_quartiles_only_where_runs_were_repeated(runs: tuple[int, int], words: str) -> None:
    points = tuple(
        Measurement(LATENCY.name, "A", x, 2.0, 2.0, 2.0, n, 1, n) for x, n in zip((1024.0, 2048.0), runs, strict=True)
    )
    section = ProbeSection("efficiency", "Cost", "", (LATENCY,), Summary(points, (), ()), place="cost")
    (figure,) = page.lay_out(replace(report(), probes=[section], subjects=[SubjectFacts("A", "")])).cost
    assert f"better. {words}" in f"{figure.caption} "


def test_a_change_of_order_at_a_measured_context_is_a_crossing() -> None:
    (cell,) = rows(report((LATENCY, {"A": (1.0, 2.0, 4.0), "M": (2.0, 2.0, 2.0)}, 0.0))).values()
    assert cell == ("b from 4,100",)
