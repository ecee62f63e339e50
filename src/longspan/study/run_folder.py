"""The folder of a study's report: its name, its resolved study file, and the refusal of another study's folder."""

from __future__ import annotations

import re
from pathlib import Path

import yaml

from longspan.foundation.errors import UserError
from longspan.foundation.files import atomic_write, digest
from longspan.study.schema import Study

RESOLVED = "study.yaml"


def study_folder(study: Study, runs: Path) -> Path:
    """Where a study's report goes: `runs/NAME`, with the variant and a hash where overrides changed it."""
    parts = [study.name, *re.findall(r"[\w.-]+", study.variant)]
    changes = [text for text in study.overrides if not text.startswith("variant=")]
    if changes:
        parts.append(digest(changes)[:8])
    return runs / "-".join(parts)


def claim_study_folder(study: Study, folder: Path) -> None:
    """Write the resolved study into its folder; a folder of another study is refused.

    Raises:
        UserError: the folder holds something else.
    """
    path = folder / RESOLVED
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError, PermissionError) as error:
        raise UserError(
            f"{folder} cannot be made: {error.strerror}",
            "a folder that can be written",
            "choose another one with --runs",
        ) from None
    if path.exists():
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
        if not isinstance(found, dict) or found.get("study") != study.name:
            raise UserError(
                f"{folder} holds the results of another configuration",
                f"a folder of the study {study.name}",
                "move it away, or choose another folder with --runs",
            )
    elif folder.exists() and any(folder.iterdir()):
        raise UserError(f"{folder} is not a study's folder", "an empty or new folder", "choose another one with --runs")
    with atomic_write(path) as file:
        file.write(resolved_yaml(study))


def resolved_yaml(study: Study) -> str:
    """The resolved study as YAML text."""
    return yaml.safe_dump(study.resolved(), sort_keys=False, allow_unicode=True, width=110)
