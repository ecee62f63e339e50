"""A preparation accounts for every document, gives the same bytes always, and goes on where it was cut."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from longspan.corpus import collect as collect_module
from longspan.corpus import prepare as prepare_module
from longspan.corpus import sharding
from longspan.corpus.document import Document, assign_split
from longspan.corpus.prepare import CorpusConfig, PreparedCorpus, prepare
from longspan.corpus.sources import JsonlSource
from longspan.corpus.tokenizer import TokenizerConfig
from longspan.foundation.errors import DataError, Stopped, UserError
from longspan.foundation.progress import Progress

TOKENIZER = TokenizerConfig(vocab_size=280)
SPLITS = {"train": 0.6, "validation": 0.2, "test": 0.2}


def text_of(index: int) -> str:
    words = ["river", "state", "union", "naïve", "漢字", "mountain", "1984", "spell", "orchard", "lantern"]
    chosen = (words[(index * 31 + j * j * (index % 7 + 1) + j) % len(words)] + str(index * j % 97) for j in range(80))
    return " ".join(chosen) + ".\n"


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def rows(count: int = 40) -> list[dict[str, Any]]:
    return [{"id": f"doc-{i}", "title": f"Title {i}", "text": text_of(i)} for i in range(count)]


def config(path: Path, **settings: Any) -> CorpusConfig:
    data = {"source": {"source": "jsonl", "path": str(path)}, "splits": SPLITS, "min_chars": 20, **settings}
    return CorpusConfig.parse(data, "corpus")


def run(corpus: CorpusConfig, folder: Path, **settings: Any) -> PreparedCorpus:
    tokenizer = settings.pop("tokenizer", TOKENIZER)
    return prepare(corpus, tokenizer, folder, folder.parent / "cache", part_bytes=3000, **settings)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture
def jsonl(tmp_path: Path) -> Path:
    return write_jsonl(tmp_path / "docs.jsonl", rows())


def test_documents_become_tokens_in_the_split_of_their_hash(tmp_path: Path, jsonl: Path) -> None:
    prepared = run(config(jsonl), tmp_path / "out")
    found = {}
    for split, shards in prepared.shards.items():
        for index, doc_id in enumerate(shards.ids):
            found[doc_id] = (split, prepared.tokenizer.decode(shards.document(index)), shards.titles[index])
            assert shards.byte_lengths[index] == prepared.tokenizer.token_bytes[shards.document(index)].sum()
    assert found == {row["id"]: (assign_split(row["id"], SPLITS, 0), row["text"], row["title"]) for row in rows()}
    assert len(list((tmp_path / "out" / "train").glob("*.tokens"))) > 2
    assert not (tmp_path / "out" / "work").exists()


def test_documents_are_cut_where_asked_and_the_ledger_says_so(tmp_path: Path, jsonl: Path) -> None:
    prepared = run(config(jsonl, max_chars=50), tmp_path / "out")
    texts = {row["id"]: row["text"] for row in rows()}
    for shards in prepared.shards.values():
        for index, doc_id in enumerate(shards.ids):
            assert prepared.tokenizer.decode(shards.document(index)) == texts[doc_id][:50]
    lost = [len(text) - 50 for text in texts.values() if len(text) > 50]
    assert prepared.ledger["cut"] == {"documents": len(lost), "characters": sum(lost)}
    assert lost
    with pytest.raises(UserError, match=r"max_chars = 10"):
        config(jsonl, max_chars=10)


def test_the_ledger_accounts_for_every_document(tmp_path: Path) -> None:
    docs = rows()
    docs.append({"id": "short", "title": "", "text": "   too short     \n\n\n          "})
    docs.append({"id": "copy", "title": "", "text": "  " + text_of(3).upper()})
    prepared = run(config(write_jsonl(tmp_path / "d.jsonl", docs)), tmp_path / "out")
    ledger = prepared.ledger
    assert ledger["seen"]["documents"] == 42
    dropped = {reason: entry["documents"] for reason, entry in ledger["dropped"].items()}
    assert dropped == {"too_short": 1, "duplicate_exact": 1}
    assert ledger["dropped"]["too_short"]["examples"] == ["short"]
    assert ledger["dropped"]["duplicate_exact"]["examples"][0] in ("copy", "doc-3")
    assert sum(facts["documents"] for facts in ledger["splits"].values()) == 42 - 2
    for split, facts in ledger["splits"].items():
        shards = prepared.shards[split]
        assert (facts["documents"], facts["tokens"], facts["bytes"]) == (
            shards.num_documents,
            shards.num_tokens,
            shards.num_bytes,
        )
        assert facts["inexact_documents"] == 0
    assert ledger["tokenizer"]["name"] == prepared.tokenizer.name
    assert ledger["tokenizer"]["trained_on_documents"] == ledger["splits"]["train"]["documents"]
    assert ledger["tokenizer"]["trained_on_bytes"] == ledger["splits"]["train"]["bytes"]


def test_text_that_utf8_cannot_express_is_dropped_and_counted(
    tmp_path: Path, jsonl: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = JsonlSource.read

    def read(self: JsonlSource, *arguments: Any) -> Iterator[Document]:
        yield Document(id="half", text=text_of(99) + "\ud800")
        yield from real(self, *arguments)

    monkeypatch.setattr(JsonlSource, "read", read)
    prepared = run(config(jsonl), tmp_path / "out")
    assert prepared.ledger["dropped"] == {"not_utf8": {"documents": 1, "examples": ["half"]}}


def test_the_tokenizer_sees_the_training_split_only(
    tmp_path: Path, jsonl: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    real = prepare_module.train_tokenizer

    def spy(settings: TokenizerConfig, texts: Any) -> Any:
        seen.extend(texts)
        return real(settings, seen)

    monkeypatch.setattr(prepare_module, "train_tokenizer", spy)
    run(config(jsonl), tmp_path / "out")
    assert Counter(seen) == Counter(r["text"] for r in rows() if assign_split(r["id"], SPLITS, 0) == "train")


def test_a_large_corpus_trains_the_tokenizer_on_a_fixed_sample(tmp_path: Path, jsonl: Path) -> None:
    settings = TokenizerConfig(vocab_size=280, training_bytes=8000)
    first = run(config(jsonl), tmp_path / "a", tokenizer=settings)
    assert 0 < first.ledger["tokenizer"]["trained_on_bytes"] < first.ledger["splits"]["train"]["bytes"] * 0.9
    assert run(config(jsonl), tmp_path / "b", tokenizer=settings).fingerprint == first.fingerprint


def test_the_number_of_processes_does_not_change_a_byte(tmp_path: Path, jsonl: Path) -> None:
    run(config(jsonl), tmp_path / "one", workers=1)
    run(config(jsonl), tmp_path / "two", workers=2)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_documents_that_come_later_move_none(tmp_path: Path, jsonl: Path) -> None:
    before = run(config(jsonl), tmp_path / "a")
    more = write_jsonl(tmp_path / "more.jsonl", rows(55)[::-1])
    after = run(config(more), tmp_path / "b")
    for split, shards in before.shards.items():
        assert set(shards.ids) <= set(after.shards[split].ids)


class Cut(Exception):
    """Stands for the kill."""


@pytest.mark.parametrize(
    ("stage", "share"), [("documents", 0), ("duplicates", 0), ("tokenizer", 0), ("tokenize", 0), ("tokenize", 0.5)]
)
def test_a_cut_run_goes_on_and_ends_in_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str, share: float
) -> None:
    corpus = config(write_jsonl(tmp_path / "d.jsonl", rows(100)))
    run(corpus, tmp_path / "whole")

    def cut(progress: Progress) -> None:
        if progress.stage == stage and progress.done >= share * (progress.total or 0):
            raise Cut

    with pytest.raises(Cut):
        run(corpus, tmp_path / "cut", report=cut)
    spooled = count_calls(monkeypatch, collect_module.SpoolWriter, "add")
    written = count_calls(monkeypatch, sharding, "_write")
    run(corpus, tmp_path / "cut")
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")
    assert spooled == ([100] if stage in ("documents", "duplicates") else [0])
    if share:
        assert 0 < written[0] < len(list((tmp_path / "cut").rglob("*.tokens"))) * 0.7


def count_calls(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str) -> list[int]:
    calls = [0]
    real: Callable[..., Any] = getattr(owner, name)

    def counted(*arguments: Any) -> Any:
        calls[0] += 1
        return real(*arguments)

    monkeypatch.setattr(owner, name, counted)
    return calls


KILLED = """
import os, sys
from pathlib import Path
from longspan.corpus.prepare import CorpusConfig, prepare
from longspan.corpus.sources import JsonlSource
from longspan.corpus.tokenizer import TokenizerConfig

