"""Jobs: a directory a configuration, done only when the marker is there."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from longspan.foundation.errors import LongspanError, UserError
from longspan.foundation.files import read_json, write_json
from longspan.study.environment import doctor, hardware
from longspan.study.jobs import Job

JOB = Job("train", "train AAAA seed 0", {"width": 64}, needs=("a" * 64,))


def test_the_key_covers_specification_and_needs_but_not_the_title() -> None:
    assert replace(JOB, title="another", details={"x": 1}).key == JOB.key
    assert replace(JOB, specification={"width": 65}).key != JOB.key
    assert replace(JOB, needs=("b" * 64,)).key != JOB.key
    assert replace(JOB, kind="probe").key != JOB.key


def test_a_job_is_done_only_when_its_marker_is_there(tmp_path: Path) -> None:
    with JOB.claim(tmp_path) as folder:
        assert not JOB.is_done(tmp_path)
        JOB.finish(folder, {"loss": 3.5})
    assert JOB.is_done(tmp_path)
    assert JOB.result(tmp_path) == {"loss": 3.5}


def test_the_marker_says_which_kernels_the_ops_ran_as(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with JOB.claim(tmp_path) as folder:
        JOB.finish(folder, {})
    assert read_json(folder / "done.json")["environment"]["hardware"]["kernels"] == "plain torch (auto)"


def test_a_gpu_without_triton_is_no_reason_to_lose_a_finished_job(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("longspan.ops.kernels._Setting.triton", False)
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda: True)
    assert hardware()["kernels"] == "none: LONGSPAN_KERNELS = 'auto' without Triton"
    advice = {topic: advice for topic, _, advice in doctor(Path("runs"))}["kernels"]
    assert "LONGSPAN_KERNELS=plain" in advice


def test_a_directory_of_another_configuration_is_refused(tmp_path: Path) -> None:
    with JOB.claim(tmp_path) as folder:
        pass
    specification = read_json(folder / "job.json")
    write_json(folder / "job.json", {**specification, "key": "0" * 64, "title": "train MMMM seed 3"})
    with pytest.raises(UserError, match="another configuration") as caught, JOB.claim(tmp_path):
        pass
    assert "train MMMM seed 3" in str(caught.value)


def test_two_processes_cannot_work_in_one_directory(tmp_path: Path) -> None:
    code = (
        "from pathlib import Path; import sys, time\n"
        "from longspan.study.jobs import Job\n"
        "job = Job('train', 'train AAAA seed 0', {'width': 64}, needs=('a' * 64,))\n"
        f"with job.claim(Path({str(tmp_path)!r})):\n"
        "    print('held', flush=True); sys.stdin.read()\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        assert other.stdin is not None
        other.stdout.readline()
        with pytest.raises(LongspanError, match=f"in use by process {other.pid}"), JOB.claim(tmp_path):
            pass
        other.stdin.close()
        other.wait()
    with JOB.claim(tmp_path):
        pass
