"""Metrics also go where people look at them, and a resumed run shows no step twice."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from longspan.foundation.errors import Stopped
from longspan.foundation.extras import MissingExtra
from longspan.foundation.progress import Progress
from longspan.training.metrics import MetricsFile, read_metrics
from longspan.training.trackers import TrackingConfig, make_trackers


class Died(Exception):
    pass


def dies_after(step: int) -> Any:
    def report(progress: Progress, /) -> None:
        if progress.stage == "train" and progress.done == step * 128:
            raise Died

    return report


def test_nothing_is_tracked_unless_asked() -> None:
    assert make_trackers(TrackingConfig(), "run") == []


def test_tensorboard_has_every_number_once_after_a_crash(small: ModuleType, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = TrackingConfig(tensorboard=True)
    training = small.settings(log_every=1)
    with pytest.raises(Died):
        small.run(tmp_path, training, report=dies_after(7), trackers=make_trackers(config, "run"))
    small.run(tmp_path, training, trackers=make_trackers(config, "run"))
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    lines = read_metrics(tmp_path / "metrics.jsonl", "train")
    scalars = events.Scalars("train/loss")
    assert [event.step for event in scalars] == [line["step"] for line in lines] == list(range(1, 13))
    assert [event.value for event in scalars] == pytest.approx([line["loss"] for line in lines])
    assert [event.step for event in events.Scalars("validation/bits_per_byte")] == [5, 10, 12]


def test_a_missing_package_is_named_before_training_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> ModuleType:
        raise ModuleNotFoundError(name=name)

    monkeypatch.setattr("importlib.import_module", missing)
    with pytest.raises(MissingExtra, match=r"longspan\[wandb\]"):
        make_trackers(TrackingConfig(wandb="offline"), "run")
    with pytest.raises(MissingExtra, match=r"longspan\[tensorboard\]"):
        make_trackers(TrackingConfig(tensorboard=True), "run")


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("wandb") is None, reason="the extra `wandb` is not installed")
def test_wandb_offline_goes_on_with_the_same_run(small: ModuleType, tmp_path: Path) -> None:
    config = TrackingConfig(wandb="offline")
    with pytest.raises(Died):
        small.run(tmp_path, report=dies_after(7), trackers=make_trackers(config, "run"))
    small.run(tmp_path, trackers=make_trackers(config, "run"))
    runs = list((tmp_path / "wandb").glob("offline-run-*"))
    assert len({path.name.rsplit("-", 1)[1] for path in runs}) == 1


def test_trackers_are_closed_when_the_run_is_stopped(small: ModuleType, tmp_path: Path) -> None:
    class Recorder:
        def __init__(self) -> None:
            self.said: list[Any] = []

        def start(self, directory: Path, configuration: Any, step: int) -> None:
            self.said.append(("start", step))

        def log(self, record: Any) -> None:
            self.said.append((record["kind"], record["step"]))

        def close(self) -> None:
            self.said.append("close")

    def stop(progress: Progress, /) -> None:
        if progress.done == 5 * 128:
            raise Stopped("enough")

    first, second = Recorder(), Recorder()
    with pytest.raises(Stopped):
        small.run(tmp_path, report=stop, trackers=[first])
    small.run(tmp_path, trackers=[second])
    assert first.said == [("start", 0), ("train", 1), ("train", 3), ("validation", 5), "close"]
    assert second.said[:2] == [("start", 5), ("train", 6)]
    assert second.said[-1] == "close"


def test_a_torn_last_line_is_left_out_and_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    metrics = MetricsFile(path)
    metrics.append({"kind": "train", "step": 1})
    size = metrics.sync()
    metrics.append({"kind": "train", "step": 2})
    metrics.close()
    with path.open("ab") as file:
        file.write(b'{"kind": "tr')
    assert [line["step"] for line in read_metrics(path)] == [1, 2]
    MetricsFile(path, keep=size).close()
    assert [line["step"] for line in read_metrics(path)] == [1]


def test_a_number_that_is_not_finite_never_gets_into_the_file(tmp_path: Path) -> None:
    metrics = MetricsFile(tmp_path / "metrics.jsonl")
    with pytest.raises(ValueError, match="JSON"):
        metrics.append({"kind": "train", "loss": float("nan")})
    metrics.close()
    assert (tmp_path / "metrics.jsonl").read_bytes() == b""
