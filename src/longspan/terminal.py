"""What a person sees while a study runs: one live line per job on a terminal, plain lines on a pipe."""

from __future__ import annotations

import json
import signal
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self

from longspan.foundation.errors import Stopped
from longspan.foundation.progress import Progress
from longspan.report.numbers import duration, scaled
from longspan.report.numbers import share as percent

if TYPE_CHECKING:
    from rich.progress import Progress as Bars
    from rich.progress import TaskID

    from longspan.study.jobs import Job
    from longspan.study.plan import Plan
    from longspan.study.run import Outcome

PLAIN_INTERVAL = 10.0
"""Seconds between two plain lines of one job on a pipe."""
FOLDED = 30
"""Characters that a column of longer texts keeps on a narrow terminal."""


@dataclass
class _Shown:
    task: TaskID | None = None
    started: float = field(default_factory=time.monotonic)
    stage: str = ""
    stage_started: float = field(default_factory=time.monotonic)
    done_before: float = 0.0
    stages: set[str] = field(default_factory=set)
    last_line: float = 0.0

    def count_from(self, done: float) -> None:
        """Rates leave out what was done and how long it took."""
        self.stage_started, self.done_before = time.monotonic(), done


class Terminal:
    """Shows plans and progress on stderr; turns the first Ctrl-C into an orderly stop."""

    def __init__(self, *, quiet: bool = False) -> None:
        self.quiet = quiet
        self.live = sys.stderr.isatty() and not quiet
        self._stop = False
        self._jobs: dict[str, _Shown] = {}
        self._bars: Bars | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Self:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._previous[number] = signal.signal(number, self._on_signal)
        if self.live:
            self._bars = _make_bars()
            self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bars is not None:
            self._bars.stop()
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self._stop:
            raise KeyboardInterrupt
        self._stop = True
        self.line("stopping after the current write; once more to stop at once")

    def line(self, text: str) -> None:
        """Print one line that stays."""
        if self.quiet:
            return
        if self._bars is not None:
            self._bars.console.print(text, highlight=False, markup=False)
        else:
            print(text, file=sys.stderr, flush=True)

    def plan(self, plan: Plan) -> None:
        """Show what will be done before it is done."""
        if self.quiet:
            return
        self.line(f"{plan.study.name}: {plan.study.question}")
        if plan.rows:
            print_table(
                plan.columns, plan.rows, file=sys.stderr if self._bars is None else None, console=self._console()
            )
        for note in plan.notes:
            self.line(f"note: {note}")

    def _console(self) -> Any:
        return None if self._bars is None else self._bars.console

    def observe(self, job: Job, progress: Progress) -> None:
        """Take the progress of one job.

        Raises:
            Stopped: the person asked to stop; the stage leaves its files whole.
        """
        if self._stop:
            raise Stopped(Stopped.GO_ON)
        if self.quiet:
            return
        shown = self._jobs.setdefault(job.key, _Shown())
        if progress.message:
            self.line(f"{job.title}: {progress.message}")
        if progress.stage != shown.stage:
            # A stage may come back (train, validate, train): its rate counts from here.
            shown.stage = progress.stage
            shown.count_from(progress.done)
            if progress.stage not in shown.stages:
                shown.stages.add(progress.stage)
                shown.last_line = 0.0
        elif progress.warming:
            shown.count_from(progress.done)
        if self._bars is not None:
            self._show_bar(job, progress, shown)
        elif time.monotonic() - shown.last_line >= PLAIN_INTERVAL:
            shown.last_line = time.monotonic()
            self.line(f"{job.title}: {_plain(progress, shown)}")

    def finished(self, job: Job, text: str) -> None:
        """Say that a job is done, or was done before."""
        shown = self._jobs.pop(job.key, None)
        if self._bars is not None and shown is not None and shown.task is not None:
            self._bars.remove_task(shown.task)
        seconds = f" in {duration(time.monotonic() - shown.started)}" if shown is not None else ""
        self.line(f"done: {job.title}{seconds}{'  ' + text if text else ''}")

    def failed(self, job: Job, text: str) -> None:
        """Say that a job failed and the others go on."""
        shown = self._jobs.pop(job.key, None)
        if self._bars is not None and shown is not None and shown.task is not None:
            self._bars.remove_task(shown.task)
        self.line(f"failed: {job.title}  {text}")

    def _show_bar(self, job: Job, progress: Progress, shown: _Shown) -> None:
        assert self._bars is not None
        if shown.task is None:
            shown.task = self._bars.add_task(job.title, total=None, stage="", numbers="", left="")
        self._bars.update(
            shown.task,
            completed=progress.done,
            total=progress.total,
            stage=progress.stage,
            numbers=_numbers(progress, shown),
            left=_left(progress, shown),
        )


