"""Speeches, text files, JSON Lines and generated stories, and what all sources promise."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import pytest
import zstandard
from pydantic import TypeAdapter

from longspan.corpus.sources import AnySource, JsonlSource, SotuSource, SourceConfig, SyntheticSource, TextSource, sotu
from longspan.foundation.config import Config
from longspan.foundation.errors import DataError, UserError
from longspan.foundation.extras import MissingExtra

ROWS = [
    {"id": "a", "title": "First", "text": "one\n", "split": "train"},
    {"id": 2, "text": "zwei \u2028 drei", "split": None},
    {"id": "c", "title": "Third", "text": "three", "split": "test"},
]


def lines(rows: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def test_speeches_are_the_249_addresses_and_pandas_is_not_imported(tmp_path: Path) -> None:
    speeches = list(SotuSource().documents(tmp_path))
    assert len(speeches) == 249
    assert len({speech.id for speech in speeches}) == 249
    assert sum(len(speech.text) for speech in speeches) == 12_181_093
    assert (speeches[0].title, speeches[0].split) == ("Washington, 1790", None)
    code = """
import pathlib, sys
from longspan.corpus.sources import SotuSource
next(SotuSource().documents(pathlib.Path(".")))
heavy = {"pandas", "sotu", "torch", "datasets", "mwparserfromhell"} & set(sys.modules)
assert not heavy, heavy
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_missing_package_is_asked_for_by_its_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> None:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(sotu, "distribution", absent)
    with pytest.raises(MissingExtra, match="quickstart"):
        next(SotuSource().documents(tmp_path))


@pytest.mark.parametrize("ending", ["", ".gz", ".zst"])
def test_json_lines_come_plain_and_compressed(tmp_path: Path, ending: str) -> None:
    pack = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.ZstdCompressor().compress}[ending]
    path = tmp_path / f"data.jsonl{ending}"
    path.write_bytes(pack(lines(ROWS)) if ending != ".zst" else pack(lines(ROWS[:1])) + pack(b"\n" + lines(ROWS[1:])))
    documents = list(JsonlSource(path=path).documents(tmp_path))
    assert [(d.id, d.title, d.text, d.split) for d in documents] == [
        ("a", "First", "one\n", "train"),
        ("2", "", "zwei \u2028 drei", None),
        ("c", "Third", "three", "test"),
    ]
    assert [d.split for d in JsonlSource(path=path, split_field=None).documents(tmp_path)] == [None] * 3


def test_a_byte_order_mark_is_no_part_of_the_first_line(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + lines(ROWS))
    assert [document.id for document in JsonlSource(path=path).documents(tmp_path)] == ["a", "2", "c"]


def test_a_line_without_an_id_says_how_to_do_without(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_bytes(lines([{"text": "x"}]))
    with pytest.raises(DataError) as error:
        list(JsonlSource(path=path).documents(tmp_path))
    assert "corpus.id_field=null" in error.value.fix


def test_fields_may_have_other_names_and_ids_may_come_from_the_text(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_bytes(lines([{"body": "same"}, {"body": "other"}, {"body": "same"}]))
    source = JsonlSource(path=path, text_field="body", id_field=None)
    ids = [document.id for document in source.documents(tmp_path)]
    assert ids[0] == ids[2] != ids[1]


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        (b'{"id": "b", "text": ', "not JSON"),
        (b"[1, 2]", "a list"),
        (b'{"id": "b"}', "no field `text`"),
        (b'{"id": "b", "text": null}', "a string"),
        (b'{"id": "b", "text": 5}', "a string"),
        (b'{"text": "x"}', "no field `id`"),
        (b'{"id": "b", "text": "x", "split": "dev"}', "train, validation, test"),
        (b'{"id": "b", "text": "\\ud800"}', "surrogate"),
    ],
)
def test_a_bad_line_is_named_by_file_and_line(tmp_path: Path, bad: bytes, words: str) -> None:
    path = tmp_path / "data.jsonl"
    path.write_bytes(lines(ROWS[:1]) + b"\n" + bad + b"\n")
    documents = JsonlSource(path=path).documents(tmp_path)
    assert next(documents).id == "a"
    with pytest.raises(UserError, match=r"data\.jsonl:3") as error:
        next(documents)
    assert words in str(error.value)


@pytest.mark.parametrize("ending", ["gz", "zst"])
@pytest.mark.parametrize("keep", [0.5, 0.99])
def test_a_truncated_compressed_file_is_refused_by_name(tmp_path: Path, ending: str, keep: float) -> None:
    content = lines([{"id": str(i), "text": f"{i * i} {i}"} for i in range(20_000)])
    packed = gzip.compress(content) if ending == "gz" else zstandard.ZstdCompressor().compress(content)
    path = tmp_path / f"data.jsonl.{ending}"
    path.write_bytes(packed[: int(len(packed) * keep)])
    with pytest.raises(DataError, match=rf"data\.jsonl\.{ending}.*truncated"):
        list(JsonlSource(path=path).documents(tmp_path))


