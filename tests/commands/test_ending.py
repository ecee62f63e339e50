"""How commands end that were used wrongly, stopped at once, or whose output nobody takes."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from longspan import cli
from longspan.commands.bench import setting
from longspan.foundation.interrupts import BEFORE_ANYTHING


def ended(words: Sequence[str], monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setenv("LONGSPAN_NO_REEXEC", "1")
    monkeypatch.setattr(sys, "argv", ["longspan", *words])
    try:
        cli.main()
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


@pytest.mark.parametrize(
    ("words", "given", "allowed", "fix"),
    [
        ("bench --seconds -1", "--seconds -1", "a number of 1 or more", "change --seconds"),
        ("bench --seconds=soon", "--seconds soon", "a number of 1 or more", "see `longspan bench --help`"),
        ("bench --new-tokens 1", "--new-tokens 1", "a whole number of 2 or more", "change --new-tokens"),
        ("run s.yaml --jobs 0", "--jobs 0", "a whole number of 1 or more", "change --jobs"),
        ("probe s.yaml --jobs 1 --jobs 1.5", "--jobs 1.5", "a whole number of 1 or more", "change --jobs"),
        ("generate r --top-p 2", "--top-p 2", "a number from 0 to 1", "change --top-p"),
        ("generate r --top-k 0", "--top-k 0", "a whole number of 1 or more", "change --top-k"),
        ("budget s.yaml --vocab-size 0", "--vocab-size 0", "a whole number of 1 or more", "change --vocab-size"),
        ("bench --second 5", "no option --second", "--patterns, --contexts", "did you mean `--seconds`?"),
        ("bench --fast", "no option --fast", "--patterns, --contexts", "see `longspan bench --help`"),
        ("--verson", "no option --verson", "--version", "did you mean `--version`?"),
        ("benhc", "no command 'benhc'", "run, prepare", "did you mean `bench`?"),
        ("fly", "no command 'fly'", "run, prepare", "see `longspan --help`"),
    ],
)
def test_wrong_use_names_the_value_what_is_allowed_and_what_to_do(
    words: str, given: str, allowed: str, fix: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ended(words.split(), monkeypatch) == 2
    first, second, third = capsys.readouterr().err.splitlines()
    assert given in first
    assert allowed in second
    assert fix in third


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_help_of_bench_names_its_defaults(
    device: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(setting, "resolve_dtype", lambda dtype, device: "bf16")
    default = setting.default_setting(torch.device(device))
    assert ended(["bench", "--help"], monkeypatch) == 0
    shown = " ".join(capsys.readouterr().out.split())
    where = "on a GPU " if device == "cuda" else "default "
    contexts = [f"{context // 1024}k" if context % 1024 == 0 else str(context) for context in default.contexts]
    values = (",".join(default.patterns), ",".join(contexts), f"{default.parameters // 10**6}M", default.vocab_size,
              default.batch_tokens, default.new_tokens, f"{default.seconds:g}")  # fmt: skip
    assert [value for value in values if f"{where}{value}" not in shown] == []


@pytest.mark.parametrize(
    "words",
    [
        ["bench", "--patterns", ""], ["bench", "--contexts="], ["bench", "--parameters", " "],
        ["bench", "--device", ""],
        ["budget", "quickstart", "--contexts", ""], ["run", "quickstart", "--runs", ""], ["doctor", "--runs="],
        ["export", "r", "--to", ""],
    ],
)  # fmt: skip
def test_an_empty_value_is_no_default(
    words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ended(words, monkeypatch) == 2
    assert '"", an empty value' in capsys.readouterr().err


def test_an_empty_part_of_a_list_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for option, value in (("--patterns", "A,,M"), ("--patterns", ","), ("--contexts", "512,,1k"), ("--contexts", "0")):
        assert ended(["bench", option, value], monkeypatch) == 2
        assert f"error: {option} {value!r}" in capsys.readouterr().err


def started(words: Sequence[str], place: Path, **more: object) -> subprocess.Popen[str]:
    environment = {**os.environ, "LONGSPAN_NO_REEXEC": "1"}
    command = [sys.executable, "-m", "longspan", *words]
    return subprocess.Popen(command, cwd=place, env=environment, stderr=subprocess.PIPE, text=True, **more)  # type: ignore[call-overload]


@pytest.mark.parametrize("words", [["studies"], ["studies", "--json"], ["run", "--help"], ["budget", "quickstart"]])
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_output_to_a_full_disk_is_told_in_words(words: list[str], tmp_path: Path) -> None:
    with Path("/dev/full").open("w") as full:
        process = started(words, tmp_path, stdout=full)
        said = process.communicate(timeout=120)[1]
    assert process.returncode == 1
    assert said.splitlines()[0] == "error: standard output cannot be written: No space left on device"
    assert len(said.splitlines()) == 3


def test_a_reader_who_goes_ends_a_command_quietly(tmp_path: Path) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    process = started(["studies"], tmp_path, stdout=writing)
    os.close(writing)
    assert process.communicate(timeout=120)[1] == ""
    assert process.returncode == 1


@pytest.mark.parametrize("module", ["typer", "longspan.study.shipped", "torch"])
def test_ctrl_c_while_modules_are_imported_ends_with_one_line(module: str, tmp_path: Path) -> None:
    code = (
        "import os, signal, sys\n"
        "class Strike:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        f"        if name == {module!r}: os.kill(os.getpid(), signal.SIGINT)\n"
        "sys.meta_path.insert(0, Strike())\n"
        "sys.argv = ['longspan', 'budget', 'quickstart']\n"
        "from longspan.__main__ import main\n"
        "main()"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert result.returncode == BEFORE_ANYTHING
    assert result.stderr == "stopped before anything began\n"


def test_ctrl_c_is_not_lost_while_the_program_is_started_anew(tmp_path: Path) -> None:
    code = (
        "import os, signal, sys\n"
        "from longspan.foundation import machine\n"
        "execve = os.execve\n"
        "def strike(*arguments):\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "    execve(sys.executable, [sys.executable, '-m', 'longspan', 'doctor'], os.environ)\n"
        "os.execve = strike\n"
        "os.environ.pop('GLIBC_TUNABLES', None)\n"
        "machine.tune_allocator()"
    )
    environment = {name: value for name, value in os.environ.items() if name != "LONGSPAN_NO_REEXEC"}
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=120, env=environment
    )
    assert result.returncode in (BEFORE_ANYTHING, 3)
    assert "Traceback" not in result.stderr
    assert len(result.stderr.splitlines()) == 1
