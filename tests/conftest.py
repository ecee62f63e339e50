"""What every test shares: one torch thread, no hub, and the development data where it lies beside the project."""

from __future__ import annotations

import os
import signal
from pathlib import Path

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


@pytest.fixture(autouse=True)
def ctrl_c_is_heard() -> None:
    """A command that ends in this process ignores Ctrl-C from then on, as do background jobs of a shell.

    Commands that a test starts inherit that and would never hear the Ctrl-C that they are sent.
    """
    signal.signal(signal.SIGINT, signal.default_int_handler)


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
