"""What every test shares: one torch thread, no hub, and the development data where it lies beside the project."""

from __future__ import annotations

import contextlib
import functools
import gc
import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Triton decides at its first import whether it compiles for a GPU or interprets on the CPU.
if not Path("/dev/nvidiactl").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Spinning threads of several workers slow each other down; one thread also keeps results bit-identical."""
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="module", autouse=True)
def imports_are_not_searched_for_garbage() -> None:
    """Commands collect garbage before they measure memory: half a second each time where so much is imported."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def ctrl_c_is_heard() -> None:
    """A command that ends in this process ignores Ctrl-C from then on, as do background jobs of a shell.

    Commands that a test starts inherit that and would never hear the Ctrl-C that they are sent.
    """
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def plugins_forgotten() -> Iterator[None]:
    """Leave the registries, and what was imported from plugin files, as they were."""
    from longspan.corpus.tasks import base as tasks
    from longspan.models.mixers import base as mixers
    from longspan.probes import base as probes

    kept = [(registry, registry.all()) for registry in (tasks._TASKS, mixers._MIXERS, probes._PROBES)]
    modules = set(sys.modules)
    yield
    for registry, classes in kept:
        registry._classes = dict(classes)
    for name in set(sys.modules) - modules:
        if name.startswith("longspan_plugin_"):
            del sys.modules[name]


@pytest.fixture
def no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing the figure files takes most of the time of a tiny run; tests/report draws them."""
    monkeypatch.setattr("longspan.report.page._write_figure", lambda *arguments: None)


@pytest.fixture
def no_page(monkeypatch: pytest.MonkeyPatch) -> None:
    """A page takes longer than a tiny run; one that holds the question stands in for it."""

    def write(report: Any, folder: Path) -> Path:
        page = folder / "report.html"
        page.write_text(report.question, encoding="utf-8")
        return page

    monkeypatch.setattr("longspan.report.page.write_report", write)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The development texts that lie beside the checkout (`../shared/data`); tests that need them skip elsewhere."""
    folder = Path(__file__).parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("the development data (../shared/data) is not here")
    return folder


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """GPU tests say why they do not run."""
    import torch

    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="no CUDA device here"))


# A command in a process that was forked from one which has the imports behind it: starting Python with torch from
# nothing costs seconds each time. The code is sent as text, since a fork knows no test module.
_FORKED = """
import gc, os, sys
gc.freeze()
os.chdir(folder)
os.environ.update(OMP_NUM_THREADS="1", LONGSPAN_NO_REEXEC="1")
for descriptor, path in ((1, out), (2, err)):
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, descriptor)
sys.stdout, sys.stderr = (open(n, "w", buffering=1, closefd=False) for n in (1, 2))
import torch
torch.set_num_threads(1)
from longspan import cli
if not figures:
    from longspan.report import page
    page._write_figure = lambda *arguments: None
sys.argv = ["longspan", *arguments]
cli.main()
"""


class Forked:
    """`longspan ARGUMENTS` in a folder, running; what it writes to its streams is read when it has ended."""

    def __init__(self, streams: Path, folder: Path, arguments: tuple[str, ...], figures: bool) -> None:
        self._streams = streams
        names = {
            "folder": str(folder),
            "arguments": arguments,
            "figures": figures,
            "out": str(streams / "out"),
            "err": str(streams / "err"),
        }
        self._process = _forks().Process(target=exec, args=(_FORKED, names))
        self._process.start()

    @property
    def returncode(self) -> int | None:
        """As of `subprocess`: minus the signal for a killed process, None while it runs."""
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        assert self._process.pid is not None
        # As of `subprocess`: nothing where it has just ended.
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._process.pid, number)

    def kill(self) -> None:
        self._process.kill()

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Its stdout and stderr, once it has ended."""
        self._process.join(timeout)
        if self._process.exitcode is None:
            self._process.kill()
            raise AssertionError(f"a command went on for more than {timeout} seconds")
        return tuple((self._streams / name).read_text() for name in ("out", "err"))  # type: ignore[return-value]


@functools.cache
def _forks() -> Any:
    """One server a test process; it runs nothing, so that its forks share no thread and no half-done work."""
    context = multiprocessing.get_context("forkserver")
    # What a command imports only once it needs it.
    later = ["torch._dynamo", "scipy.stats", "scipy.optimize"]
    context.set_forkserver_preload(
        ["longspan.study.run", "longspan.report.page", "longspan.training.loop", "rich", *later]
    )
    return context


Start = Callable[..., Forked]


@pytest.fixture(scope="session")
def start_longspan(tmp_path_factory: pytest.TempPathFactory) -> Start:
    """Starts `longspan ARGUMENTS` in a folder; without `figures` a report has its page and no drawn files."""

    def start(folder: Path, *arguments: str, figures: bool = True) -> Forked:
        return Forked(tmp_path_factory.mktemp("streams"), folder, arguments, figures)

    return start


@pytest.fixture(scope="session")
def run_longspan(start_longspan: Start) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs `longspan ARGUMENTS` in a folder to its end; fails where it does, unless `check` is false."""

    def run(
        folder: Path, *arguments: str, check: bool = True, figures: bool = True
    ) -> subprocess.CompletedProcess[str]:
        process = start_longspan(folder, *arguments, figures=figures)
        out, err = process.communicate(timeout=280)
        assert process.returncode is not None
        assert not check or process.returncode == 0, err
        return subprocess.CompletedProcess(arguments, process.returncode, out, err)

    return run
