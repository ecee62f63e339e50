"""What determines a run, and whose directory this is: nothing goes on in a directory of another configuration."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from longspan.foundation.errors import UserError
from longspan.foundation.files import digest, read_json, write_json
from longspan.training.checkpoint import check_configuration
from longspan.training.compilation import resolve_compile
from longspan.training.config import TrainingConfig
from longspan.training.precision import resolve_dtype

if TYPE_CHECKING:
    from longspan.models.language_model import LanguageModel

CONFIGURATION = "configuration.json"


def run_configuration(
    model: LanguageModel,
    training: TrainingConfig,
    *,
    isolation: str,
    device: torch.device,
    more: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """All that determines the outcome of a run, as JSON values; `more` is what only the caller knows (the corpus)."""
    settings = training.model_dump(mode="json")
    settings["dtype"] = resolve_dtype(training.dtype, device)
    settings["compile"] = resolve_compile(training.compile, device)
    return {
        "training": settings,
        "isolation": isolation,
        "device": device.type,
        "model": model.config.model_dump(mode="json"),
        "parameters": {
            "count": sum(p.numel() for p in model.parameters()),
            "shapes": digest({name: list(p.shape) for name, p in model.named_parameters()}),
        },
        "more": dict(more or {}),
    }


def claim(directory: Path, configuration: Mapping[str, Any]) -> None:
    """Say whose directory this is before anything in it is touched.

    Raises:
        UserError: it is another configuration's, or it holds a run of unknown origin.
    """
    path = directory / CONFIGURATION
    if path.exists():
        check_configuration(directory, read_json(path), configuration)
    elif (directory / "metrics.jsonl").exists() or (directory / "checkpoints").exists():
        raise UserError(
            f"{directory} holds a run without {CONFIGURATION}",
            "an empty directory, or one that Longspan wrote",
            "give this run another directory",
        )
    else:
        write_json(path, configuration)