def die(progress):
    if progress.stage == "tokenize" and progress.done > progress.total / 2:
        os._exit(9)

corpus = CorpusConfig.parse({"source": {"source": "jsonl", "path": sys.argv[1]}, "min_chars": 20,
    "splits": {"train": 0.6, "validation": 0.2, "test": 0.2}}, "corpus")
out = Path(sys.argv[2])
prepare(corpus, TokenizerConfig(vocab_size=280), out, out.parent / "cache", die, part_bytes=3000)
"""


def test_a_process_that_dies_in_the_middle_is_made_good(tmp_path: Path, jsonl: Path) -> None:
    out = tmp_path / "out"
    died = subprocess.run([sys.executable, "-c", KILLED, str(jsonl), str(out)], check=False)
    assert died.returncode == 9
    assert (out / "work").is_dir()
    run(config(jsonl), out)
    run(config(jsonl), tmp_path / "whole")
    assert contents(out) == contents(tmp_path / "whole")


def test_a_finished_corpus_is_not_done_again(tmp_path: Path, jsonl: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = run(config(jsonl), tmp_path / "out")
    calls = count_calls(monkeypatch, prepare_module, "collect")
    assert run(config(jsonl), tmp_path / "out").fingerprint == first.fingerprint
    assert calls == [0]


def test_a_folder_of_other_settings_or_inputs_is_refused(tmp_path: Path, jsonl: Path) -> None:
    run(config(jsonl), tmp_path / "out")
    with pytest.raises(UserError, match=r"min_chars = 20, not 30"):
        run(config(jsonl, min_chars=30), tmp_path / "out")
    with pytest.raises(UserError, match=r"tokenizer\.vocab_size = 280, not 290"):
        run(config(jsonl), tmp_path / "out", tokenizer=TokenizerConfig(vocab_size=290))
    write_jsonl(jsonl, rows(41))
    with pytest.raises(UserError, match="was prepared with corpus"):
        run(config(jsonl), tmp_path / "out")


def given_splits(*names: str) -> list[dict[str, Any]]:
    return [{**row, "split": names[i % len(names)]} for i, row in enumerate(rows(60))]


def test_given_splits_are_honoured_or_ignored_as_asked(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "d.jsonl", given_splits("train", "validation", "test"))
    source = {"source": "jsonl", "path": str(path), "split_field": "split"}
    honoured = run(config(path, source=source), tmp_path / "a")
    assert {split: len(shards) for split, shards in honoured.shards.items()} == {
        "train": 20,
        "validation": 20,
        "test": 20,
    }
    ignored = run(config(path, source=source, given_splits="ignore"), tmp_path / "b")
    assert all(assign_split(i, SPLITS, 0) == split for split, shards in ignored.shards.items() for i in shards.ids)


def test_a_split_that_the_source_lacks_is_refused_carved_or_done_without(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "d.jsonl", given_splits("train", "train", "test"))
    source = {"source": "jsonl", "path": str(path), "split_field": "split"}
    with pytest.raises(DataError, match="the split `validation` is empty") as refused:
        run(config(path, source=source), tmp_path / "a")
    assert "carve: [validation]" in refused.value.fix
    carved = run(config(path, source=source, carve=["validation"]), tmp_path / "b")
    assert len(carved.shards["test"]) == 20
    train = {row["id"] for row in given_splits("train", "train", "test") if row["split"] == "train"}
    assert set(carved.shards["validation"].ids) == {i for i in train if assign_split(i, SPLITS, 0) == "validation"}
    assert set(carved.shards["train"].ids) | set(carved.shards["validation"].ids) == train
    without = config(path, source=source, splits={"train": 1.0, "validation": 0, "test": 0})
    assert set(run(without, tmp_path / "c").shards) == {"train", "test"}
    with pytest.raises(UserError, match=r"carve validation with splits\.validation 0"):
        config(path, carve=["validation"], splits={"train": 1.0, "validation": 0, "test": 0})


def test_settings_of_the_source_may_stand_beside_its_name(tmp_path: Path) -> None:
    nested = {"source": {"source": "jsonl", "path": "x", "max_documents": 3}, "min_chars": 5}
    flat = {"source": "jsonl", "path": "x", "max_documents": 3, "min_chars": 5}
    assert CorpusConfig.parse(flat, "corpus") == CorpusConfig.parse(nested, "corpus")
    assert CorpusConfig.parse({"source": "sotu"}, "corpus").source.source == "sotu"
    assert CorpusConfig.parse(CorpusConfig.parse(flat, "c").model_dump(), "c") == CorpusConfig.parse(flat, "c")
    with pytest.raises(UserError, match=r"unknown key `corpus\.min_char`") as refused:
        CorpusConfig.parse({"source": "sotu", "min_char": 5}, "corpus")
    assert "min_chars" in refused.value.fix
    with pytest.raises(UserError, match=r"corpus\.source = 'sotuu'") as refused:
        CorpusConfig.parse({"source": "sotuu"}, "corpus")
    assert refused.value.fix == "did you mean `sotu`?"
    with pytest.raises(UserError, match=r"^corpus\.path is missing"):
        CorpusConfig.parse({"source": "text"}, "corpus")
    with pytest.raises(UserError, match=r"^corpus\.max_documents = 0") as refused:
        CorpusConfig.parse({"source": "sotu", "max_documents": 0}, "corpus")
    assert refused.value.fix == "change `corpus.max_documents`"
    with pytest.raises(UserError, match=r"`corpus\.path` is no setting of the source `sotu`") as refused:
        CorpusConfig.parse({"source": "sotu", "path": "x"}, "corpus")
    assert "text or jsonl" in refused.value.fix


def test_without_dedup_copies_stay(tmp_path: Path) -> None:
    docs = [*rows(), {"id": "copy", "title": "", "text": text_of(3)}]
    prepared = run(config(write_jsonl(tmp_path / "d.jsonl", docs), dedup=None), tmp_path / "out")
    assert sum(len(shards) for shards in prepared.shards.values()) == 41


def test_an_empty_split_is_refused_by_name_with_what_was_dropped(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "d.jsonl", rows(3))
    with pytest.raises(DataError, match="the split `train` is empty: 3 documents were read") as refused:
        run(config(path, min_chars=100_000), tmp_path / "out")
    assert "3 too short" in refused.value.given
    assert not (tmp_path / "out" / "ledger.json").exists()


def test_a_source_without_a_document_says_so(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="the source gives no document"):
        run(config(write_jsonl(tmp_path / "d.jsonl", [])), tmp_path / "out")


def test_a_vocabulary_larger_than_the_text_supports_is_refused_and_nothing_is_lost(tmp_path: Path, jsonl: Path) -> None:
    with pytest.raises(UserError, match="supports only"):
        run(config(jsonl), tmp_path / "out", tokenizer=TokenizerConfig(vocab_size=50_000))
    assert (tmp_path / "out" / "work" / "documents").is_dir()


@pytest.mark.parametrize("file", ["train/00001.tokens", "test/index.json", "tokenizer/tokenizer.json", "ledger.json"])
def test_a_damaged_corpus_is_refused_by_name(tmp_path: Path, jsonl: Path, file: str) -> None:
    run(config(jsonl), tmp_path / "out")
    path = tmp_path / "out" / file
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(DataError, match=Path(file).name.replace(".", r"\.")):
        PreparedCorpus.open(tmp_path / "out")


def test_shards_of_another_tokenizer_are_refused(tmp_path: Path, jsonl: Path) -> None:
    run(config(jsonl), tmp_path / "a")
    run(config(jsonl), tmp_path / "b", tokenizer=TokenizerConfig(vocab_size=290))
    (tmp_path / "a" / "tokenizer").rename(tmp_path / "gone")
    (tmp_path / "b" / "tokenizer").rename(tmp_path / "a" / "tokenizer")
    with pytest.raises(DataError, match="another tokenizer"):
        PreparedCorpus.open(tmp_path / "a")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
@pytest.mark.parametrize("workers", [1, 2])
def test_a_full_disk_is_named_and_the_run_goes_on_once_there_is_space(
    tmp_path: Path, jsonl: Path, workers: int
) -> None:
    full = tmp_path / "out" / "train" / "00001.tokens"
    full.parent.mkdir(parents=True)
    full.symlink_to("/dev/full")
    with pytest.raises(DataError, match=r"no disk space left while writing .*00001"):
        run(config(jsonl), tmp_path / "out", workers=workers)
    assert not (tmp_path / "out" / "train" / "index.json").exists()
    full.unlink()
    run(config(jsonl), tmp_path / "out")
    run(config(jsonl), tmp_path / "whole")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_stopping_on_request_leaves_files_whole(tmp_path: Path, jsonl: Path) -> None:
    def stop(progress: Progress) -> None:
        if progress.stage == "tokenize":
            raise Stopped("asked to")

    with pytest.raises(Stopped):
        run(config(jsonl), tmp_path / "out", report=stop, workers=2)
    assert run(config(jsonl), tmp_path / "out").shards["train"].num_documents > 0


def test_progress_names_every_stage_and_reaches_its_end(tmp_path: Path, jsonl: Path) -> None:
    seen: list[Progress] = []
    run(config(jsonl), tmp_path / "out", report=seen.append)
    assert {"duplicates", "tokenizer", "tokenize"} <= {progress.stage for progress in seen}
    last = [progress for progress in seen if progress.stage == "tokenize"][-1]
    assert last.done == last.total
