"""Shards give back what was written, and refuse by name what was not."""

from __future__ import annotations

import errno
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longspan.corpus import shards as shards_module
from longspan.corpus.shards import OneShard, ShardWriter, TokenShards, token_dtype, write_index
from longspan.foundation.errors import DataError, UserError

DOCUMENTS = [(f"id-{i}", f"Title ü {i}", np.arange(1 + 7 * i % 23) * 13 % 300, 10 + i) for i in range(12)]


def write(folder: Path, *, vocab_size: int = 300, shard_tokens: int = 40) -> TokenShards:
    writer = ShardWriter(folder, vocab_size, "f" * 64, shard_tokens=shard_tokens)
    for document in DOCUMENTS:
        writer.add(*document)
    return writer.close()


def test_documents_come_back_with_their_ids_titles_and_sizes(tmp_path: Path) -> None:
    write(tmp_path / "s")
    shards = TokenShards.open(tmp_path / "s")
    assert len(list((tmp_path / "s").glob("*.tokens"))) > 2
    assert shards.num_documents == len(shards) == len(DOCUMENTS)
    assert [shards.document(i).tolist() for i in range(12)] == [tokens.tolist() for _, _, tokens, _ in DOCUMENTS]
    assert [ids.tolist() for ids in shards] == [tokens.tolist() for _, _, tokens, _ in DOCUMENTS]
    assert list(shards.ids) == [doc_id for doc_id, *_ in DOCUMENTS]
    assert shards.titles[-1] == "Title ü 11"
    assert shards.ids[2:4] == ["id-2", "id-3"]
    assert shards.lengths.tolist() == [len(tokens) for _, _, tokens, _ in DOCUMENTS]
    assert shards.byte_lengths.tolist() == [10 + i for i in range(12)]
    assert shards.num_tokens == shards.lengths.sum()
    assert shards.num_bytes == shards.byte_lengths.sum()
    assert shards.tokenizer_fingerprint == "f" * 64
    with pytest.raises(IndexError):
        shards.ids[12]


def test_a_document_is_a_read_only_view_of_the_file(tmp_path: Path) -> None:
    document = write(tmp_path / "s").document(3)
    assert document.base is not None
    assert not document.flags.writeable


@pytest.mark.parametrize(("vocab_size", "itemsize"), [(256, 1), (257, 2), (65_536, 2), (65_537, 4)])
def test_the_smallest_dtype_that_fits_is_used(tmp_path: Path, vocab_size: int, itemsize: int) -> None:
    assert token_dtype(vocab_size).itemsize == itemsize
    writer = ShardWriter(tmp_path, vocab_size, "f")
    writer.add("a", "", np.array([0, vocab_size - 1]), 3)
    assert writer.close().document(0).tolist() == [0, vocab_size - 1]
    assert (tmp_path / "00000.tokens").stat().st_size == 2 * itemsize


@settings(max_examples=20, deadline=None)
@given(lengths=st.lists(st.integers(1, 30), min_size=1, max_size=20), shard_tokens=st.integers(1, 100))
def test_any_documents_come_back_from_any_shard_size(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[int], shard_tokens: int
) -> None:
    folder = tmp_path_factory.mktemp("any") / "s"
    writer = ShardWriter(folder, 1000, "f", shard_tokens=shard_tokens)
    for index, length in enumerate(lengths):
        writer.add(str(index), "t" * index, np.arange(length) + index, length)
    shards = writer.close()
    assert [tokens.tolist() for tokens in shards] == [list(range(i, i + n)) for i, n in enumerate(lengths)]
    assert list(shards.titles) == ["t" * i for i in range(len(lengths))]


def test_the_same_documents_give_the_same_bytes(tmp_path: Path) -> None:
    assert write(tmp_path / "a").fingerprint == write(tmp_path / "b").fingerprint
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()


@pytest.mark.parametrize("suffix", ["tokens", "documents", "names"])
def test_a_truncated_shard_is_refused_by_name_even_without_verification(tmp_path: Path, suffix: str) -> None:
    write(tmp_path)
    path = tmp_path / f"00001.{suffix}"
    path.write_bytes(path.read_bytes()[:-1])
    for verify in (True, False):
        with pytest.raises(DataError, match=rf"00001\.{suffix} is truncated"):
            TokenShards.open(tmp_path, verify=verify)


