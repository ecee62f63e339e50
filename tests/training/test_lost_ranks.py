"""A process that waits for a lost one in a call that does not return is ended, in words; every other one goes on."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

from longspan.foundation.errors import Stopped
from longspan.training import lost_ranks
from longspan.training.ranks import joined

SAID = "error: process 0 of 2 lost the others: one of them was killed or failed"


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def fail() -> None:
    raise ValueError("alone")


def stop() -> None:
    raise Stopped("as all agreed")


def leave() -> None:
    """The end of the work."""


def ended(folder: Path, other: Callable[[], None], seconds: float, *, waits: bool) -> tuple[int, str]:
    """Exit code and words of rank 0, which sleeps, while rank 1 does `other`."""
    children, told = [], folder / "told"
    for rank in range(2):
        child = os.fork()
        if child == 0:
            lost_ranks.GRACE = 0.2
            code = 0
            try:
                with joined(rank, 2, torch.device("cpu"), meeting=f"file://{folder}/meeting") as ranks:
                    ranks.check_equal("here", "places")
                    if rank == 1:
                        other()
                    else:
                        sys.stderr = told.open("w")
                        with ranks.noticing_loss() if waits else nullcontext():
                            time.sleep(seconds)
            except (ValueError, Stopped):
                # Without its last word its end would be noticed anyhow.
                time.sleep(0.8)
            except RuntimeError:
                # Closing a group of which a process is lost.
                code = 3
            os._exit(code)
        children.append(child)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    return codes[0], told.read_text()


@pytest.mark.parametrize("other", [kill, fail])
def test_who_waits_for_a_lost_one_says_so_and_ends(tmp_path: Path, other: Callable[[], None]) -> None:
    code, said = ended(tmp_path, other, 60.0, waits=True)
    assert code == 1
    assert said.startswith(SAID), said
    assert "run the same command again" in said


@pytest.mark.parametrize(("other", "waits"), [(stop, True), (leave, True), (kill, False)])
def test_who_waits_for_nobody_or_for_no_lost_one_goes_on(
    tmp_path: Path, other: Callable[[], None], waits: bool
) -> None:
    assert ended(tmp_path, other, 0.6, waits=waits) == (0, "")


def test_who_does_not_reach_the_first_says_so_and_goes_on(tmp_path: Path) -> None:
    children = []
    for rank in range(2):
        child = os.fork()
        if child == 0:
            sys.stderr = (tmp_path / f"told-{rank}").open("w", buffering=1)
            if rank == 1:
                lost_ranks.socket.create_connection = unreachable  # type: ignore[assignment]
            with joined(rank, 2, torch.device("cpu"), meeting=f"file://{tmp_path}/meeting") as ranks:
                total = ranks.sum(torch.ones(1))
            os._exit(0 if float(total) == 2.0 else 1)
        children.append(child)
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0, 0]
    assert (tmp_path / "told-0").read_text() == ""
    assert "note: process 1 of 2 reaches process 0 at none of localhost, " in (tmp_path / "told-1").read_text()


def unreachable(*address: object) -> None:
    raise OSError("no way there")