def test_a_folder_of_text_files_gives_one_document_each(tmp_path: Path) -> None:
    folder = tmp_path / "texts"
    (folder / "sub").mkdir(parents=True)
    (folder / "b.txt").write_bytes(b"\xef\xbb\xbfwindows\r\nlines\r\n")
    (folder / "sub/a.md").write_text("# Märchen\n", encoding="utf-8")
    (folder / "ignored.csv").write_text("1,2")
    documents = list(TextSource(path=folder).documents(tmp_path))
    assert [(d.id, d.title, d.text) for d in documents] == [
        ("b.txt", "b", "windows\nlines\n"),
        ("sub/a.md", "a", "# Märchen\n"),
    ]
    assert [d.id for d in TextSource(path=(folder / "b.txt", folder / "sub")).documents(tmp_path)] == ["b.txt", "a.md"]


def test_text_that_cannot_be_honoured_is_refused(tmp_path: Path) -> None:
    (tmp_path / "latin.txt").write_bytes("Märchen".encode("latin-1"))
    with pytest.raises(DataError, match=r"latin\.txt is not UTF-8 \(byte 1\)"):
        list(TextSource(path=tmp_path).documents(tmp_path))
    with pytest.raises(UserError, match="does not exist"):
        list(TextSource(path=tmp_path / "nowhere").documents(tmp_path))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no file"):
        list(TextSource(path=tmp_path / "empty").documents(tmp_path))
    (tmp_path / "one").mkdir()
    (tmp_path / "one/latin.txt").write_text("x")
    with pytest.raises(UserError, match="two files"):
        list(TextSource(path=(tmp_path, tmp_path / "one")).documents(tmp_path))


def test_stories_are_the_same_for_a_seed_and_more_of_them_change_none(tmp_path: Path) -> None:
    few = list(SyntheticSource(num_documents=5).documents(tmp_path))
    assert few == list(SyntheticSource(num_documents=9).documents(tmp_path))[:5]
    assert few != list(SyntheticSource(num_documents=5, seed=1).documents(tmp_path))
    assert len({story.text for story in few}) == 5


def test_stories_recall_late_what_they_said_early(tmp_path: Path) -> None:
    (story,) = SyntheticSource(num_documents=1, min_words=2000, max_words=2000, people=2).documents(tmp_path)
    introduction, rest = story.text.split("\n\n", 1)
    names = [sentence.split(" was a ")[0] for sentence in introduction.split(". ")]
    assert len(names) == 2
    assert 2000 <= len(story.text.split()) < 2200
    assert all(name in rest[len(rest) // 2 :] for name in names)
    assert all(name in story.title or name != names[0] for name in names)
    (filler,) = SyntheticSource(num_documents=1, min_words=500, recall=0).documents(tmp_path)
    assert filler.title.removeprefix("The story of ") not in filler.text.split("\n\n", 1)[1]


def test_stories_of_no_length_are_refused() -> None:
    with pytest.raises(UserError, match="min_words = 200 with max_words = 100"):
        SyntheticSource.parse({"max_words": 100}, "corpus")


def test_max_documents_counts_for_each_given_split(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    rows = [{"id": str(i), "text": "x", "split": ("train", "test")[i % 2]} for i in range(10)]
    path.write_bytes(lines(rows))
    assert [d.id for d in JsonlSource(path=path, max_documents=2).documents(tmp_path)] == ["0", "1", "2", "3"]
    assert [d.id for d in JsonlSource(path=path, max_documents=2, split_field=None).documents(tmp_path)] == ["0", "1"]


def test_the_fingerprint_follows_the_content_not_the_place(tmp_path: Path) -> None:
    def fingerprint(path: Path, content: bytes, **settings: object) -> dict[str, Any]:
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
        return JsonlSource.model_validate({"path": path, **settings}).fingerprint(tmp_path)

    first = fingerprint(tmp_path / "a/data.jsonl", lines(ROWS))
    assert json.loads(json.dumps(first)) == first
    assert fingerprint(tmp_path / "b/data.jsonl", lines(ROWS)) == first
    assert fingerprint(tmp_path / "b/data.jsonl", lines(ROWS[:2])) != first
    assert fingerprint(tmp_path / "b/data.jsonl", lines(ROWS), id_field=None) != first


class Holder(Config):
    source: AnySource


def test_a_study_names_its_source_and_unknown_keys_are_refused() -> None:
    chosen = Holder.parse({"source": {"source": "synthetic", "num_documents": 3}}, "corpus").source
    assert isinstance(chosen, SyntheticSource)
    with pytest.raises(UserError, match="num_documents"):
        Holder.parse({"source": {"source": "synthetic", "num_document": 3}}, "corpus")
    with pytest.raises(UserError):
        Holder.parse({"source": {"source": "nowhere"}}, "corpus")
    schema = TypeAdapter(AnySource).json_schema()
    assert sorted(schema["discriminator"]["mapping"]) == [
        "huggingface", "jsonl", "sotu", "synthetic", "text", "wikipedia", "wikitext",
    ]  # fmt: skip
    assert issubclass(SotuSource, SourceConfig)
