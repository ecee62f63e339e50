"""Claims about the record store: nothing duplicated, nothing lost but the torn line, damage refused by line."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longspan.foundation.errors import DataError
from longspan.records.store import Record, RecordStore


def record(item: str, value: float = 1.5, fingerprint: str = "f") -> Record:
    return Record.make(
        probe="perplexity",
        protocol={"context": 64},
        item=item,
        subject="AAAA",
        seed=0,
        fingerprint=fingerprint,
        answer={"nll": value, "text": "é\n"},
        seconds=0.25,
    )


ALL = [record(f"document-{i}", i / 7) for i in range(4)]


def test_records_come_back_as_written_and_known_ones_are_skipped(tmp_path: Path) -> None:
    store = RecordStore(tmp_path / "deep" / "records.jsonl")
    assert store.append(ALL[:2]) == 2
    assert store.append([ALL[1], ALL[2], ALL[2]]) == 1
    again = RecordStore(store.path)
    assert list(again) == ALL[:3] == list(store)
    assert len(again) == 3
    assert ALL[0].key in again
    assert ALL[3].key not in again
    assert again.append(ALL) == 1


def test_a_file_cut_at_any_byte_resumes_to_the_same_records(tmp_path: Path) -> None:
    whole = tmp_path / "whole.jsonl"
    RecordStore(whole).append(ALL)
    content = whole.read_bytes()
    path = tmp_path / "cut.jsonl"
    for offset in range(len(content) + 1):
        path.write_bytes(content[:offset])
        store = RecordStore(path)
        assert len(store) == content[:offset].count(b"\n")
        assert path.read_bytes() == content[: content[:offset].rfind(b"\n") + 1]
        store.append(ALL)
        assert path.read_bytes() == content


@settings(max_examples=40, deadline=None)
@given(batches=st.lists(st.lists(st.integers(0, 8), max_size=5), max_size=5), cut=st.integers(0, 3_000))
def test_any_batches_with_a_cut_between_hold_each_record_once(
    tmp_path_factory: pytest.TempPathFactory, batches: list[list[int]], cut: int
) -> None:
    path = tmp_path_factory.mktemp("records") / "records.jsonl"
    for batch in batches:
        RecordStore(path).append(record(str(i)) for i in batch)
        path.write_bytes(path.read_bytes()[:cut])
    store = RecordStore(path)
    store.append(record(str(i)) for batch in batches for i in batch)
    assert sorted(r.item for r in store) == sorted({str(i) for batch in batches for i in batch})


def test_two_open_stores_do_not_duplicate(tmp_path: Path) -> None:
    first, second = RecordStore(tmp_path / "r.jsonl"), RecordStore(tmp_path / "r.jsonl")
    assert first.append(ALL[:2]) == 2
    assert second.append(ALL) == 2
    assert first.append(ALL) == 0
    assert list(first) == ALL


@pytest.mark.parametrize("damage", [b"{broken\n", b"\xff\xfe\n", b"{}\n", b"\n", b"3\n"])
def test_a_damaged_middle_line_is_refused_by_file_and_line(tmp_path: Path, damage: bytes) -> None:
    path = tmp_path / "records.jsonl"
    RecordStore(path).append(ALL[:3])
    lines = path.read_bytes().splitlines(keepends=True)
    content = lines[0] + damage + lines[2]
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"records\.jsonl:2 "):
        RecordStore(path)
    assert path.read_bytes() == content


def test_an_altered_or_repeated_line_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    RecordStore(path).append(ALL[:2])
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[0] + lines[1].replace(b"document-1", b"document-9"))
    with pytest.raises(DataError, match=r":2 was altered"):
        RecordStore(path)
    path.write_bytes(lines[0] + lines[1] + lines[0])
    with pytest.raises(DataError, match=r":3 repeats"):
        RecordStore(path)


def test_numbers_that_are_not_finite_are_refused_and_nothing_is_written(tmp_path: Path) -> None:
    store = RecordStore(tmp_path / "records.jsonl")
    with pytest.raises(ValueError, match="JSON compliant"):
        store.append([ALL[0], record("bad", float("nan"))])
    assert list(store) == []


def test_a_full_disk_leaves_the_file_as_it_was(tmp_path: Path) -> None:
    """A file-size limit of the process stands for the full disk."""
    path = tmp_path / "records.jsonl"
    RecordStore(path).append(ALL[:2])
    before = path.read_bytes()
    script = (
        "import resource, signal, sys\n"
        "from pathlib import Path\n"
        "from longspan.foundation.errors import DataError\n"
        "from longspan.records.store import Record, RecordStore\n"
        "store = RecordStore(Path(sys.argv[1]))\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), resource.RLIM_INFINITY))\n"
        "records = [Record.make(probe='p', protocol={}, item=str(i), subject='s', seed=0, fingerprint='f', answer={})"
        " for i in range(50)]\n"
        "try:\n"
        "    store.append(records)\n"
        "except DataError as error:\n"
        "    assert 'no disk space left' in error.given, error\n"
        "    sys.exit(7)\n"
    )
    limit = str(len(before) + 300)
    environment = {**os.environ, "PYTHONPATH": "src"}
    done = subprocess.run([sys.executable, "-c", script, str(path), limit], check=False, env=environment)
    assert done.returncode == 7
    assert path.read_bytes() == before


def test_a_killed_process_loses_at_most_the_batch_in_flight(tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    script = (
        "import sys\n"
        "from pathlib import Path\n"
        "from longspan.records.store import Record, RecordStore\n"
        "store = RecordStore(Path(sys.argv[1]))\n"
        "for batch in range(10_000):\n"
        "    store.append([Record.make(probe='p', protocol={}, item=f'{batch}-{i}', subject='s', seed=0,"
        " fingerprint='f', answer={'pad': 'x' * 200}) for i in range(20)])\n"
        "    print(batch, flush=True)\n"
    )
    environment = {**os.environ, "PYTHONPATH": "src"}
    with subprocess.Popen(
        [sys.executable, "-c", script, str(path)], stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        assert process.stdout is not None
        for _ in range(5):
            acknowledged = int(process.stdout.readline())
        process.kill()
    items = [r.item for r in RecordStore(path)]
    assert len(items) == len(set(items))
    assert {f"{batch}-{i}" for batch in range(acknowledged + 1) for i in range(20)} <= set(items)
