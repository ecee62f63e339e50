"""The Markdown twin of the page: figures as files, tables as text."""

from __future__ import annotations

from collections.abc import Sequence

from longspan.report import crossings, tables
from longspan.report.content import VERDICTS, Content, subject_notes, subjects_lead
from longspan.report.figure import Figure
from longspan.report.tables import markdown_text


def markdown(content: Content) -> str:
    """The same report for a repository: figures as files, tables as text."""
    report, decision = content.report, content.decision
    out = [f"# {markdown_text(report.question)}", ""]
    variant = f", {markdown_text(report.variant)}" if report.variant else ""
    when = markdown_text(report.created)
    out += [
        f"Study **{markdown_text(report.study)}**{variant}, {when}. Interactive: [report.html](report.html)",
        "",
    ]
    out += [f"**{VERDICTS[decision.verdict]}.** {markdown_text(decision.answer)}", ""]
    out += [markdown_text(decision.certainty), ""] if decision.certainty else []
    out += [*(f"- {markdown_text(line)}" for line in (*decision.also, *report.notes)), ""]
    out += _markdown_figures(content.answer)
    out += ["## Subjects", "", markdown_text(subjects_lead(report)), ""]
    for table in (tables.subjects_table(report), tables.state_table(report), tables.training_cost_table(report)):
        out += [table.markdown(), ""] if len(table.columns) > 1 else []
    out += [*(markdown_text(line) + "\n" for line in subject_notes(report))]
    out += ["## Quality against context", ""]
    for part in content.quality:
        out += [f"### {markdown_text(part.section.title)}", "", markdown_text(part.section.explanation), ""]
        out += _markdown_figures(part.figures)
        out += [part.table.markdown(), ""] if part.table else []
        out += [line for remark in part.section.remarks for line in (markdown_text(remark), "")]
        if not (part.figures or part.table):
            out += [markdown_text(part.section.empty_because or "This probe has no results yet."), ""]
    for title, found, empty in (
        ("Cost against context", content.cost, "No cost is known at more than one context."),
        ("Quality against cost", content.pareto, "There is nothing to weigh."),
        ("Comparisons", content.comparisons, "There is nothing to compare."),
        ("Training", content.training, "Nothing was trained."),
    ):
        out += [f"## {title}", "", *(_markdown_figures(found) or [empty, ""])]
        if found is content.cost and content.crossings:
            out += ["**Crossover lengths (tokens)**", "", crossings.EXPLANATION, ""]
            out += [content.crossings.shortened().markdown(), ""]
    out += ["## Look inside", "", f"{len(report.items):,} items: see [report.html](report.html#inside).", ""]
    out += ["## Ledger", ""]
    for entry in content.ledger:
        mark = "**Warning**, " if entry.entry.level == "warning" else ""
        out += [f"- {mark}{markdown_text(entry.entry.topic)}: {markdown_text(entry.entry.text)}"]
        out += ["", *("  " + line for line in entry.table.markdown().splitlines()), ""] if entry.table else []
    out += ["" if content.ledger else "Nothing was dropped, skipped or warned about.\n", "## Reproduce", ""]
    out += [_fenced(report.reproduce.command, "sh"), ""]
    for title in ("versions", "hardware", "git", "hashes"):
        values: dict[str, str] = getattr(report.reproduce, title)
        if values:
            out += [
                f"**{title.capitalize()}**: "
                + ", ".join(f"{markdown_text(k)} {markdown_text(v)}" for k, v in values.items()),
                "",
            ]
    out += [
        "<details><summary>The resolved study</summary>",
        "",
        _fenced(report.reproduce.study_yaml, "yaml"),
        "",
        "</details>",
        "",
    ]
    return "\n".join(out)


def _markdown_figures(found: Sequence[Figure]) -> list[str]:
    out = []
    for f in found:
        out += [f"**{markdown_text(f.title)}**", "", f"![{markdown_text(f.title)}](figures/{f.name}.svg)", ""]
        out += [
            f"{markdown_text(f.caption)} ([PNG](figures/{f.name}.png))",
            "",
            "<details><summary>Table</summary>",
            "",
        ]
        out += [f.table.shortened().markdown(), ""]
        if len(f.table.rows) > tables.MOST_ROWS:
            out += [f"The first {tables.MOST_ROWS} of {len(f.table.rows):,} rows.", ""]
        out += [f"[All data (CSV)](figures/{f.name}.csv)", ""] if f.table.is_large else []
        out += ["</details>", ""]
    return out


def _fenced(text: str, language: str) -> str:
    fence = "```"
    while fence in text:
        fence += "`"
    return f"{fence}{language}\n{text.rstrip()}\n{fence}"
