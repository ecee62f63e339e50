"""Jobs in a process per device: one that the system kills is told as that."""

from __future__ import annotations

from pathlib import Path

import pytest

from longspan.foundation.errors import MachineError
from longspan.study.executors.local import LocalExecutor
from longspan.study.jobs import Job

KILLED = "import os, signal\nos.kill(os.getpid(), signal.SIGKILL)\n"


def test_a_killed_process_is_told_with_its_job_and_what_to_lower(tmp_path: Path) -> None:
    plugin = tmp_path / "killed.py"
    plugin.write_text(KILLED)
    jobs = [
        Job("train", f"train AA seed {seed}", {"seed": seed}, details={"plugins": [str(plugin)]}) for seed in (0, 1)
    ]
    executor = LocalExecutor(["cpu", "cpu"])
    with pytest.raises(MachineError, match="out of memory and killed") as caught:
        executor.run(
            jobs, tmp_path / "runs", lambda job, progress: None, lambda job, result: None, lambda job, reason: None
        )
    assert "train AA seed" in caught.value.given
    assert "training.batch_tokens" in caught.value.fix
