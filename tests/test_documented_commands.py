"""What the documentation shows is run here: every `longspan` and `make` command, and every example file."""

from __future__ import annotations

import gc
import importlib
import io
import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import yaml

from longspan import cli
from longspan.corpus.sources import (
    SOURCES,
)
from longspan.study.expand import expand
from longspan.study.schema import load_study
from longspan.study.shipped import shipped_studies

from .stand_ins import WRITERS, provide, provide_exports, provide_runs

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
EXAMPLES = DOCS / "examples"
STAGES = ("run", "prepare", "train", "probe", "report")

TINY = (
    "vocab_size=300 model.width=16 model.heads=2 model.kv_heads=null model.state=4 model.mamba_head_dim=8 "
    "model.mlp_width=16 model.delta_head_dim=4 model.max_positions=32 training.context=32 "
    "training.batch_tokens=1024 training.tokens=2048 "
    "training.warmup=1 training.evaluate_every=100 training.dtype=fp32 corpus.min_chars=50 "
    "corpus.splits={train: 0.5, validation: 0.2, test: 0.3}"
)
"""Appended to every documented command, where the later of two overrides wins."""

OF_TEXT = ("vocab_size=", "corpus.min_chars=", "corpus.splits=")
"""Settings among them that a task has not."""

TINY_TASKS = {
    "copy": "corpus.vocab_size=4 corpus.min_length=2 corpus.max_length=4",
    "reverse": "corpus.vocab_size=4 corpus.min_length=2 corpus.max_length=4",
    "mqar": "corpus.vocab_size=34 corpus.length=32 corpus.pairs=[2] corpus.filler=2",
}

TINY_NEEDLES = {
    "contexts": [256], "depths": 2, "per_cell": 1, "needles": 1, "candidates": 2, "haystack": "made_up",
    "needle": "made_up",
}  # fmt: skip

TINY_PROBES: dict[str, dict[str, object]] = {
    "perplexity": {"max_documents": 8, "max_tokens": 64},
    "perplexity_as_trained": {"kind": "perplexity", "mode": "as_trained", "max_documents": 8},
    "position_curve": {"length": 64, "max_documents": 8, "min_documents": 2},
    "suffix_identification": {"contexts": [16], "suffix": 4, "num_items": 8, "min_documents": 2, "bins": 2},
    "efficiency": {"contexts": [16], "repeats": 3, "warm_ups": 0, "new_tokens": 2},
    "needle": {**TINY_NEEDLES, "ways": ["generation"]},
    "needle_made_up": {**TINY_NEEDLES, "kind": "needle", "ways": ["likelihood"]},
    "entity_recurrence": {"longest": 128, "per_bin": 4, "min_documents": 1, "max_documents": 4},
    "phone_book": {"entries": [6], "per_size": 2, "ways": ["likelihood"]},
    "text_copy": {"lengths": [8], "per_length": 2},
    "repetition": {"lengths": [16, 32], "max_documents": 8},
    "longbench_v2": {"contexts": [700], "max_items": 1, "max_new_tokens": 2, "letters": False},
    "ada_leval": {"max_items": 1, "generate": False},
    "tsort": {"max_items": 1, "generate": False},
    "pg19": {"windows": [32], "max_books": 1, "max_tokens": 64},
    "ruler": {"tasks": ["niah_single_1"], "lengths": [900], "samples": 1},
    "copying": {"sizes": [2, 3], "strings": 4},
    "duplicates": {"sizes": [6], "strings": 4},
    "reversing": {"sizes": [2, 3], "strings": 4},
    "recall": {"sizes": [2], "lengths": [16, 32], "strings": 4},
}

TINY_LISTS = {
    "quickstart": {"pattern": "[A, M]"},
    "docs/examples/benchmarks.yaml": {"pattern": "[A]"},
    "wikitext-baseline": {},
    "hybrid-patterns": {"pattern": "AM"},
    "copying": {"pattern": "[hard ALiBi + RoPE, hybrid]"},
    "recall": {"pattern": "Mamba-2, state 4"},
    "recall-bits": {"vary.variant": "[attention x 8 bits]"},
    "recall-text": {"pattern": "AM"},
    "cost-at-length": {
        "subjects": "[{name: small, shape: {pattern: MA, vocab_size: 300, width: 16, heads: 2, mlp_width: 16, state: 4,"
        " mamba_head_dim: 8, chunk: 8}}]"
    },
    "wiki-leakage": {"pattern": "AM", "packing.method": "[concat]", "isolation": "[full, none]", "markers": "[true]"},
}
"""Shorter lists to vary; a documented command that names one keeps its own."""

