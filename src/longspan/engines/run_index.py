"""Where the runs of a study lie: `subjects.json` in the study's folder, and how a person names one of them."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from longspan.foundation.errors import UserError
from longspan.foundation.files import read_json, write_json

SUBJECTS = "subjects.json"
FORMAT = 1
SHOWN = 8


@dataclass(frozen=True)
class ListedRun:
    """Where the run of one subject of a study lies.

    Attributes:
        label: the arm.
        factors: what distinguishes the arm, key → value as shown.
        seed: of the run.
        folder: its folder.
    """

    label: str
    factors: Mapping[str, str]
    seed: int
    folder: Path

    @property
    def shown(self) -> str:
        """What selects it, e.g. `pattern=AMAM seed=0`."""
        return " ".join(f"{key}={value}" for key, value in {**self.factors, "seed": self.seed}.items())

    def fits(self, key: str, value: Any) -> bool:
        """Whether a selector names it; true and false stand for `markers` and `no markers`."""
        key = key.rpartition(".")[2]
        found = str(self.seed) if key == "seed" else self.factors[key]
        switch = {"true": key, "false": f"no {key}"}.get(str(value).lower())
        return found in (str(value), switch)


def list_runs(folder: Path, runs: Iterable[ListedRun]) -> None:
    """Write `subjects.json` into the folder of a study; folders are kept relative, so that all can be moved."""
    rows = [
        {
            "label": run.label,
            "factors": dict(run.factors),
            "seed": run.seed,
            "run": os.path.relpath(run.folder, folder),
        }
        for run in runs
    ]
    write_json(folder / SUBJECTS, {"format": FORMAT, "subjects": rows})


def find_run(folder: Path, select: Mapping[str, Any]) -> Path:
    """The folder of the one run of a study that the selectors name, e.g. `{"pattern": "AMAM", "seed": 0}`.

    Raises:
        UserError: none or several fit; the choices are named.
    """
    listed = [
        ListedRun(row["label"], row["factors"], row["seed"], (folder / row["run"]).resolve())
        for row in read_json(folder / SUBJECTS)["subjects"]
    ]
    keys = {*listed[0].factors, "seed"}
    for key in select:
        if key.rpartition(".")[2] not in keys:
            raise UserError(f"selector `{key}`", ", ".join(sorted(keys)), "select by what the study varies")
    fitting = [run for run in listed if all(run.fits(key, value) for key, value in select.items())]
    if "part" not in select and len(fitting) > 1:
        # The first part of a study is meant unless another one is named.
        first = listed[0].factors.get("part")
        fitting = [run for run in fitting if run.factors.get("part") == first]
    if len(fitting) == 1:
        return fitting[0].folder
    given = " ".join(f"{key}={value}" for key, value in select.items()) or "nothing selected"
    shown = [run.shown for run in fitting or listed]
    more = f"; and {len(shown) - SHOWN} more" if len(shown) > SHOWN else ""
    raise UserError(
        f"{len(fitting)} of {len(listed)} subjects in {folder} fit ({given})",
        "; ".join(shown[:SHOWN]) + more,
        "add KEY=VALUE until one is left" if fitting else "name one of these",
    )


def parse_selectors(words: Iterable[str]) -> dict[str, str]:
    """`["pattern=AMAM", "seed=0"]` as a mapping; a value may stand in quotes, as the overrides of a study need them.

    Raises:
        UserError: a word that is not KEY=VALUE.
    """
    selected = {}
    for word in words:
        if not re.fullmatch(r"[\w.]+=.+", word):
            raise UserError(f"selector {word!r}", "KEY=VALUE, e.g. pattern=AMAM", "put `=` between key and value")
        key, _, value = word.partition("=")
        quoted = re.fullmatch(r"""(["'])(.+)\1""", value)
        selected[key] = quoted[2] if quoted else value
    return selected
