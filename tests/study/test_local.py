"""Jobs in a process per device: what one refuses is told as such, and one that the system kills as that."""

from __future__ import annotations

from pathlib import Path

import pytest

from longspan.foundation.errors import MachineError
from longspan.foundation.extras import MissingExtra
from longspan.study.executors.local import LocalExecutor
from longspan.study.jobs import Job

KILLED = "import os, signal\nos.kill(os.getpid(), signal.SIGKILL)\n"
REFUSED = "from longspan.foundation.extras import MissingExtra\nraise MissingExtra('hub')\n"


def run(tmp_path: Path, plugin_text: str) -> None:
    plugin = tmp_path / "plugin.py"
    plugin.write_text(plugin_text)
    jobs = [
        Job("train", f"train AA seed {seed}", {"seed": seed}, details={"plugins": [str(plugin)]}) for seed in (0, 1)
    ]
    executor = LocalExecutor(["cpu", "cpu"])
    executor.run(
        jobs, tmp_path / "runs", lambda job, progress: None, lambda job, result: None, lambda job, reason: None
    )


def test_what_a_process_refuses_comes_back_in_its_own_words(tmp_path: Path) -> None:
    with pytest.raises(MissingExtra, match="`datasets` is not installed") as caught:
        run(tmp_path, REFUSED)
    assert caught.value.fix == "pip install 'longspan[hub]'"


def test_a_killed_process_is_told_with_its_job_and_what_to_lower(tmp_path: Path) -> None:
    with pytest.raises(MachineError, match="out of memory and killed") as caught:
        run(tmp_path, KILLED)
    assert "train AA seed" in caught.value.given
    assert "training.batch_tokens" in caught.value.fix
