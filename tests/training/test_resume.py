"""An interrupted run ends as an uninterrupted one, bit for bit."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from longspan.foundation.errors import DataError, Stopped, UserError
from longspan.foundation.progress import Progress
from longspan.training import checkpoint
from longspan.training.checkpoint import read_state
from longspan.training.metrics import read_metrics
from longspan.training.result import TrainingResult

TIMES = ("seconds", "tokens_per_second")


def outcome(directory: Path) -> dict[str, Any]:
    """Everything of a run but its timings."""
    metrics = read_metrics(directory / "metrics.jsonl")
    files = [f"{which}/model.safetensors" for which in ("last", "best")] + ["last/optimizer.safetensors"]
    return {
        "metrics": [{k: v for k, v in line.items() if k not in TIMES} for line in metrics],
        "files": {name: (directory / "checkpoints" / name).read_bytes() for name in files},
        "random": read_state(directory / "checkpoints" / "last")["random"],
        "best": TrainingResult.read(directory / "result.json").best.step,
    }


@pytest.fixture(scope="module")
def whole(small: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    directory = tmp_path_factory.mktemp("whole")
    small.run(directory)
    return outcome(directory)


def stop_at(step: int, error: type[BaseException] = Stopped) -> Callable[[Progress], None]:
    calls = iter(range(10_000))

    def report(progress: Progress, /) -> None:
        if next(calls) == step:
            raise error("enough")

    return report


def test_the_same_seed_gives_the_same_bytes(small: ModuleType, tmp_path: Path, whole: dict[str, Any]) -> None:
    small.run(tmp_path)
    assert outcome(tmp_path) == whole


# The report is called once before the first step, after each step, and for every batch of an evaluation.
@pytest.mark.parametrize(
    ("call", "error"),
    [*((n, Stopped) for n in (0, 1, 2, 4, 6, 7, 8, 14, 17, 18)), *((n, KeyboardInterrupt) for n in (3, 6))],
)
def test_stopping_anywhere_and_going_on_equals_no_interruption(
    small: ModuleType, tmp_path: Path, whole: dict[str, Any], call: int, error: type[BaseException]
) -> None:
    with pytest.raises(Stopped, match="run the same command again"):
        small.run(tmp_path, report=stop_at(call, error))
    small.run(tmp_path)
    assert outcome(tmp_path) == whole


def test_stopping_over_and_over_equals_no_interruption(
    small: ModuleType, tmp_path: Path, whole: dict[str, Any]
) -> None:
    sessions = 1
    while True:
        try:
            result = small.run(tmp_path, report=stop_at(3))
            break
        except Stopped:
            sessions += 1
            assert sessions < 50
    assert outcome(tmp_path) == whole
    assert result.sessions >= 6


def test_a_process_killed_at_random_moments_and_started_again_equals_no_interruption(
    small: ModuleType, tmp_path: Path
) -> None:
    killed, straight = tmp_path / "killed", tmp_path / "straight"
    script = [sys.executable, small.__file__, str(killed), str(straight)]
    done = subprocess.run(script, check=True, capture_output=True, text=True)
    assert int(done.stdout) >= 3
    assert outcome(killed) == outcome(straight)


@pytest.mark.parametrize("after", range(1, 9))
def test_dying_at_any_rename_of_a_checkpoint_loses_nothing(
    small: ModuleType, tmp_path: Path, whole: dict[str, Any], after: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(BaseException):
        pass

    real, calls = os.replace, iter(range(1000))

    def replace(source: Any, target: Any) -> None:
        real(source, target)
        if "checkpoints" in str(target) and Path(target).suffix != ".json" and next(calls) == after:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr("os.replace", replace)
        with pytest.raises(Killed):
            small.run(tmp_path)
    small.run(tmp_path)
    assert outcome(tmp_path) == whole


@pytest.mark.parametrize("write", [1, 2, 3, 4, 5])
def test_a_full_disk_leaves_the_previous_checkpoint_usable(
    small: ModuleType, tmp_path: Path, whole: dict[str, Any], write: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = checkpoint.save_tensors, iter(range(1000))

    def save(tensors: Any, path: Path) -> None:
        if next(calls) == write:
            path.write_bytes(b"half a file")
            raise OSError(errno.ENOSPC, "no space left on device")
        real(tensors, path)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save_tensors", save)
        with pytest.raises(DataError, match="no disk space left"):
            small.run(tmp_path)
    small.run(tmp_path)
    assert outcome(tmp_path) == whole


@pytest.mark.slow
def test_a_really_full_disk_is_said_and_the_run_goes_on_once_there_is_space(small: ModuleType, tmp_path: Path) -> None:
    if shutil.which("unshare") is None or subprocess.run(["unshare", "-rm", "true"], check=False).returncode:
        pytest.skip("this system lets nobody mount a small file system")
    code = (
        f"import sys; sys.path.insert(0, {str(Path(small.__file__).parent)!r}); import small_run, pathlib, torch\n"
        "torch.set_num_threads(1)\n"
        f"ballast = pathlib.Path({str(tmp_path)!r}) / 'ballast'; ballast.write_bytes(b'0' * 280_000)\n"
        f"where = pathlib.Path({str(tmp_path)!r}) / 'run'\n"
        "try:\n    small_run.run(where)\nexcept Exception as error:\n    print(type(error).__name__, error)\n"
        "ballast.unlink(); print(small_run.run(where).steps)\n"
    )
    script = tmp_path.parent / "full.py"
    script.write_text(code)
    command = f'mount -t tmpfs -o size=360k none "{tmp_path}" && exec "{sys.executable}" "{script}"'
    done = subprocess.run(["unshare", "-rm", "sh", "-c", command], capture_output=True, text=True, check=False)
    assert "DataError no disk space left" in done.stdout, done.stdout + done.stderr
    assert done.stdout.endswith("12\n")


def test_a_checkpoint_of_another_configuration_is_refused_and_both_values_named(
    small: ModuleType, tmp_path: Path
) -> None:
    with pytest.raises(Stopped):
        small.run(tmp_path, report=stop_at(6))
    before = outcome_of_files(tmp_path)
    with pytest.raises(UserError, match=r"training\.peak_lr is 0\.01 there and 0\.02 here"):
        small.run(tmp_path, small.settings(peak_lr=0.02))
    with pytest.raises(UserError, match=r"model\.width is 16 there and 24 here"):
        small.run(tmp_path, net=small.model(width=24, dropout=0.1))
    with pytest.raises(UserError, match=r"more\.corpus is None there and 'abc' here"):
        small.run(tmp_path, configuration={"corpus": "abc"})
    assert outcome_of_files(tmp_path) == before
    # The checkpoint itself knows too, should it have been copied elsewhere.
    (tmp_path / "configuration.json").unlink()
    with pytest.raises(UserError, match=r"without configuration\.json"):
        small.run(tmp_path)


def outcome_of_files(directory: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def test_a_finished_run_is_not_run_again(small: ModuleType, tmp_path: Path) -> None:
    first = small.run(tmp_path)
    files = outcome_of_files(tmp_path)
    net = small.model(seed=5, dropout=0.1)
    assert small.run(tmp_path, net=net) == first
    assert outcome_of_files(tmp_path) == files
    trained = small.model(dropout=0.1)
    checkpoint.load_weights(tmp_path / "checkpoints" / "last", trained)
    assert all((a == b).all() for a, b in zip(net.parameters(), trained.parameters(), strict=True))


def test_damaged_checkpoints_are_refused_by_name(small: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(Stopped):
        small.run(tmp_path, report=stop_at(6))
    last = tmp_path / "checkpoints" / "last"
    for name in ("model.safetensors", "optimizer.safetensors", "training_state.json"):
        whole_file = (last / name).read_bytes()
        (last / name).write_bytes(whole_file[: len(whole_file) // 2])
        with pytest.raises(DataError, match=name):
            small.run(tmp_path)
        (last / name).write_bytes(whole_file)
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_bytes(metrics.read_bytes()[:100])
    with pytest.raises(DataError, match=r"metrics\.jsonl has 100 bytes"):
        small.run(tmp_path)


def test_weights_of_another_shape_are_refused(small: ModuleType, tmp_path: Path) -> None:
    small.run(tmp_path)
    with pytest.raises(DataError, match=r"`embedding\.weight` is \(32, 16\), the model has \(32, 24\)"):
        checkpoint.load_weights(tmp_path / "checkpoints" / "best", small.model(width=24))
    with pytest.raises(DataError, match=r"layers\.1\..*the model has no such weight"):
        checkpoint.load_weights(tmp_path / "checkpoints" / "best", small.model(pattern="A"))


def test_ctrl_c_finishes_the_step_and_keeps_it(small: ModuleType, tmp_path: Path, whole: dict[str, Any]) -> None:
    calls = iter(range(1000))

    class Rows(small.Rows):  # type: ignore[name-defined,misc]
        def __next__(self) -> Any:
            if next(calls) == 9:
                os.kill(os.getpid(), signal.SIGINT)
            return super().__next__()

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(Stopped, match="stopped at step 5 of 12"):
        small.run(tmp_path, batches=lambda: Rows(4))
    assert signal.getsignal(signal.SIGINT) is before
    small.run(tmp_path)
    assert outcome(tmp_path) == whole


def test_a_second_ctrl_c_in_the_middle_of_a_step_keeps_the_last_whole_checkpoint(
    small: ModuleType, tmp_path: Path, whole: dict[str, Any]
) -> None:
    calls = iter(range(1000))

    class Rows(small.Rows):  # type: ignore[name-defined,misc]
        def __next__(self) -> Any:
            if next(calls) == 13:
                raise KeyboardInterrupt
            return super().__next__()

    with pytest.raises(Stopped, match="stopped at step 5 of 12"):
        small.run(tmp_path, batches=lambda: Rows(4))
    small.run(tmp_path)
    assert outcome(tmp_path) == whole