WITH_PAGE = ("longspan", "run", "quickstart")
"""A page takes longer than the tiny run before it: this command and the example studies write one."""


@dataclass(frozen=True)
class Command:
    page: str
    words: tuple[str, ...]

    @property
    def is_study(self) -> bool:
        return self.words[0] == "longspan" and self.words[1] in STAGES

    @property
    def overrides(self) -> list[str]:
        return [word for word in self.words[3:] if not word.startswith("-") and "=" in word]

    def __str__(self) -> str:
        return f"{self.page}: {shlex.join(self.words)}"


def blocks(page: Path, *languages: str) -> Iterator[str]:
    """The fenced blocks of a page in any of the languages."""
    for language, body in re.findall(r"^```(\w+)\n(.*?)^```$", page.read_text(encoding="utf-8"), re.M | re.S):
        if language in languages:
            yield body


def documented() -> list[Command]:
    """Every command of README and docs, each once: in blocks, and in running text where it names a shipped study."""
    found: dict[tuple[str, ...], Command] = {}
    for page in (ROOT / "README.md", *sorted(DOCS.glob("*.md"))):
        lines = [line for block in blocks(page, "console", "bash", "sh") for line in joined(block)]
        shipped = "|".join(map(re.escape, shipped_studies()))
        lines += re.findall(rf"`(longspan \w+ (?:{shipped})\b[^`]*)`", page.read_text(encoding="utf-8"))
        for line in lines:
            words = tuple(shlex.split(line.removeprefix("$ "), comments=True))
            if words and words[0] in ("longspan", "make"):
                found.setdefault(words, Command(page.name, words))
    return list(found.values())


def joined(block: str) -> list[str]:
    """The lines of a shell block, continued ones as one."""
    return block.replace("\\\n", " ").splitlines()


COMMANDS = documented()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A user's folder: the examples, and the study files that the pages show (first line `# NAME.yaml`)."""
    place = tmp_path_factory.mktemp("user")
    shutil.copytree(EXAMPLES, place / "docs" / "examples")
    # Another folder of runs that holds the same jobs.
    (place / "runs").mkdir()
    (place / "elsewhere").symlink_to(place / "runs")
    for page in (ROOT / "README.md", *DOCS.glob("*.md")):
        for block in blocks(page, "yaml"):
            if named := re.match(r"# (\S+\.ya?ml)\n", block):
                (place / named[1]).write_text(block, encoding="utf-8")
    return place


@pytest.fixture
def at_home(folder: Path, monkeypatch: pytest.MonkeyPatch, plugins_forgotten: None, no_figures: None) -> Path:
    """In the user's folder, with one folder of runs for all commands, so that equal jobs run once."""
    monkeypatch.chdir(folder)
    monkeypatch.setenv("LONGSPAN_NO_REEXEC", "1")
    monkeypatch.setenv("LONGSPAN_RUNS", str(folder / "runs"))
    # What earlier commands imported is not searched for garbage again and again.
    gc.freeze()
    return folder


