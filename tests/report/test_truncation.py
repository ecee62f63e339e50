"""What cuts left of documents is drawn under every accuracy against context, with its floors, and tabled whole."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import vl_convert

from longspan.foundation.randomness import numpy_generator
from longspan.probes.base import make_probe
from longspan.records.observation import Summary, summarise
from longspan.records.store import Record
from longspan.report import figures, page, truncation
from longspan.report.arms import arrange
from longspan.report.data import ProbeSection, ReportInput
from longspan.report.figure import static_spec

SUBJECTS = ("AAAA", "MMMM", "AMAM")
PROBE = make_probe("longbench_v2", {})


def record(subject: str, number: int, context: int, *, cut: bool) -> Record:
    draw = numpy_generator(3, subject, number, context).random()
    gold = "ABCC"[number % 4]
    answer = {
        "id": str(number),
        "gold": gold,
        "context": context,
        "difficulty": "easy" if number % 2 else "hard",
        "length": ("short", "medium", "long")[number % 3],
        "response": f"The correct answer is ({gold if draw < 0.35 else 'D'})." if draw < 0.9 else "",
    }
    if cut:
        share = min(1.0, context / 4096 / (1 + number % 6))
        answer["truncation"] = {"kept_fraction": share, "fully_visible": share == 1.0}
    return Record.make(
        probe="longbench_v2", protocol={}, item=f"{number}@{context}", subject=subject, seed=0, fingerprint="f",
        answer=answer,
    )  # fmt: skip


def section(name: str, contexts: tuple[int, ...], *, cut: bool) -> ProbeSection:
    records = [record(s, n, c, cut=cut) for s in SUBJECTS for c in contexts for n in range(40)]
    observations = [seen for each in records for seen in PROBE.observe(each)]
    summary: Summary = summarise(observations, PROBE.metrics, resamples=2_000)
    return ProbeSection(name, PROBE.title, PROBE.explanation, PROBE.metrics, summary)


@pytest.fixture(scope="module")
def report(quickstart_report: ReportInput) -> ReportInput:
    cut = section("longbench_v2", (8192, 16384, 32768), cut=True)
    return replace(quickstart_report, probes=[cut, section("without", (8192,), cut=False)], context=None)


def test_the_underlay_holds_what_was_seen_and_both_floors(report: ReportInput) -> None:
    first, without = report.probes
    under = truncation.underlay(report, first, first.metrics[0])
    assert under is not None
    assert list(under.seen) == [8192.0, 16384.0, 32768.0]
    kept = [share for share, _ in under.seen.values()]
    assert kept == sorted(kept)
    assert under.seen[32768.0] == (1.0, 1.0)
    assert under.constant == 0.5
    assert set(under.floors) == set(SUBJECTS)
    assert truncation.underlay(report, without, without.metrics[0]) is None
    assert truncation.underlay(report, first, next(m for m in first.metrics if m.name == "null_rate")) is None


def test_every_accuracy_is_drawn_on_it_and_details_have_a_table_instead(report: ReportInput) -> None:
    arms = arrange(report)
    drawn = figures.quality_figures(report, report.probes[0], arms)
    assert [figure.title for figure in drawn] == ["Accuracy (strict)", "No answer"]
    accuracy, nulls = drawn
    assert "share of the documents that was seen" in accuracy.caption
    assert "always saying the most frequent right letter (50.0 %)" in accuracy.caption
    assert "without any document" in accuracy.caption
    assert "seen" not in nulls.caption
    for theme in ("light", "dark"):
        assert "<svg" in vl_convert.vegalite_to_svg(
            json.dumps(static_spec(accuracy, arms, theme)), vl_version=page.VEGA_LITE
        )
    table = figures.scalar_table(report.probes[0], arms)
    assert table is not None
    headings = [name for name, _ in table.headings]
    assert headings[:4] == ["subject", "context", "Accuracy (strict)", "Accuracy on answered"]
    assert {"Compensated accuracy", "Share of document seen", "Accuracy, easy", "Said D", "C is right"} <= set(headings)
    # Causes of missing answers stand there where they occurred, here only replies with nothing in them.
    assert [name for name in headings if name.startswith("No answer: ")] == ["No answer: empty"]
    assert len(table.rows) == 9
    assert table.rows[0][:2] == ("AAAA", "8,192")


def test_the_floor_is_that_of_the_probe_that_asks_once_and_the_other_way_round(report: ReportInput) -> None:
    first, without = report.probes
    again = make_probe("longbench_v2", {"re_ask": True})
    assert {metric.name for metric in again.metrics} > {metric.name for metric in PROBE.metrics}
    for cut, floor in ((again.metrics, PROBE.metrics), (PROBE.metrics, again.metrics)):
        mixed = replace(report, probes=[replace(first, metrics=cut), replace(without, metrics=floor)])
        under = truncation.underlay(mixed, mixed.probes[0], mixed.probes[0].metrics[0])
        assert under is not None
        assert set(under.floors) == set(SUBJECTS)
    other = make_probe("ada_leval", {"files": {1000: "x"}}).metrics
    mixed = replace(report, probes=[first, replace(without, metrics=other)])
    under = truncation.underlay(mixed, first, first.metrics[0])
    assert under is not None
    assert not under.floors


def test_remarks_of_a_probe_stand_below_its_table_escaped(report: ReportInput) -> None:
    told = replace(report, probes=[replace(report.probes[0], remarks=("a <b> remark",)), report.probes[1]])
    content = page.lay_out(told)
    assert "a &lt;b&gt; remark</p>" in page.html(content)
    assert "a <b> remark" not in page.html(content)
    assert "remark" in page.markdown(content)
    assert "a <b> remark" not in page.markdown(content)


def test_panels_have_the_same_ground(report: ReportInput, leakage_report: ReportInput) -> None:
    labels = [subject.label for subject in leakage_report.subjects]
    records = [record(s, n, c, cut=True) for s in labels[:2] for c in (8192, 32768) for n in range(6)]
    summary = summarise([o for each in records for o in PROBE.observe(each)], PROBE.metrics, resamples=2_000)
    crossed = replace(
        leakage_report, probes=[replace(report.probes[0], summary=summary)], context=None, training=[], items=[]
    )
    arms = arrange(crossed)
    (accuracy, _) = figures.quality_figures(crossed, crossed.probes[0], arms)
    assert "facet" in accuracy.spec
    assert "<svg" in vl_convert.vegalite_to_svg(json.dumps(static_spec(accuracy, arms)), vl_version=page.VEGA_LITE)
