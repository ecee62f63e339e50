"""What a person reads of a job while it works."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from longspan import terminal
from longspan.foundation.progress import Progress
from longspan.study.jobs import Job
from longspan.terminal import Terminal


@pytest.mark.parametrize(("warming", "left"), [(True, "2 min 00 s left"), (False, "3 min 49 s left")])
def test_the_time_left_leaves_out_a_step_that_compiled(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], warming: bool, left: str
) -> None:
    now = 100.0
    monkeypatch.setattr(terminal.time, "monotonic", lambda: now)
    shown, job = Terminal(), Job("train", "train A seed 0", {})
    for now, steps in ((100.0, 0), (120.0, 1), (140.0, 21)):  # noqa: B007
        shown.observe(job, Progress("train", steps, 141, "steps", warming=warming and steps == 1))
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "train A seed 0: train  0 %"
    assert lines[-1].endswith(left)
    assert ("left" in lines[1]) == (not warming)


def test_a_narrow_terminal_gets_several_tables_with_whole_words() -> None:
    columns = ("<subject", "<mixers", "parameters", "bits per byte", "accuracy at 1,024", "<")
    rows = [("AMAM", "attention + mamba2", "1.07 M", "1.96 ± 0.05", "33.3 % [25.2, 42.6]", "█" * 28)]

    def shown(width: int) -> list[str]:
        console = Console(file=io.StringIO(), width=width, force_terminal=True, color_system=None)
        terminal.print_table(columns, rows, console=console)
        return console.file.getvalue().splitlines()

    narrow, wide = shown(60), shown(140)
    assert max(map(len, narrow)) <= 60
    for cell in (*(column.removeprefix("<") for column in columns), *rows[0]):
        assert any(cell in line for line in narrow), cell
    assert [line.split()[0] for line in narrow if "AMAM" in line or "subject" in line] == ["subject", "AMAM"] * 3
    assert sum("AMAM" in line for line in wide) == 1


def test_a_long_text_is_folded_at_words_beside_what_it_belongs_to() -> None:
    file = io.StringIO()
    console = Console(file=file, width=60, force_terminal=True, color_system=None)
    advice = "set it to one of these words and run the same command once more"
    terminal.print_table(("<", "<here", "<advice"), [("kernels", "none", advice)], console=console)
    shown = file.getvalue()
    assert shown.count("kernels") == 1
    assert " ".join(shown.split("none")[1].split()) == advice


def test_a_pipe_gets_one_table(capsys: pytest.CaptureFixture[str]) -> None:
    terminal.print_table(("<subject", *("a column of its own",) * 20), [("AMAM", *"12345678901234567890")])
    assert capsys.readouterr().out.count("AMAM") == 1
