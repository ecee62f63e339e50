"""A user's own file: loaded once, refused by name where it is missing or broken."""

from __future__ import annotations

from pathlib import Path

import pytest

from longspan.foundation.errors import UserError
from longspan.foundation.plugins import load_file


def test_a_file_is_run_once(tmp_path: Path) -> None:
    path = tmp_path / "counted.py"
    path.write_text("VALUE = []\n")
    load_file(path).VALUE.append(1)
    assert load_file(path).VALUE == [1]


def test_a_plugin_that_is_missing_or_broken_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere\.py is not there"):
        load_file(tmp_path / "nowhere.py")
    broken = tmp_path / "broken.py"
    broken.write_text("import nothing_of_that_name\n")
    for _ in range(2):
        with pytest.raises(UserError, match="nothing_of_that_name"):
            load_file(broken)
