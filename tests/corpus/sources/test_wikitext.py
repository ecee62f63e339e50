"""WikiText: articles, not lines; from the raw files and from rows of the hub's data set."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from longspan.corpus.document import Document
from longspan.corpus.sources import HuggingFaceSource, WikitextSource
from longspan.corpus.sources.compressed import read_chunks, read_lines
from longspan.corpus.sources.wikitext import split_articles
from longspan.foundation.errors import DataError, UserError

# Word counts by the data set's own description.
PUBLISHED = {"validation": ("valid", 213_886), "test": ("test", 241_211)}


def raw(shared_data: Path) -> dict[str, Path]:
    return {split: shared_data / f"wikitext-2/wiki.{name}.raw.zst" for split, (name, _) in PUBLISHED.items()}


@pytest.mark.parametrize("split", PUBLISHED)
def test_the_real_files_hold_60_articles_and_lose_no_byte(shared_data: Path, tmp_path: Path, split: str) -> None:
    file = raw(shared_data)[split]
    articles = list(WikitextSource.model_validate({"path": {split: file}}).documents(tmp_path))
    assert len(articles) == 60
    assert sum(len(article.text.split()) for article in articles) == PUBLISHED[split][1]
    assert "".join(article.text for article in articles).encode() == b"".join(read_chunks(file))
    assert {article.split for article in articles} == {split}
    assert articles[1].id == f"{split}-00001"
    assert all(article.text.startswith(f" \n = {article.title} = \n \n") for article in articles)
    # The two lines ` = 1 … = ` in the article on filters are the rest of formulas.
    assert not any(article.title.startswith("1 ") for article in articles)


LINES = st.sampled_from([" \n", " = A = \n", " = = B = = \n", " text . \n", " = 2 \n", " = \n", " = 1 = 2 = \n", "\n"])


@given(st.lists(LINES), st.booleans())
def test_articles_joined_are_the_lines_joined(lines: list[str], cut_end: bool) -> None:
    text = "".join(lines)
    if cut_end and lines:
        lines = [*lines[:-1], lines[-1].removesuffix("\n")]
        text = "".join(lines)
    joined = "".join(article for _, article in split_articles(lines))
    assert joined == text or (not text.strip() and joined == "")


def test_false_headings_stay_in_their_article() -> None:
    lines = [
        " \n", " = One = \n", " \n", " text \n", " = 2 \n", " = 1 henry and capacitance C = \n", " \n",
        " = = Sub = = \n", " \n", " more \n", " \n", " = Two = \n", " \n", " end \n",
    ]  # fmt: skip
    assert [(title, len(text.splitlines())) for title, text in split_articles(lines)] == [("One", 10), ("Two", 4)]


def test_files_without_articles_are_refused_by_name(tmp_path: Path) -> None:
    for name, content in (("prose.raw", "no heading\n"), ("nothing.raw", "")):
        (tmp_path / name).write_text(content)
        with pytest.raises(DataError, match=name):
            list(WikitextSource(path={"train": tmp_path / name}).documents(tmp_path))
    with pytest.raises(UserError, match="is not a file"):
        list(WikitextSource(path={"train": tmp_path / "absent.raw"}).documents(tmp_path))


def hub_rows(file: Path) -> list[str]:
    """The rows as the hub has them: a blank line is an empty string, other lines keep their line feed."""
    return ["" if not line.strip() else line for line in read_lines(file)]


def write_parquet(path: Path, columns: dict[str, list[object]]) -> None:
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(arrow.table(columns), path)


@pytest.fixture
def local_wikitext(shared_data: Path, tmp_path: Path) -> Path:
    """A folder in the layout and schema of `Salesforce/wikitext`."""
    folder = tmp_path / "wikitext"
    for split, file in raw(shared_data).items():
        write_parquet(folder / f"wikitext-2-raw-v1/{split}-00000-of-00001.parquet", {"text": list(hub_rows(file))})
    config = [
        "---", "configs:", "- config_name: wikitext-2-raw-v1", "  data_files:",
        "  - split: validation", "    path: wikitext-2-raw-v1/validation-*",
        "  - split: test", "    path: wikitext-2-raw-v1/test-*", "---",
    ]  # fmt: skip
    (folder / "README.md").write_text("\n".join(config))
    return folder


def hub(folder: Path, **settings: object) -> HuggingFaceSource:
    pytest.importorskip("datasets")
    return HuggingFaceSource.model_validate({"dataset": str(folder), **settings})


@pytest.mark.parametrize("streaming", [True, False])
def test_rows_of_the_hub_become_the_same_articles(
    shared_data: Path, local_wikitext: Path, tmp_path: Path, streaming: bool
) -> None:
    source = hub(
        local_wikitext,
        config="wikitext-2-raw-v1",
        hub_splits={"test": "test", "validation": "validation"},
        articles="wikitext",
        streaming=streaming,
    )
    from_rows = list(source.documents(tmp_path / "cache"))
    assert from_rows == list(WikitextSource.model_validate({"path": raw(shared_data)}).documents(tmp_path))
    assert sum(len(document.text.split()) for document in from_rows) == 213_886 + 241_211
    assert len(source.fingerprint(tmp_path)["inputs"]["files"]) == 3


def test_any_text_column_can_be_read(tmp_path: Path) -> None:
    columns: dict[str, list[object]] = {"body": ["one", None, "three"], "key": [7, 8, 9], "name": ["A", "B", None]}
    write_parquet(tmp_path / "data/train-00000-of-00001.parquet", columns)
    messages: list[str] = []
    source = hub(tmp_path / "data", text_column="body", id_column="key", title_column="name")
    documents = list(source.documents(tmp_path / "cache", lambda progress: messages.append(progress.message)))
    assert documents == [Document("7", "one", "A"), Document("9", "three", "")]
    assert messages[-1].endswith("left out 1 rows without text")
    assert len(list(hub(tmp_path / "data", text_column="body", max_documents=1).documents(tmp_path / "cache"))) == 1
    with pytest.raises(UserError, match=r"no column `text`[\s\S]*body, key, name"):
        list(hub(tmp_path / "data").documents(tmp_path / "cache"))
    with pytest.raises(DataError, match="`key` is a int"):
        list(hub(tmp_path / "data", text_column="key").documents(tmp_path / "cache"))


def test_what_cannot_be_loaded_is_refused_by_name(local_wikitext: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"wikitext \(wikitext-3\) cannot be loaded"):
        list(hub(local_wikitext, config="wikitext-3").documents(tmp_path / "cache"))
    with pytest.raises(DataError, match="cannot be loaded"):
        list(hub(local_wikitext, config="wikitext-2-raw-v1", hub_splits="train").documents(tmp_path / "cache"))
    with pytest.raises(DataError, match="nobody/nothing cannot be loaded"):
        list(hub(Path("nobody/nothing")).documents(tmp_path / "cache"))


def test_a_hub_that_cannot_be_reached_is_told_with_another_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub_library = pytest.importorskip("huggingface_hub")
    error = type("ConnectError", (Exception,), {"__module__": "httpx2._exceptions"})("Name or service not known")

    def unreachable(*arguments: object, **settings: object) -> None:
        raise error

    monkeypatch.setattr(hub_library.HfApi, "dataset_info", unreachable)
    with pytest.raises(DataError, match="cannot be loaded: Name or service not known") as caught:
        hub(Path("nobody/nothing")).fingerprint(tmp_path)
    assert "another source" in caught.value.fix