def shrunk(command: Command) -> list[str]:
    """The documented command with tiny settings after its own, and no network."""
    name, overrides = command.words[2], command.overrides
    study = load_study(name, overrides)
    expand(study)
    provide_exports(source.pretrained for source in study.sources)
    corpus = study.base["corpus"]
    extra: list[str] = []
    words = list(command.words[1:])
    if corpus["source"] in WRITERS and "path" in corpus:
        provide(corpus["source"], corpus["path"])
    elif corpus["source"] in ("huggingface", "wikipedia"):
        # What the command says of the network source was checked above; it has no meaning for the one in its place.
        keys = tuple(f"corpus.{name}=" for source in SOURCES for name in source.model_fields)
        words = [word for word in words if not word.startswith(keys)]
        extra += ["corpus.source=synthetic", "corpus.num_documents=30", "corpus.min_words=80", "corpus.max_words=200"]
    elif corpus["source"] == "sotu":
        extra.append("corpus.max_documents=16")
    if study.base.get("tokenizer", {}).get("pretrained"):
        extra += ["tokenizer.kind=byte_bpe", "tokenizer.pretrained=null"]
    if study.also:
        # A second part has settings of its own; tests/study/test_parts.py runs one.
        extra.append("also=null")
    if any("overlap" in variant.get("packing", {}) for variant in study.variants.values()):
        extra.append("packing.overlap=0")
    if study.base.get("model", {}).get("match"):
        extra.append("model.match.tolerance=0.5")
    if "warmup" in study.base.get("training", {}) and "decay" in study.base["training"]:
        extra.append("training.decay=1")
    given = {override.partition("=")[0] for override in overrides}
    lists = {**TINY_LISTS.get(name, {}), **({"seed": "[0]"} if "seed" in study.vary else {})}
    extra += [f"{key}={value}" for key, value in lists.items() if key not in given]
    for probe, settings in study.base["probes"].items():
        # A stride is shorter than the window, which is tiny here.
        tiny = TINY_PROBES[probe] | ({"stride": 16} if settings.get("stride") else {})
        extra += [f"probes.{probe}.{key}={json.dumps(value)}" for key, value in tiny.items()]
    settings_of_size = re.split(r" (?=[a-z_.]+=)", TINY)
    if "model" not in study.base:
        # Models that are asked as they are have the size that they have.
        corpus_only = [setting for setting in settings_of_size if setting.startswith("corpus.")]
        settings_of_size = ["probe_context=32", *corpus_only]
    if corpus["source"] == "task":
        settings_of_size = [setting for setting in settings_of_size if not setting.startswith(OF_TEXT)]
        # Nothing but the MLPs is free, and at this width they are small beside any mixer.
        extra += ["model.match=null", "model.masked_heads=1", *TINY_TASKS[corpus["task"]].split()]
    if corpus.get("border"):
        extra += ["corpus.border=16", "corpus.filler=0", "probes.recall.lengths=[32]"]
    # Starting processes takes longer than all else here; tests/study starts some.
    if "processes" in given:
        extra.append("processes=1")
    alone = ["--jobs=1"] if "--jobs" in words else []
    return [*words, *settings_of_size, *extra, *alone]


# --- trained runs, for the commands that use one ----------------------------------------------------------------------

TINY_BENCH = (
    "--patterns=AM", "--contexts=32", "--parameters=130k", "--vocab-size=258", "--batch-tokens=64", "--new-tokens=2",
    "--seconds=1", "--no-peers",
)  # fmt: skip
"""Of an option that is given twice the last counts."""

WITH_A_RUN = ("generate", "lm-eval", "export")
WITH_RECORDS = ("rescore", "compare")
BENCHMARKS = Path("docs/examples/benchmarks")


