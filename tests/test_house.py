"""The house itself: imports go down the floors, the command answers without loading anything heavy."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from longspan import __version__
from longspan.study.shipped import list_studies

ROOT = Path(__file__).parents[1]


def longspan(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "longspan.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, timeout=120, check=False)


def test_imports_go_down_the_floors() -> None:
    linter = Path(sys.executable).with_name("lint-imports")
    result = subprocess.run([linter], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr


def test_help_loads_nothing_heavy() -> None:
    code = (
        "import sys; sys.argv = ['longspan', '--help']\n"
        "from longspan.cli import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'numpy', 'pydantic', 'altair', 'tokenizers', 'rich'} & set(sys.modules)\n"
        "sys.exit(', '.join(heavy) or 0)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    for command in ("run", "prepare", "train", "probe", "report", "studies", "doctor"):
        assert command in result.stdout
    assert "..." not in result.stdout.partition("Commands:")[2], "a line is cut short"


def test_a_command_loads_neither_compiler_nor_statistics_before_it_needs_them() -> None:
    code = (
        "import sys, longspan.study.run\n"
        "heavy = {'torch._dynamo', 'scipy.stats', 'altair', 'vl_convert', 'transformers'} & set(sys.modules)\n"
        "sys.exit(', '.join(heavy) or 0)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("command", ["run", "prepare", "train", "probe", "report"])
def test_an_unknown_study_names_the_nearest_one(command: str, tmp_path: Path) -> None:
    result = longspan(command, "quikstart", cwd=tmp_path)
    assert result.returncode == 2
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 3
    assert "quikstart" in lines[0]
    assert "did you mean `quickstart`?" in lines[2]


def test_the_version_is_told() -> None:
    result = longspan("--version")
    assert (result.returncode, result.stdout) == (0, f"longspan {__version__}\n")


def test_the_study_to_begin_with_comes_first_and_variants_that_are_compared_are_no_choice() -> None:
    rows = list_studies()
    assert rows[0]["study"] == "quickstart"
    variants = {row["study"]: row["variants"] for row in rows}
    assert variants["recall-bits"] == ""
    assert variants["hybrid-patterns"] == "cpu"


def test_wrong_use_exits_2() -> None:
    assert longspan("fly").returncode == 2
    assert longspan("run").returncode == 2


def failing(error: str, *words: str) -> subprocess.CompletedProcess[str]:
    """`longspan studies`, or another command on a study, in which the look at the shipped studies fails."""
    code = (
        "import errno, sys\n"
        "import longspan.study.shipped as shipped\n"
        "from longspan.cli import main\n"
        "def fail(*names): raise " + error + "\n"
        "shipped.list_studies = shipped.find_study = fail\n"
        f"sys.argv = ['longspan', *{words or ('studies',)}]\n"
        "main()"
    )
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("train", "quickstart"), "stopped; run the same command again to go on from here\n"),
        # What keeps nothing does not say that it would go on.
        (("budget", "quickstart"), "stopped\n"),
    ],
)
def test_ctrl_c_exits_3_wherever_it_strikes(words: tuple[str, ...], said: str) -> None:
    result = failing("KeyboardInterrupt", *words)
    assert result.returncode == 3
    assert result.stderr == said


@pytest.mark.parametrize(
    ("error", "words"),
    [
        ("OSError(errno.EROFS, 'Read-only file system', 'runs/x')", "runs/x cannot be used: Read-only file system"),
        ("NotADirectoryError(errno.ENOTDIR, 'Not a directory', 'runs/jobs')", "runs/jobs: Not a directory"),
        ("MemoryError()", "not enough memory"),
        ("RuntimeError('CUDA out of memory. Tried to allocate 2 GiB')", "not enough memory: CUDA out of memory"),
        ("RuntimeError('DefaultCPUAllocator: can\\'t allocate memory: you tried')", "not enough memory"),
    ],
)
def test_what_the_machine_refuses_is_no_defect(error: str, words: str) -> None:
    result = failing(error)
    lines = result.stderr.splitlines()
    assert result.returncode == 1
    assert words in lines[0]
    assert [line.split(":")[0] for line in lines] == ["error", "  allowed", "  fix"]


def test_a_defect_is_told_as_one() -> None:
    result = failing("RuntimeError('shapes differ')")
    assert result.returncode == 1
    assert "defect of Longspan" in result.stderr


@pytest.mark.parametrize("arguments", [("fly",), ("run",), ("run", "quickstart", "--fast")])
def test_wrong_use_is_explained_in_three_lines(arguments: tuple[str, ...]) -> None:
    result = longspan(*arguments)
    assert result.returncode == 2
    assert [line.split(":")[0] for line in result.stderr.splitlines()] == ["error", "  allowed", "  fix"]


def test_studies_as_json_is_one_object_on_stdout() -> None:
    result = longspan("studies", "--json")
    assert result.returncode == 0
    names = {row["study"] for row in json.loads(result.stdout)["studies"]}
    assert {"quickstart", "wikitext-baseline", "wiki-leakage"} <= names


def test_doctor_says_what_each_missing_extra_would_bring() -> None:
    result = longspan("doctor", "--json")
    assert result.returncode == 0
    findings = json.loads(result.stdout)["findings"]
    topics = {row["topic"] for row in findings}
    assert {"python", "torch", "cores", "device for jobs", "kernels", "bf16", "extra hub", "extra wandb"} <= topics
    missing = [row for row in findings if row["topic"].startswith("extra") and row["finding"] == "missing"]
    assert all("pip install" in row["advice"] and "brings" in row["advice"] for row in missing)


def test_tables_show_square_brackets() -> None:
    result = longspan("doctor")
    assert "extra quickstart" in result.stdout
    missing = [line for line in result.stdout.splitlines() if "missing" in line]
    assert all("longspan[" in line for line in missing)