@pytest.mark.parametrize("suffix", ["tokens", "documents", "names"])
def test_a_single_changed_bit_is_refused_by_name(tmp_path: Path, suffix: str) -> None:
    write(tmp_path)
    path = tmp_path / f"00000.{suffix}"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(DataError, match=rf"00000\.{suffix} was altered"):
        TokenShards.open(tmp_path)


def test_missing_grown_and_unfinished_shards_are_refused_by_name(tmp_path: Path) -> None:
    write(tmp_path)
    path = tmp_path / "00000.tokens"
    content = path.read_bytes()
    path.write_bytes(content + b"\0\0")
    with pytest.raises(DataError, match=r"00000\.tokens is longer than written"):
        TokenShards.open(tmp_path)
    path.unlink()
    with pytest.raises(DataError, match=r"00000\.tokens is missing"):
        TokenShards.open(tmp_path)
    (tmp_path / "index.json").unlink()
    with pytest.raises(DataError, match="no finished shards"):
        TokenShards.open(tmp_path)


@pytest.mark.parametrize("damage", ["{", "{}", '{"format": 99}', "[]", '{"format": 1, "shards": [{}]}'])
def test_a_damaged_index_is_refused_by_name(tmp_path: Path, damage: str) -> None:
    write(tmp_path)
    (tmp_path / "index.json").write_text(damage)
    with pytest.raises(DataError, match=r"index\.json"):
        TokenShards.open(tmp_path)


def test_an_index_whose_totals_disagree_is_refused(tmp_path: Path) -> None:
    write(tmp_path)
    index = json.loads((tmp_path / "index.json").read_text())
    index["num_tokens"] += 1
    (tmp_path / "index.json").write_text(json.dumps(index))
    with pytest.raises(DataError, match="disagrees"):
        TokenShards.open(tmp_path)


def test_what_the_tokenizer_cannot_have_made_is_refused(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path, 300, "f")
    with pytest.raises(DataError, match="'bad' holds a token id outside 0 to 299"):
        writer.add("bad", "", np.array([1, 300]), 2)
    with pytest.raises(DataError, match="'bad' holds a token id"):
        writer.add("bad", "", np.array([-1]), 2)
    with pytest.raises(DataError, match="'empty' has no tokens"):
        writer.add("empty", "", np.array([], np.int32), 0)


def test_finished_shards_are_not_written_over(tmp_path: Path) -> None:
    write(tmp_path)
    with pytest.raises(UserError, match="already holds shards"):
        ShardWriter(tmp_path, 300, "f")


def test_no_documents_make_an_empty_set_of_shards(tmp_path: Path) -> None:
    shards = ShardWriter(tmp_path, 300, "f").close()
    assert (shards.num_documents, shards.num_tokens, list(shards.ids)) == (0, 0, [])


def test_a_full_disk_is_named_and_leaves_no_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: OneShard, *_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    writer = ShardWriter(tmp_path, 300, "f", shard_tokens=40)
    for document in DOCUMENTS[:6]:
        writer.add(*document)
    kept = {path.name: path.read_bytes() for path in tmp_path.glob("00000.*")}
    monkeypatch.setattr(shards_module, "sync_file", full)
    with pytest.raises(DataError, match="no disk space left"):
        writer.close()
    assert not (tmp_path / "index.json").exists()
    assert {path.name: path.read_bytes() for path in tmp_path.glob("00000.*")} == kept


def test_shards_written_apart_are_joined_by_the_index(tmp_path: Path) -> None:
    entries = []
    for number in (1, 0):
        with OneShard(tmp_path, number, 300) as shard:
            for document in DOCUMENTS[number * 6 : number * 6 + 6]:
                shard.add(*document)
            entries.append(shard.close())
    write_index(tmp_path, entries[::-1], vocab_size=300, tokenizer_fingerprint="f")
    assert list(TokenShards.open(tmp_path).ids) == [doc_id for doc_id, *_ in DOCUMENTS]
