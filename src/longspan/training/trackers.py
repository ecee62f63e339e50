"""Where metrics go besides `metrics.jsonl`: TensorBoard and Weights & Biases, both optional, both safe to resume."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Protocol

from longspan.foundation.config import Config
from longspan.foundation.extras import require
from longspan.foundation.files import read_json, write_json


class Tracker(Protocol):
    """Follows a run. A record is a line of `metrics.jsonl`; the file itself stays the source of truth."""

    def start(self, directory: Path, configuration: Mapping[str, Any], step: int) -> None:
        """Begin, or go on after `step` finished steps: records of later steps may come a second time."""

    def log(self, record: Mapping[str, Any]) -> None:
        """Take one record; `record["step"]` counts finished optimizer steps."""

    def close(self) -> None:
        """Flush; called also when the run fails or is stopped."""


class TrackingConfig(Config):
    """Which trackers follow a run.

    Attributes:
        tensorboard: write event files to `tensorboard/` in the run's directory (extra `tensorboard`).
        wandb: `online`, `offline` (files in the run's directory, for `wandb sync`) or `off` (extra `wandb`).
        project: the W&B project.
    """

    tensorboard: bool = False
    wandb: Literal["off", "online", "offline"] = "off"
    project: str = "longspan"


def make_trackers(config: TrackingConfig, name: str) -> list[Tracker]:
    """The trackers of one run called `name`.

    Raises:
        MissingExtra: a tracker is asked for whose package is not installed; said now, not after an hour of training.
    """
    trackers: list[Tracker] = []
    if config.tensorboard:
        trackers.append(TensorBoardTracker())
    if config.wandb != "off":
        trackers.append(WandbTracker(name, config.project, config.wandb))
    return trackers


def _numbers(record: Mapping[str, Any]) -> dict[str, float]:
    kind = record["kind"]
    return {
        f"{kind}/{key}": value
        for key, value in record.items()
        if key not in ("kind", "step") and isinstance(value, int | float)
    }


class TensorBoardTracker:
    """Scalars in `tensorboard/`; what a killed run wrote past its checkpoint is hidden on resume (`purge_step`)."""

    def __init__(self) -> None:
        require("tensorboard")
        self._writer: Any = None

    def start(self, directory: Path, configuration: Mapping[str, Any], step: int) -> None:
        """Open a new event file."""
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(directory / "tensorboard"), purge_step=step + 1)

    def log(self, record: Mapping[str, Any]) -> None:
        """Write all numbers of the record."""
        for name, value in _numbers(record).items():
            self._writer.add_scalar(name, value, record["step"])

    def close(self) -> None:
        """Flush and close."""
        if self._writer is not None:
            self._writer.close()


class WandbTracker:
    """One W&B run over all sessions; its id and the last step it has are kept in `wandb.json`."""

    def __init__(self, name: str, project: str, mode: Literal["online", "offline"]) -> None:
        self._wandb: Any = require("wandb")
        self._name, self._project, self._mode = name, project, mode
        self._run: Any = None
        self._last: dict[str, int] = {}

    def start(self, directory: Path, configuration: Mapping[str, Any], step: int) -> None:
        """Start the run, or go on with it."""
        self._path = directory / "wandb.json"
        known: dict[str, Any] = {"id": secrets.token_hex(4), "last": {}}
        if self._path.exists():
            known = read_json(self._path)
        self._last = dict(known["last"])
        self._run = self._wandb.init(
            project=self._project,
            name=self._name,
            id=known["id"],
            resume="allow",
            mode=self._mode,
            dir=str(directory),
            config=dict(configuration),
        )
        self._id = known["id"]
        # W&B's own step only ever grows; ours is the number of finished optimizer steps.
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")
        self._keep()

    def log(self, record: Mapping[str, Any]) -> None:
        """Log the record unless an earlier session, killed after its checkpoint, already did."""
        kind, step = record["kind"], record["step"]
        if step <= self._last.get(kind, 0):
            return
        self._run.log({"step": step, **_numbers(record)})
        self._last[kind] = step
        self._keep()

    def close(self) -> None:
        """Finish this session."""
        if self._run is not None:
            self._run.finish()

    def _keep(self) -> None:
        write_json(self._path, {"id": self._id, "last": self._last})