def _make_bars() -> Bars:
    from rich.console import Console
    from rich.progress import BarColumn, TaskProgressColumn, TextColumn
    from rich.progress import Progress as Bars

    return Bars(
        TextColumn("{task.description}", markup=False),
        TextColumn("[dim]{task.fields[stage]}"),
        BarColumn(bar_width=20),
        TaskProgressColumn("[progress.percentage]{task.percentage:>3.0f} %"),
        TextColumn("{task.fields[numbers]}", markup=False),
        TextColumn("[dim]{task.fields[left]}"),
        console=Console(stderr=True),
        transient=True,
    )


def _rate(progress: Progress, shown: _Shown) -> float | None:
    seconds = time.monotonic() - shown.stage_started
    done = progress.done - shown.done_before
    return done / seconds if seconds > 1 and done > 0 else None


def _numbers(progress: Progress, shown: _Shown) -> str:
    # What is a unit follows its number: `loss 3.21  12.3 k tok/s`.
    parts = [f"{_short(value)} {name}" if "/s" in name else f"{name} {_short(value)}"
             for name, value in progress.numbers.items()]  # fmt: skip
    rate = _rate(progress, shown)
    if rate is not None and progress.unit and not any("/s" in name for name in progress.numbers):
        parts.append(f"{_short(rate)} {progress.unit}/s")
    return "  ".join(parts)


def _left(progress: Progress, shown: _Shown) -> str:
    rate = _rate(progress, shown)
    if rate is None or progress.total is None or rate <= 0:
        return ""
    return f"{duration(max(progress.total - progress.done, 0) / rate)} left"


def _plain(progress: Progress, shown: _Shown) -> str:
    share = percent(progress.done / progress.total) if progress.total else _short(progress.done)
    return "  ".join(filter(None, (progress.stage, share, _numbers(progress, shown), _left(progress, shown))))


def _short(value: float) -> str:
    return scaled(value) if abs(value) >= 1000 else f"{value:.4g}"


def print_json(value: dict[str, Any]) -> None:
    """One JSON object on stdout."""
    print(json.dumps(value, ensure_ascii=False, allow_nan=False))


def print_table(
    columns: Sequence[str], rows: Iterable[Sequence[str]], *, keys: int = 1, file: Any = None, console: Any = None
) -> None:
    """A table for people: with rules on a terminal, aligned plain text on a pipe.

    Columns whose heading starts with `<` hold text and are aligned left; the others hold numbers. On a terminal too
    narrow for all columns long texts are folded at words; where that is not enough the columns come in several tables,
    each with the first `keys` columns, which name the rows.
    """
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = console or Console(file=file or sys.stdout, highlight=False)
    if not console.is_terminal:
        # A pipe has no width; never fold a row there.
        console = Console(file=file or sys.stdout, highlight=False, width=240)
    cells = [[str(cell) for cell in row] for row in rows]
    widths = [
        max(len(column.removeprefix("<")), *(Text(row[at]).cell_len for row in cells), 0)
        for at, column in enumerate(columns)
    ]
    least = [
        min(width, FOLDED) if column.startswith("<") else width for column, width in zip(columns, widths, strict=True)
    ]
    for part in _parts(least, keys, console.width) if console.is_terminal else [range(len(columns))]:
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        for at in part:
            side: Literal["left", "right"] = "left" if columns[at].startswith("<") else "right"
            table.add_column(columns[at].removeprefix("<"), justify=side, overflow="fold")
        for row in cells:
            # As text: square brackets in a cell are not markup.
            table.add_row(*(Text(row[at]) for at in part))
        console.print(table)


def _parts(widths: Sequence[int], keys: int, room: int) -> Sequence[Sequence[int]]:
    """Which columns stand together in so much room: the first `keys` in every part, the others in order."""
    first, between, edges = list(range(keys)), 3, 2

    def width(part: list[int]) -> int:
        return sum(widths[at] + between for at in part) - between + edges

    parts = [first]
    for at in range(keys, len(widths)):
        if parts[-1] != first and width([*parts[-1], at]) > room:
            parts.append(first)
        parts[-1] = [*parts[-1], at]
    return parts


def print_summary(outcome: Outcome) -> None:
    """The last thing a run says: the summary table, the answer, and where the report is."""
    if outcome.rows:
        print_table(outcome.columns, outcome.rows)
    for text in outcome.lines:
        print(text)
