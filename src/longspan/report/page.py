"""Writes the report: one self-contained page, a Markdown twin, and the figures as SVG and PNG."""

from __future__ import annotations

import base64
import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
import vl_convert
from markupsafe import Markup

from longspan.foundation.files import atomic_directory, atomic_write
from longspan.report import crossings, numbers, palette, tables
from longspan.report.arms import Arms
from longspan.report.content import VERDICTS, Content, compared_units, lay_out, same, subject_notes, subjects_lead
from longspan.report.data import ReportInput, SubjectFacts, to_json
from longspan.report.figure import FONT, THEMES, Figure, static_spec
from longspan.report.markdown import markdown
from longspan.report.tables import Table

VEGA_LITE = "6.4"
_EXPORTS = "window.vegaEmbed = vegaEmbed;"
CONTENTS = (
    ("answer", "Answer"), ("subjects", "Subjects"), ("quality", "Quality against context"),
    ("cost", "Cost against context"), ("pareto", "Quality against cost"), ("comparisons", "Comparisons"),
    ("training", "Training"), ("inside", "Look inside"), ("ledger", "Ledger"), ("reproduce", "Reproduce"),
)  # fmt: skip


def write_report(report: ReportInput, folder: Path, *, files: bool = True) -> Path:
    """Write `report.html`, `report.md` and `figures/` into a folder; the same input gives the same bytes.

    Args:
        folder: made if missing; older reports in it are replaced, each file whole or not at all.
        files: whether to draw the figure files (the slower part) and the Markdown that shows them.

    Returns:
        The path of the page.
    """
    content = lay_out(report)
    if files:
        with atomic_directory(folder / "figures") as target:
            for figure in content.figures:
                _write_figure(figure, content.arms, target)
        with atomic_write(folder / "report.md") as file:
            file.write(markdown(content))
    page = folder / "report.html"
    with atomic_write(page) as file:
        file.write(html(content))
    return page


def _write_figure(figure: Figure, arms: Arms, folder: Path) -> None:
    spec = json.dumps(static_spec(figure, arms))
    svg = vl_convert.vegalite_to_svg(spec, vl_version=VEGA_LITE)
    (folder / f"{figure.name}.svg").write_text(svg, encoding="utf-8")
    (folder / f"{figure.name}.png").write_bytes(vl_convert.svg_to_png(svg, scale=2))
    if figure.table.is_large:
        (folder / f"{figure.name}.csv").write_text(figure.table.csv_text, encoding="utf-8")


# --- the page ---------------------------------------------------------------------------------------------------------


def html(content: Content) -> str:
    """The page as text: styles, charts, data and the chart library inside, nothing loaded from anywhere."""
    report, arms = content.report, content.arms
    letters = _letters(report)
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("longspan.report"),
        autoescape=True,
        trim_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters["data_uri"] = _data_uri
    environment.filters["lone"] = _lone
    environment.filters["unbroken"] = _unbroken
    environment.filters["cells"] = _cells
    template = environment.get_template("report.html.j2")
    text: str = template.render(
        report=report,
        arms=arms,
        most_rows=tables.MOST_ROWS,
        decision=content.decision,
        by_label={s.label: s for s in report.subjects},
        mixers=letters,
        contents=CONTENTS,
        verdict_names=VERDICTS,
        facts=_facts(report),
        subjects_lead=subjects_lead(report),
        subjects_table=tables.subjects_table(report),
        state_table=tables.state_table(report),
        training_table=tables.training_cost_table(report),
        subject_notes=subject_notes(report),
        parts=_parts(report),
        part_key=[(name, shade) for name, shade in _PARTS],
        answer_figures=content.answer,
        quality=content.quality,
        cost_figures=content.cost,
        crossing_table=content.crossings,
        crossing_text=crossings.EXPLANATION,
        cost_notes=[s.empty_because for s in report.probes if s.place == "cost" and s.empty_because],
        pareto_figures=content.pareto,
        comparison_figures=content.comparisons,
        compared_units=compared_units(report),
        training_figures=content.training,
        ledger=content.ledger,
        item_probes=list(dict.fromkeys(row.probe for row in report.items)),
        item_xs=[(f"{x:.0f}", numbers.count(x)) for x in sorted({r.x for r in report.items if r.x is not None})],
        css=Markup(_styles(arms, letters)),
        charts_json=_script_json(
            {
                f.name: {"spec": f.spec, "label": f.label_width, "panels": f.panels, "least": f.least}
                for f in content.figures
            }
        ),
        items_json=_script_json({"rows": to_json(report.items), "colours": {s: arms[s].variable for s in arms.labels}}),
        bundle=Markup(_bundle()),
        script=Markup(_template_text("report.js")),
    )
    return text


@functools.cache
def _bundle() -> str:
    """Vega, Vega-Lite and Vega-Embed as one script, in a scope of its own."""
    script: str = vl_convert.javascript_bundle(_EXPORTS, vl_version=VEGA_LITE)
    return "(()=>{" + script.replace("</script", "<\\/script") + "})();"


def _template_text(name: str) -> str:
    return (Path(__file__).parent / "templates" / name).read_text(encoding="utf-8")


