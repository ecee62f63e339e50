"""From a path or a hub id to an engine: a trained run, a study's folder with selectors, or Hugging Face weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from longspan.engines.native import Dtype, NativeEngine
from longspan.engines.run_index import SUBJECTS, find_run
from longspan.engines.trained_run import SUBJECT, TrainedRun, Weights
from longspan.foundation.errors import UserError

ALLOWED = "a run's folder, a study's folder, or a folder or hub id with Hugging Face weights"


def load(
    path: str | Path,
    *,
    weights: Weights = "best",
    dtype: Dtype | None = None,
    device: str = "cpu",
    revision: str | None = None,
    select: Mapping[str, Any] | None = None,
    batch_tokens: int = 8_192,
) -> NativeEngine:
    """Load a subject, ready to answer.

    Args:
        path: a run's folder (`runs/jobs/train-...`), a study's folder (`runs/STUDY`), or a folder or hub id with
            Hugging Face weights.
        weights: of a run: `best` or `last`.
        dtype: of the computation; None: fp32.
        device: where it runs.
        revision: branch, tag or commit of a hub id.
        select: which subject of a study, e.g. `{"pattern": "AMAM", "seed": 0}`.
        batch_tokens: most positions in one forward pass.

    Raises:
        UserError: nothing of the kind is there, or an argument that has no meaning for what is there.
    """
    check_device(device)
    folder = Path(path).expanduser()
    run = locate_run(folder, select or {})
    if run is not None:
        if revision is not None:
            raise UserError(f"revision {revision!r} for the run {run}", "revisions of hub ids only", "leave it out")
        found = TrainedRun.open(run)
        return engine_of(found, weights, dtype=dtype or "fp32", device=device, batch_tokens=batch_tokens)
    if weights != "best":
        raise UserError(f"weights {weights!r} for {path}", "`best` or `last` of a run trained here", "leave it out")
    problem = f"{path} holds neither {SUBJECT} nor {SUBJECTS}" if folder.exists() else f"{path} is not there"
    raise UserError(problem, ALLOWED, "check the path")


def locate_run(folder: Path, select: Mapping[str, Any]) -> Path | None:
    """The run's folder that a folder and selectors stand for; None where `folder` holds no run of Longspan.

    Raises:
        UserError: selectors for what is no study's folder, or none or several subjects fit them.
    """
    if (folder / SUBJECTS).is_file():
        return find_run(folder, select)
    if select:
        given = " ".join(f"{key}={value}" for key, value in select.items())
        raise UserError(
            f"selectors {given} for {folder}",
            f"selectors with a study's folder (one with {SUBJECTS}) only",
            "leave them out, or name the study's folder",
        )
    return folder if (folder / SUBJECT).is_file() else None


def default_device() -> str:
    """The first CUDA device where there is one, else the CPU."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def check_device(device: str) -> None:
    """Refuse a device that is not here.

    Raises:
        UserError: naming the devices that are.
    """
    here = ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
    if device not in (*here, *(["cuda"] if len(here) > 1 else [])):
        raise UserError(f"device = {device!r}", ", ".join(here), "choose one of these")


def engine_of(
    run: TrainedRun,
    weights: Weights = "best",
    *,
    dtype: Dtype = "fp32",
    device: str = "cpu",
    batch_tokens: int = 8_192,
) -> NativeEngine:
    """A trained run, ready to answer; see `load`."""
    return NativeEngine(
        run.load_model(weights),
        run.tokenizer,
        markers=run.markers,
        isolation=run.isolation,
        fingerprint=run.fingerprint(weights),
        device=device,
        dtype=dtype,
        batch_tokens=batch_tokens,
        trained_context=run.context,
        name=run.name,
    )
