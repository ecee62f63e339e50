"""Ctrl-C and the processes that a command starts."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time

import pytest

from longspan.foundation.interrupts import children_do_not_hear


@pytest.mark.parametrize("delay", [0.0, 0.02, 0.2])
def test_a_child_does_not_hear_ctrl_c_not_even_while_it_begins(delay: float) -> None:
    context = multiprocessing.get_context("spawn")
    process = context.Process(target=time.sleep, args=(0.5,))
    with children_do_not_hear():
        process.start()
    assert process.pid is not None
    time.sleep(delay)
    os.kill(process.pid, signal.SIGINT)
    process.join(60)
    assert process.exitcode == 0


def sent_meanwhile(done: list[str]) -> None:
    with children_do_not_hear():
        # To this thread: the process's own might be taken by another one, which holds nothing back.
        signal.raise_signal(signal.SIGINT)
        done.append("went on")


def test_what_the_parent_is_sent_meanwhile_is_not_lost() -> None:
    done: list[str] = []
    with pytest.raises(KeyboardInterrupt):
        sent_meanwhile(done)
    assert done == ["went on"]
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, [])
