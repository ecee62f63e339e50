"""Files that are whole or absent, and what killed processes leave behind."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from longspan.foundation.errors import DataError
from longspan.foundation.files import atomic_directory, atomic_write, read_json

DEAD = 2**22 + 1
"""Above the largest process number of Linux."""


def test_what_killed_processes_left_is_removed_and_what_living_ones_write_stays(tmp_path: Path) -> None:
    dead = [tmp_path / f".report.partial-{DEAD}", tmp_path / f".figures.partial-{DEAD}"]
    alive = tmp_path / f".report.partial-{os.getppid()}"
    dead[0].write_text("half")
    dead[1].mkdir()
    alive.write_text("half")
    with atomic_write(tmp_path / "report") as file:
        file.write("whole")
    with atomic_directory(tmp_path / "figures") as folder:
        (folder / "a").write_text("whole")
    assert not any(path.exists() for path in dead)
    assert alive.exists()
    assert (tmp_path / "report").read_text() == "whole"


def test_an_error_inside_the_block_leaves_the_older_file(tmp_path: Path) -> None:
    path = tmp_path / "report"
    path.write_text("old")
    with pytest.raises(TypeError), atomic_write(path) as file:
        json.dump(["written before the set is met", set()], file)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(("content", "words"), [(None, "is missing"), ("{", "is not readable JSON")])
def test_json_that_is_missing_or_damaged_is_refused_by_name(tmp_path: Path, content: str | None, words: str) -> None:
    path = tmp_path / "job.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(DataError, match=rf"job\.json {words}") as caught:
        read_json(path)
    assert str(tmp_path) in caught.value.fix