def with_a_run(command: Command, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The words of a command that uses a run, with a run and its inputs there, and local tasks for those of the hub."""
    words = list(command.words[1:])
    provide_runs(Path("runs/quickstart"))
    Path("prompt.txt").write_text("The merchant of\n", encoding="utf-8")
    provide("jsonl", "texts.jsonl")
    if "<" in words:
        place = words.index("<")
        content = Path(words[place + 1]).read_bytes()
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content), encoding="utf-8"))
        del words[place : place + 2]
    if words[0] == "export":
        # Another command's test may have provided it.
        shutil.rmtree(words[words.index("--to") + 1], ignore_errors=True)
    if words[0] == "lm-eval":
        pytest.importorskip("lm_eval")
        tasks = importlib.import_module("lm_eval.tasks")
        # Reading the thousands of tasks that come with the harness takes longer than all else here.
        monkeypatch.setattr(tasks, "TaskManager", partial(tasks.TaskManager, include_defaults=False))
        monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", Path("cache").resolve())
        if "--include_path" not in words:
            words[words.index("--tasks") + 1] = "own_text"
            words += ["--include_path", "docs/examples/lm_eval"]
    return words


def provide_records(monkeypatch: pytest.MonkeyPatch) -> None:
    """`runs/imported` and the like, as the commands that import leave them, whichever command comes first."""
    for name in ("model-a", "model-b"):
        answers = str(BENCHMARKS / f"{name}__ctx8192__rep1.jsonl")
        for run in ("imported", name):
            assert longspan(["import", answers, "--format", "ssm-experiment", "--to", f"runs/{run}"], monkeypatch) == 0


def longspan(words: list[str], monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(sys, "argv", ["longspan", *words])
    try:
        cli.main()
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


# --- the commands -----------------------------------------------------------------------------------------------------


def test_the_documentation_shows_commands() -> None:
    assert any(command.is_study for command in COMMANDS)


def test_every_command_is_documented() -> None:
    names = {command.name or command.callback.__name__ for command in cli.app.registered_commands if command.callback}
    assert names - {command.words[1] for command in COMMANDS if len(command.words) > 1} == set()


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.words[0] == "longspan"], ids=str)
def test_documented_command_works(
    command: Command,
    at_home: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    request: pytest.FixtureRequest,
) -> None:
    if command.words != WITH_PAGE:
        request.getfixturevalue("no_page")
    words = shrunk(command) if command.is_study else list(command.words[1:])
    if command.words[1] == "bench":
        words += TINY_BENCH
    if command.words[1] in WITH_A_RUN:
        words = with_a_run(command, monkeypatch)
    if command.words[1] in WITH_RECORDS:
        provide_records(monkeypatch)
        capsys.readouterr()
    if command.words[1] == "report":
        # It writes from records only, so they must be there.
        assert longspan(["run", *words[1:]], monkeypatch) == 0, capsys.readouterr().err
        capsys.readouterr()
    code = longspan(words, monkeypatch)
    shown = capsys.readouterr()
    assert code == 0, shown.err
    if "--json" in words:
        assert isinstance(json.loads(shown.out), dict)
    elif command.words[1] in ("run", "report"):
        (page,) = re.findall(r"^report: (.*)$", shown.out, re.M)
        assert Path(page).is_file()


def test_documented_python_runs(at_home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    provide_runs(Path("runs/quickstart"))
    (code,) = blocks(DOCS / "use-a-run.md", "python")
    names: dict[str, object] = {}
    exec(code, names)
    assert capsys.readouterr().out
    assert np.isfinite(names["nll"]).all()  # type: ignore[call-overload]


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.words[0] == "make"], ids=str)
def test_documented_make_target_exists(command: Command) -> None:
    result = subprocess.run(["make", "-n", *command.words[1:]], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def test_links_between_pages_lead_somewhere() -> None:
    for page in (ROOT / "README.md", *DOCS.glob("*.md")):
        for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
            if "://" not in target:
                assert (page.parent / target).exists(), f"{page.name}: {target}"


# --- the examples -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mixer", "probe", "benchmarks"])
def test_the_example_studies_end_in_a_report(
    name: str, at_home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = Command("examples", ("longspan", "run", f"docs/examples/{name}.yaml", "--json"))
    assert longspan(shrunk(command), monkeypatch) == 0, capsys.readouterr().err
    outcome = json.loads(capsys.readouterr().out)
    page = Path(outcome["report"]).read_text(encoding="utf-8")
    if name == "mixer":
        assert "moving_average" in page
    elif name == "benchmarks":
        assert {"longbench_v2", "ada_leval", "tsort", "pg19", "ruler"} == set(outcome["probes"])
        assert all(found["measurements"] for found in outcome["probes"].values())
    else:
        assert "Saved by the first copy" in page
        assert {m["metric"] for m in outcome["probes"]["repetition"]["measurements"]} == {"saved", "nll_second"}


def test_example_studies_and_shown_studies_are_whole(folder: Path) -> None:
    for file in folder.rglob("*.yaml"):
        if not {"runs", "lm_eval"} & set(file.parts):
            assert yaml.safe_load(file.read_text(encoding="utf-8"))["question"]


def test_pages_name_no_file_of_the_source_that_is_not_there() -> None:
    for page in DOCS.glob("*.md"):
        for path in re.findall(r"`(src/longspan/[\w/]+\.(?:py|yaml))`", page.read_text(encoding="utf-8")):
            assert (ROOT / path).exists(), f"{page.name}: {path}"
