"""The studies that Longspan ships: where they are and what they ask, without building anything."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

import yaml

from longspan.foundation.config import did_you_mean
from longspan.foundation.errors import UserError
from longspan.foundation.files import read_json

FIRST = "quickstart"
"""The study to begin with."""


def shipped_studies() -> dict[str, Path]:
    """name → file of the studies that Longspan ships."""
    folder = Path(str(resources.files("longspan") / "studies"))
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def find_study(name: str) -> Path:
    """The file of a shipped study by name, or of the user's own by path.

    Raises:
        UserError: naming the nearest shipped study.
    """
    shipped = shipped_studies()
    if name in shipped:
        return shipped[name]
    path = Path(name)
    if path.suffix in {".yaml", ".yml"} or path.exists():
        if path.is_dir():
            raise UserError(f"study file {path} is a folder", "a YAML file or a shipped study", _instead_of(path))
        if not path.is_file():
            raise UserError(
                f"study file {path} does not exist", "a YAML file or a shipped study", f"one of: {', '.join(shipped)}"
            )
        return path
    fix = did_you_mean(name, shipped, "see `longspan studies`")
    raise UserError(f"no study is called {name!r}", f"{', '.join(shipped)}, or a path to a .yaml file", fix)


def _instead_of(folder: Path) -> str:
    """What to name in place of a folder; that of a report is written from a study and overrides, which it holds."""
    facts = folder / "report.json"
    if not facts.is_file():
        return "name the file in it"
    command = read_json(facts)["reproduce"]["command"]
    return f"it is the report of `{command}`: name that study, with its overrides"


def list_studies() -> list[dict[str, str]]:
    """Name, question and variants of every shipped study, the one to begin with first."""
    rows = []
    for name, path in sorted(shipped_studies().items(), key=lambda study: study[0] != FIRST):
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
        rows.append(
            {
                "study": name,
                "question": " ".join(raw["question"].split()),
                # Those that the study compares are no choice.
                "variants": ", ".join(
                    name for name in raw.get("variants", {}) if name not in raw.get("vary", {}).get("variant", ())
                ),
            }
        )
    return rows
