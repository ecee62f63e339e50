"""The folder of a study's report: its name, its resolved study file, and the refusal of another study's folder."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path
from typing import Any

import yaml

from longspan.foundation.errors import UserError
from longspan.foundation.files import atomic_write, digest
from longspan.study.schema import HOW_TO_RUN, Study

RESOLVED, REPORT = "study.yaml", "report.html"


def study_folder(study: Study, runs: Path) -> Path:
    """Where a study's report goes: `runs/NAME`, with the variant and a hash where overrides changed it."""
    parts = [study.name, *re.findall(r"[\w.-]+", study.variant)]
    unnamed = {"variant", *HOW_TO_RUN, *(f"training.{name}" for name in HOW_TO_RUN)}
    changes = [text for text in study.overrides if text.partition("=")[0] not in unnamed]
    if changes:
        parts.append(digest(changes)[:8])
    return runs / "-".join(parts)


def claim_study_folder(study: Study, folder: Path) -> str:
    """Write the resolved study into its folder.

    The report of another version of the study moves to a folder beside it, named after that version.

    Returns:
        where that is, as a line for the reader; empty where nothing moved.

    Raises:
        UserError: the folder holds something else, or cannot be made.
    """
    path = folder / RESOLVED
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"{folder} cannot be made: {error.strerror}",
            "a folder that can be written",
            "choose another one with --runs",
        ) from None
    moved = ""
    if path.exists():
        found = _read(path)
        if not isinstance(found, dict) or found.get("study") != study.name:
            raise UserError(
                f"{folder} holds the results of another configuration",
                f"a folder of the study {study.name}",
                "move it away, or choose another folder with --runs",
            )
        if found != yaml.safe_load(resolved_yaml(study)) and (folder / REPORT).exists():
            aside = folder.with_name(f"{folder.name}-was-{digest(found)[:8]}")
            # The same version moved here before; both reports are of the same records.
            shutil.rmtree(aside, ignore_errors=True)
            os.replace(folder, aside)
            moved = f"the study was changed since its last report, which is in {aside} now"
    elif any(not entry.name.startswith(".") for entry in folder.iterdir()):
        raise UserError(f"{folder} is not a study's folder", "an empty or new folder", "choose another one with --runs")
    with atomic_write(path) as file:
        file.write(resolved_yaml(study))
    return moved


def _read(path: Path) -> Any:
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError):
        return None


def resolved_yaml(study: Study) -> str:
    """The resolved study as YAML text."""
    return yaml.safe_dump(study.resolved(), sort_keys=False, allow_unicode=True, width=110)
