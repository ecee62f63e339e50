"""The tables of keys in the documentation are those of the code, default by default."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from pydantic import BaseModel

from longspan.corpus.dedup import DedupConfig
from longspan.corpus.prepare import SplitConfig
from longspan.corpus.sources import HuggingFaceSource, JsonlSource, SyntheticSource, TextSource, WikipediaSource
from longspan.engines.source import EndpointArguments, ModelSource, TransformersArguments, VllmArguments
from longspan.foundation.errors import UserError
from longspan.models.matching import MatchConfig
from longspan.probes import base as probes
from longspan.study.sections import SECTIONS

DOCS = Path(__file__).parents[1] / "docs"

TABLES: dict[str, type[BaseModel]] = {
    **SECTIONS,
    "corpus.splits": SplitConfig,
    "corpus.dedup": DedupConfig,
    "model.match": MatchConfig,
    **{
        f"probes.{kind}": probe
        for kind, probe in probes.registered().items()
        if probe.__module__.startswith("longspan")
    },
}


def default_of(model: type[BaseModel], name: str) -> str:
    """A default as the tables show it."""
    field = model.model_fields[name]
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    if isinstance(value, BaseModel):
        return "below"
    return f"`{value if isinstance(value, str) else json.dumps(value)}`"


def table_below(page: str, heading: str) -> dict[str, str]:
    """key -> default of the first table under a heading."""
    (text,) = re.findall(rf"^#+ {re.escape(heading)}\n(.*?)(?=^#|\Z)", (DOCS / page).read_text("utf-8"), re.M | re.S)
    rows = [[cell.strip() for cell in row.strip("|").split("|")] for row in re.findall(r"^\| `.*$", text, re.M)]
    return {row[0].strip("`"): row[1] for row in rows if row[0].count("`") == 2}


@pytest.mark.parametrize("section", TABLES)
def test_key_tables_equal_the_code(section: str) -> None:
    model = TABLES[section]
    shown = table_below("write-a-study.md", f"`{section}`")
    names = [name for name in model.model_fields if name != "kind" or not section.startswith("probes.")]
    if section == "corpus":
        shown = {key: default for key, default in shown.items() if key in names}
    assert shown == {name: default_of(model, name) for name in names}


@pytest.mark.parametrize(
    ("heading", "model", "base"),
    [
        ("transformers", TransformersArguments, None),
        ("openai", EndpointArguments, None),
        ("vllm", VllmArguments, EndpointArguments),
    ],
)
def test_tables_of_arguments_equal_the_code(heading: str, model: type[BaseModel], base: type[BaseModel] | None) -> None:
    names = [name for name in model.model_fields if base is None or name not in base.model_fields]
    expected = {name: re.sub(r"\.0`$", "`", default_of(model, name)) for name in names}
    # Where the environment names it the default is that name.
    expected |= {"python": "`LONGSPAN_VLLM`"} if "python" in expected else {}
    assert table_below("examine-a-pretrained-model.md", heading) == expected


WHOLE = {
    "corpus": {"source": "synthetic"},
    "model": {"pattern": "A", "width": 16, "heads": 2},
    "model.match": {"parameters": "A"},
    "training": {"context": 32, "batch_tokens": 64, "tokens": 64, "peak_lr": 1e-3},
}
"""What a section holds at least."""
NO_VALUE = {"no": {"such": "value"}}


@pytest.mark.parametrize("section", TABLES)
def test_a_wrong_value_of_every_key_is_refused_by_name(section: str) -> None:
    model = TABLES[section]
    whole = {"kind": section.removeprefix("probes.")} if section.startswith("probes.") else WHOLE.get(section, {})
    model.parse(whole, section)
    for name in model.model_fields:
        if name in ("kind", "settings") and section.startswith("probes."):
            # The settings of a task are known with the task.
            continue
        with pytest.raises(UserError) as refused:
            model.parse({**whole, name: NO_VALUE}, section)
        error = refused.value
        assert name in error.given, error
        assert "no" in error.given, error
        assert error.allowed, error
        assert error.fix, error


def test_the_table_of_subjects_has_every_key() -> None:
    text = (DOCS / "write-a-study.md").read_text("utf-8").partition("\n## Subjects\n")[2].partition("\n## ")[0]
    cells = [row.split("|")[1] for row in re.findall(r"^\| `.*$", text, re.M)]
    assert {name for cell in cells for name in re.findall(r"`(\w+)`", cell)} == set(ModelSource.model_fields)


def test_source_tables_equal_the_code() -> None:
    names = [name for name in WikipediaSource.model_fields if name != "source"]
    shown = table_below("wikipedia.md", "Settings of `source: wikipedia`")
    assert shown == {name: default_of(WikipediaSource, name) for name in names}
    page = (DOCS / "write-a-study.md").read_text("utf-8")
    for source in (TextSource, JsonlSource, SyntheticSource, HuggingFaceSource):
        (row,) = re.findall(rf"^\| `{source.model_fields['source'].default}` \|(.*)$", page, re.M)
        for name in source.model_fields.keys() - {"source", "max_documents"}:
            assert f"`{name}`" in row, name
            if not source.model_fields[name].is_required() and source.model_fields[name].default is not None:
                assert default_of(source, name) in row, name