def _script_json(value: Any) -> Markup:
    """JSON that cannot end the script element it stands in, whatever text it holds."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    for mark, code in (
        ("<", "\\u003c"),
        (">", "\\u003e"),
        ("&", "\\u0026"),
        ("\u2028", "\\u2028"),
        ("\u2029", "\\u2029"),
    ):
        text = text.replace(mark, code)
    return Markup(text)


def _styles(arms: Arms, letters: Sequence[tuple[str, str]]) -> str:
    text = _template_text("report.css").replace("FONT", FONT)
    for theme in ("light", "dark"):
        colours = [f"--{name}: {colour};" for name, colour in THEMES[theme].items()]
        colours += [f"{name}: {getattr(shade, theme)};" for name, shade in arms.shades.items()]
        mixers = dict.fromkeys(["attention", "mamba2", *(mixer for _, mixer in letters)])
        colours += [f"{_variable(mixer)}: {getattr(palette.mixer_shade(mixer), theme)};" for mixer in mixers]
        text = text.replace(theme.upper(), " ".join(colours))
    return text


def _letters(report: ReportInput) -> list[tuple[str, str]]:
    """Every layer letter in the report with its true mixer; a letter that means two things stands there twice."""
    named = (palette.letter_names(s.letters, s.mixers) for s in report.subjects)
    return list(dict.fromkeys(pair for names in named for pair in names.items()))


def _cells(letters: str, mixers: Sequence[str]) -> list[tuple[str, Markup]]:
    """The cells of a pattern strip: what is written in each layer's cell and its style, split where mixers share it."""
    cells = []
    for number, layer in enumerate(palette.split_layers(letters)):
        inside = layer.strip("[]")
        names = palette.letter_names(layer, mixers[number : number + 1])
        colours = [f"var({_variable(names[letter])})" for letter in inside]
        style = f"--c:{colours[0]}"
        if len(inside) > 1:
            bands = [f"{colour} 0 {100 * (i + 1) / len(inside):.4g}%" for i, colour in enumerate(colours)]
            style = f"--n:{len(inside)};background:linear-gradient(var(--way),{','.join(bands)})"
        cells.append((inside, Markup(style)))
    return cells


def _variable(mixer: str) -> str:
    """The CSS variable of a mixer's colour."""
    return "--m-" + "".join(c if c.isascii() and c.isalnum() else f"-{ord(c):x}-" for c in mixer)


def _data_uri(table: Table) -> str:
    return "data:text/csv;charset=utf-8;base64," + base64.b64encode(table.csv_text.encode()).decode()


def _lone(found: Sequence[Figure]) -> list[tuple[Figure, bool]]:
    """Figures with whether a half-width one has no partner beside it."""
    out: list[tuple[Figure, bool]] = []
    index = 0
    while index < len(found):
        if found[index].half and index + 1 < len(found) and found[index + 1].half:
            out += [(found[index], False), (found[index + 1], False)]
            index += 2
        else:
            out.append((found[index], True))
            index += 1
    return out


def _unbroken(text: str) -> str:
    """Numbers that no line break takes from their interval or unit."""
    return text.replace(" ± ", "\u00a0±\u00a0").replace(" %", "\u00a0%").replace(" pp", "\u00a0pp")


def _facts(report: ReportInput) -> list[tuple[str, str]]:
    tokens = same(report, lambda s: s.tokens_trained)
    seeds = {len(s.seeds) for s in report.subjects if s.seeds}
    found = [
        ("subjects", str(len(report.subjects))),
        ("seeds per subject", "–".join(map(str, sorted({min(seeds), max(seeds)}))) if seeds else ""),
        (
            "training context" if any(s.kind == "trained" for s in report.subjects) else "context",
            numbers.count(report.context) if report.context else "",
        ),
        ("tokens trained on", numbers.scaled(tokens) if tokens else ""),
        ("tokenizer", report.tokenizer),
        (
            "device, precision",
            ", ".join(filter(None, [same(report, lambda s: s.device), same(report, lambda s: s.dtype)])),
        ),
    ]
    return [(name, value) for name, value in found if value]


_PARTS = (("embedding", "var(--line)"), ("mixers", "var(--ink)"), ("MLP", "var(--soft)"), ("rest", "var(--grid)"))


def _parts(report: ReportInput) -> list[dict[str, Any]]:
    """Bars of parameters by part, one for each different model; subjects of the same model are named beside it."""
    largest = max((s.parameters.total for s in report.subjects if s.parameters), default=0)
    models: dict[Any, list[SubjectFacts]] = {}
    for s in report.subjects:
        if s.parameters is not None:
            models.setdefault((s.letters, s.parameters), []).append(s)
    bars = []
    for (_, p), (first, *others) in models.items():
        sizes = (p.embedding, p.mixers, p.mlp, max(0, p.total - p.embedding - p.mixers - p.mlp))
        shares = [(f"{name}: {numbers.scaled(size)}", round(100 * size / largest, 2), shade)
                  for (name, shade), size in zip(_PARTS, sizes, strict=True)]  # fmt: skip
        alike = f"also {others[0].label}" if len(others) == 1 else f"and {len(others)} others" if others else ""
        bars.append({"label": first.label, "shares": shares, "total": numbers.scaled(p.total), "alike": alike})
    return bars
