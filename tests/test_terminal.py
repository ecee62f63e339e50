"""What a person reads of a job while it works."""

from __future__ import annotations

import pytest

from longspan import terminal
from longspan.foundation.progress import Progress
from longspan.study.jobs import Job
from longspan.terminal import Terminal


@pytest.mark.parametrize(("warming", "left"), [(True, "2 min 00 s left"), (False, "3 min 49 s left")])
def test_the_time_left_leaves_out_a_step_that_compiled(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], warming: bool, left: str
) -> None:
    now = 100.0
    monkeypatch.setattr(terminal.time, "monotonic", lambda: now)
    shown, job = Terminal(), Job("train", "train A seed 0", {})
    for now, steps in ((100.0, 0), (120.0, 1), (140.0, 21)):  # noqa: B007
        shown.observe(job, Progress("train", steps, 141, "steps", warming=warming and steps == 1))
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "train A seed 0: train  0%"
    assert lines[-1].endswith(left)
    assert ("left" in lines[1]) == (not warming)
