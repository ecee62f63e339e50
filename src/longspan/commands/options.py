"""Arguments and options that several commands share, each described once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

StudyName = Annotated[
    str, typer.Argument(help="a shipped study (see `longspan studies`) or a .yaml file", metavar="STUDY")
]
Overrides = Annotated[
    list[str] | None, typer.Argument(help="settings to change, e.g. tokens=2e6 variant=cpu", metavar="KEY=VALUE")
]
Subject = Annotated[
    str, typer.Argument(help="runs/jobs/train-..., runs/STUDY, or Hugging Face weights (folder or id)", metavar="RUN")
]
RunOnly = Annotated[str, typer.Argument(help="runs/jobs/train-... or runs/STUDY", metavar="RUN")]
Select = Annotated[
    list[str] | None,
    typer.Argument(help="which subject of runs/STUDY, e.g. pattern=AMAM seed=0", metavar="KEY=VALUE"),
]
RecordedRun = Annotated[str, typer.Argument(help="a folder or file with records, or runs/STUDY", metavar="RUN")]
Duplicates = Annotated[str, typer.Option("--duplicates", help="items answered more than once: all, first or drop")]
Runs = Annotated[Path, typer.Option("--runs", help="folder of all runs", envvar="LONGSPAN_RUNS")]
Jobs = Annotated[
    int,
    typer.Option(
        "--jobs", min=1, help="jobs at a time on a CPU, each with its share of the cores; pays for small models"
    ),
]
Json = Annotated[bool, typer.Option("--json", help="print one JSON object on stdout and nothing else there")]
Debug = Annotated[bool, typer.Option("--debug", help="show the traceback of an error")]
