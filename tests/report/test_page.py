from __future__ import annotations

import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
import vl_convert

from longspan.records.observation import Summary
from longspan.report import charts, page
from longspan.report.content import compared_units
from longspan.report.data import ReportInput, Reproduce, SubjectFacts
from longspan.report.figure import static_spec
from longspan.report.tables import summary_rows

SECTIONS = [
    "answer",
    "subjects",
    "quality",
    "cost",
    "pareto",
    "comparisons",
    "training",
    "inside",
    "ledger",
    "reproduce",
]


class Elements(HTMLParser):
    """Every element's name and attributes, in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


@pytest.fixture(scope="module")
def content(quickstart_report: ReportInput) -> page.Content:
    return page.lay_out(quickstart_report)


@pytest.fixture(scope="module")
def html(content: page.Content) -> str:
    return page.html(content)


def test_every_section_is_there_in_order(html: str) -> None:
    assert [a["id"] for tag, a in Elements(html).found if tag == "section"] == SECTIONS


def test_the_page_loads_nothing_from_anywhere(html: str) -> None:
    for tag, attributes in Elements(html).found:
        assert tag not in ("link", "iframe", "object", "embed", "img"), (tag, attributes)
        assert "src" not in attributes, (tag, attributes)
        if tag == "a":
            assert str(attributes["href"]).startswith(("#", "data:text/csv")), attributes
    assert "@import" not in html
    assert "default-src 'none'" in html
    assert "url(" not in html[: html.index("</style>")]


def test_hostile_text_stays_text(html: str) -> None:
    tags = [tag for tag, _ in Elements(html).found]
    assert "img" not in tags
    assert tags.count("script") == 4
    assert "<script>alert" not in html
    data = re.search(r'id="item-data">(.*?)</script>', html, re.DOTALL)
    assert data
    assert json.loads(data.group(1))["rows"][-1]["asked"].startswith("</script><script>alert('x')")


def test_hostile_names_are_escaped_on_the_page_and_in_markdown() -> None:
    bad = "<script>alert(1)</script>|`x`"
    report = ReportInput(bad, bad, bad, [SubjectFacts(bad, "AM")], [], Reproduce(bad, "```\n" + bad), notes=[bad])
    laid_out = page.lay_out(report)
    assert "<script>alert" not in page.html(laid_out)
    assert "<script>alert" not in re.sub(
        r"````.*?````|```sh.*?```|`[^`]*`", "", page.markdown(laid_out), flags=re.DOTALL
    )


def test_a_layer_of_mixers_side_by_side_is_one_cell_in_two_colours(quickstart_report: ReportInput) -> None:
    subject = replace(
        quickstart_report.subjects[0], letters="A[AM]M", mixers=("attention", "[attention+mamba2]", "mamba2")
    )
    text = page.html(page.lay_out(replace(quickstart_report, subjects=[subject, *quickstart_report.subjects[1:]])))
    assert "--m-[" not in text
    single, double = page._cells("A[AM]", ("attention", "[attention+mamba2]"))
    assert single == ("A", "--c:var(--m-attention)")
    assert double[0] == "AM"
    assert "linear-gradient(var(--way),var(--m-attention) 0 50%,var(--m-mamba2) 0 100%)" in double[1]


def test_a_letter_that_means_two_mixers_is_shown_as_both(quickstart_report: ReportInput) -> None:
    first, second, *rest = quickstart_report.subjects
    two = [
        replace(first, label="one · MM", letters="MM", mixers=("mamba2", "mamba2")),
        replace(second, label="two · MM", letters="MM", mixers=("gated_short_convolution",) * 2),
    ]
    text = page.html(page.lay_out(replace(quickstart_report, subjects=[*two, *rest])))
    section = text[text.index('<section id="subjects"') :]
    key = section[: section.index("</div>")]
    assert "</b></span> mamba2</span>" in key
    assert "</b></span> gated_short_convolution</span>" in key
    # Their layers stand beside names that are no bare pattern, each in the colour of its own mixer.
    assert 'title="mamba2, mamba2"' in section
    cells = '<b style="--c:var(--m-gated-5f-short-5f-convolution)">M</b>' * 2
    assert f'title="gated_short_convolution, gated_short_convolution">{cells}' in section
    assert "--m-gated-5f-short-5f-convolution: #" in text


def test_every_chart_draws_in_both_themes(content: page.Content) -> None:
    shown = {figure.name: figure for figure in content.figures}
    assert {"answer", "position-curve-nll", "state-bytes", "pareto-state-bytes", "training-loss"} <= shown.keys()
    for name, theme in (("answer", "light"), ("position-curve-nll", "dark"), ("training-grad-norm", "light")):
        spec = static_spec(shown[name], content.arms, theme)
        assert "var(--" not in json.dumps(spec)
        assert "<svg" in vl_convert.vegalite_to_svg(json.dumps(spec), vl_version=page.VEGA_LITE)


def test_panels_draw(leakage_report: ReportInput) -> None:
    laid_out = page.lay_out(leakage_report)
    figure = next(f for f in laid_out.figures if f.name == "position-curve-nll")
    assert figure.panels == 4
    assert "<svg" in vl_convert.vegalite_to_svg(
        json.dumps(static_spec(figure, laid_out.arms)), vl_version=page.VEGA_LITE
    )
    names = [f.name for f in laid_out.comparisons]
    assert "perplexity-bits-per-byte-differences-effects" in names


def test_the_same_input_gives_the_same_page(quickstart_report: ReportInput, html: str) -> None:
    assert page.html(page.lay_out(quickstart_report)) == html


def test_files_are_written_and_the_markdown_links_to_them(quickstart_report: ReportInput, tmp_path: Path) -> None:
    short = replace(quickstart_report, probes=quickstart_report.probes[:1], training=[], subjects=[
        replace(s, state_bytes={}, forward_flops={}, training_flops=None) for s in quickstart_report.subjects
    ])  # fmt: skip
    assert page.write_report(short, tmp_path / "out") == tmp_path / "out" / "report.html"
    text = (tmp_path / "out" / "report.md").read_text()
    links = re.findall(r"\]\(([^)#]+)", text)
    assert "figures/answer.svg" in links
    for link in links:
        assert (tmp_path / "out" / link).is_file(), link
    assert not list((tmp_path / "out").glob(".*"))


def test_what_both_subjects_were_asked_is_called_by_its_name(quickstart_report: ReportInput) -> None:
    first, *rest = quickstart_report.probes
    strings = replace(first, metrics=tuple(replace(each, counted="strings") for each in first.metrics))
    assert compared_units(quickstart_report) == "documents"
    assert compared_units(replace(quickstart_report, probes=[strings, *rest])) == "strings and documents"
    assert "on the same strings for both" in page.html(page.lay_out(replace(quickstart_report, probes=[strings])))


def test_empty_sections_say_why(quickstart_report: ReportInput) -> None:
    bare = replace(quickstart_report, subjects=[], probes=[], training=[], ledger=[], items=[], context=None)
    text = page.html(page.lay_out(bare))
    assert text.count('class="empty"') == 8
    assert "no probe has results yet" in text


def test_values_without_intervals_draw_and_are_marked(quickstart_report: ReportInput) -> None:
    sections = [
        replace(p, summary=Summary(
            tuple(replace(m, low=None, high=None) for m in p.summary.measurements),
            tuple(replace(c, low=None, high=None, p=None, p_holm=None, mde=None) for c in p.summary.comparisons), ()))
        for p in quickstart_report.probes
    ]  # fmt: skip
    laid_out = page.lay_out(replace(quickstart_report, probes=sections))
    assert laid_out.decision.verdict == "undecided"
    for name in ("position-curve-nll", "perplexity-bits-per-byte-differences"):
        figure = next(f for f in laid_out.figures if f.name == name)
        spec = json.dumps(static_spec(figure, laid_out.arms), allow_nan=False)
        assert "<svg" in vl_convert.vegalite_to_svg(spec, vl_version=page.VEGA_LITE)


def test_an_interval_that_says_nothing_does_not_flatten_the_others(quickstart_report: ReportInput) -> None:
    section = quickstart_report.probes[2]
    gains = [m for m in section.summary.measurements if m.metric == "long_range_gain"]
    wild = replace(gains[0], low=-1.0, high=1.0)
    summary = replace(section.summary, measurements=(wild, *gains[1:]))
    laid_out = page.lay_out(replace(quickstart_report, probes=[replace(section, summary=summary)]))
    figure = next(f for f in laid_out.figures if f.name.endswith("long-range-gain"))
    line = next(layer for layer in figure.spec["layer"] if layer["mark"]["type"] == "line")
    assert max(map(abs, line["encoding"]["y"]["scale"]["domain"])) < 0.9


def test_a_page_of_thousands_of_comparisons_stays_small_and_loses_none(
    quickstart_report: ReportInput, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Its figures are drawn by other tests.
    monkeypatch.setattr(vl_convert, "vegalite_to_svg", lambda spec, vl_version: "")
    monkeypatch.setattr(vl_convert, "svg_to_png", lambda svg, scale: b"")
    section = quickstart_report.probes[0]
    first = section.summary.comparisons[0]
    many = tuple(replace(first, a=f"arm {i}", b=f"arm {i + 1}", p_holm=1 - i / 4000) for i in range(3000))
    summary = replace(section.summary, comparisons=(*section.summary.comparisons, *many))
    large = replace(quickstart_report, probes=[replace(section, summary=summary)])
    size = page.write_report(large, tmp_path).stat().st_size
    alone = page.write_report(replace(quickstart_report, probes=[section]), tmp_path / "alone").stat().st_size
    assert size < alone + 200_000
    text = (tmp_path / "report.html").read_text()
    assert "The first 120 of" in text
    # The clearest come first.
    assert "arm 2999" in text
    assert "arm 1000<" not in text
    (data,) = (tmp_path / "figures").glob("*.csv")
    assert f'href="figures/{data.name}"' in text
    assert len(data.read_text().splitlines()) > 3000
    assert (tmp_path / "report.md").stat().st_size < 200_000


def test_probes_that_measure_the_same_are_told_apart_in_the_terminal_table(quickstart_report: ReportInput) -> None:
    first = quickstart_report.probes[0]
    twice = replace(quickstart_report, probes=[first, replace(first, kind="perplexity_as_trained")])
    headings = [name for name, _ in summary_rows(twice).headings]
    assert headings[3:5] == ["Bits per byte (perplexity)", "Bits per byte (perplexity_as_trained)"]


def test_the_terminal_table_has_the_best_subject_first(quickstart_report: ReportInput) -> None:
    table = summary_rows(quickstart_report)
    assert [name for name, _ in table.headings][:4] == ["subject", "mixers", "parameters", "Bits per byte"]
    assert table.subjects[0] == "AMAM"
    assert "±" in table.rows[0][3]
    assert table.markdown().count("\n") == 4
    assert table.csv().startswith("subject,")


def test_the_lead_says_what_is_held_equal(quickstart_report: ReportInput) -> None:
    subjects = [replace(s, match_quantity="training_flops_per_token") for s in quickstart_report.subjects]
    text = page.subjects_lead(replace(quickstart_report, subjects=subjects))
    assert "They are matched in training flops per token; the worst match is off by 0.11 %" in text
    assert "not matched" not in text


def test_the_lead_says_how_many_are_not_matched(quickstart_report: ReportInput) -> None:
    first, *rest = (replace(s, match_quantity="parameters", match_residual=0.001) for s in quickstart_report.subjects)
    unmatched = [replace(s, match_quantity="", match_residual=None) for s in rest]
    text = page.subjects_lead(replace(quickstart_report, subjects=[first, *unmatched]))
    assert "1 of them is matched in parameters; the worst match is off by 0.10 %. The others are not matched." in text


def test_subjects_of_the_same_model_are_named_beside_its_bar(quickstart_report: ReportInput) -> None:
    first, *others = quickstart_report.subjects
    bars = page._parts(replace(quickstart_report, subjects=[first, replace(first, label="again"), *others]))
    assert [bar["label"] for bar in bars] == [subject.label for subject in quickstart_report.subjects]
    assert [bar["alike"] for bar in bars] == ["also again", "", ""]


def test_an_axis_that_starts_at_zero_is_not_said_to_start_elsewhere() -> None:
    rows = [{"value": 0.4, "low": 0.02, "high": 0.9}]
    assert charts.dots_domain(rows, percent=True)[0] == 0.0
    assert charts.dots_domain([{"value": 0.8, "low": 0.7, "high": 0.9}], percent=True)[0] > 0.6
    assert charts.dots_domain(rows, percent=False)[0] < 0.0
