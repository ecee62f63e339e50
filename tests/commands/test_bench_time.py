"""What `longspan bench` does with its time: in which order, what is cut, what is named as left out."""

from __future__ import annotations

import json
import signal
from dataclasses import replace
from time import sleep
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from longspan.commands.bench import limits as limiting
from longspan.commands.bench import plan as plans
from longspan.commands.bench import run
from longspan.commands.bench.ceilings import Ceilings
from longspan.commands.bench.limits import Cut, Limits
from longspan.commands.bench.measured import PARTS, Measured
from longspan.commands.bench.own import Generated
from longspan.commands.bench.plan import STOPPED, Cell, Task, expected_seconds, plan, to_go_on
from longspan.commands.bench.run import bench, measure
from longspan.commands.bench.setting import models_of
from longspan.foundation.errors import Stopped

from .benching import AT_BEST, PEER, measured, tiny


def test_what_the_time_does_not_allow_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    setting = tiny(seconds=0.0)
    models = models_of(setting)
    monkeypatch.setattr(run, "_measured", lambda task, *others: measured(task))
    found = measure(setting, models, AT_BEST, peers=False, say=lambda text: None)
    # What comes first always is.
    assert {each.pattern: each.rate for each in found} == {"AM": 2000.0, "MM": None}
    assert all(each.late and "not measured: predicted to take" in each.failure for each in found if not each.rates)
    command = "longspan bench --patterns AM,MM --contexts 32 --seconds 10 --device cpu --parameters 130000 "
    own = "--vocab-size 258 --batch-tokens 64 --new-tokens 3 --no-peers"
    assert to_go_on(setting, models, AT_BEST, found) == f"{command}{own}"
    assert to_go_on(setting, models, AT_BEST, [replace(each, late=False) for each in found]) is None


def test_everything_is_measured_at_the_shortest_context_before_any_at_a_longer_one() -> None:
    pytest.importorskip("transformers")
    setting = tiny(patterns="AA,MS", contexts="64,32")
    cells = [
        (cell.context, cell.pattern, cell.who.partition(" ")[0])
        for cell in plan(setting, models_of(setting), peers=True)
    ]
    one = [("AA", "longspan"), ("MS", "longspan"), ("AA", "transformers")]
    assert cells == [(context, *each) for context in (32, 64) for each in one]


def test_what_would_take_longer_than_is_left_gives_way_to_what_follows(monkeypatch: pytest.MonkeyPatch) -> None:
    setting = tiny(patterns="AM,MM,AA", seconds=30.0)
    models = models_of(setting)
    monkeypatch.setattr(plans, "expected_seconds", lambda cell, *others: 60.0 if cell.pattern != "AA" else 1.0)
    monkeypatch.setattr(run, "_measured", lambda task, *others: measured(task))
    found = measure(setting, models, AT_BEST, peers=False, say=lambda text: None)
    assert [each.pattern for each in found if each.rates] == ["AM", "AA", "AM", "AM", "AA", "AA"]
    late = [each.failure for each in found if each.pattern == "MM"]
    assert late == ["not measured: predicted to take 1 min 00 s, 30 s left"] * 3


def test_a_part_may_take_its_share_of_the_time_and_at_least_twice_its_prediction(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    limits: list[float | None] = []

    def noted(task: Task, *others: Any) -> list[Measured]:
        limits.append(others[-1])
        return measured(task)

    monkeypatch.setattr(run, "time", SimpleNamespace(monotonic=lambda: 0.0))
    monkeypatch.setattr(run, "_measured", noted)
    monkeypatch.setattr(plans, "expected_seconds", lambda *others: 2.0)
    monkeypatch.setattr(plans, "peers_of", lambda config, setting: [PEER])
    setting = tiny(patterns="AM,MM", seconds=40.0)
    measure(setting, models_of(setting), AT_BEST, peers=True, say=lambda text: None)
    # 40 s are left each time, since the clock stands; 2 s a part are needed for what is to come.
    training, generating = [None, 2 + 26 / 2, 2 + 28 / 6, 2 + 30 / 5], [None, 2 + 34 / 2, 2 + 36 / 2, 40.0]
    assert limits == [*training, *generating]
    limits.clear()
    tight = replace(setting, seconds=5.0)
    measure(tight, models_of(tight), AT_BEST, peers=True, say=lambda text: None)
    assert limits == [None, 4.0, 4.0, 4.0, None, 4.0, 4.0, 5.0]


def test_every_pattern_is_compared_before_a_slow_peer_has_taken_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    begun: list[tuple[str, str, str]] = []

    def work(task: Task, *others: Any) -> list[Measured]:
        nonlocal now
        slow = task.cell.peer is not None and task.cell.pattern == "AM"
        limit = others[-1]
        needed = 1000.0 if slow else task.seconds
        now += needed if limit is None else min(needed, limit)
        begun.append((task.cell.who, task.cell.pattern, task.parts[0]))
        if limit is not None and needed > limit:
            return list(run._missing(task, others[0], others[1], "cut off", late=True))
        return measured(task)

    monkeypatch.setattr(run, "time", SimpleNamespace(monotonic=lambda: now))
    monkeypatch.setattr(run, "_measured", work)
    monkeypatch.setattr(plans, "peers_of", lambda config, setting: [PEER])
    monkeypatch.setattr(plans, "expected_seconds", lambda cell, *others: 4.0 if cell.peer else 1.0)
    setting = tiny(patterns="AM,MM,AA", contexts="32,64", seconds=60.0)
    found = measure(setting, models_of(setting), AT_BEST, peers=True, say=lambda text: None)
    order = [(who, pattern, part) for part in ("train", "prefill") for who in ("longspan", "a peer")
             for pattern in ("AM", "MM", "AA")]  # fmt: skip
    assert begun[: len(order)] == order
    compared = {each.pattern for each in found if each.who == "a peer" and each.rates and each.context == 32}
    assert compared == {"MM", "AA"}
    assert now <= 60.0
    # The slow one was given its share and no more, so there was time for a longer context.
    assert any(each.rates and each.context == 64 for each in found)


def test_peers_with_models_of_their_own_come_last(monkeypatch: pytest.MonkeyPatch) -> None:
    slow: Any = SimpleNamespace(name="slow", same_weights=False)
    monkeypatch.setattr(plans, "peers_of", lambda config, setting: [slow, PEER])
    setting = tiny(patterns="AM,MM")
    cells = [(cell.pattern, cell.who) for cell in plan(setting, models_of(setting), peers=True)]
    own = [("AM", "longspan"), ("MM", "longspan")]
    assert cells == [*own, ("AM", "a peer"), ("MM", "a peer"), ("AM", "slow"), ("MM", "slow")]


def test_the_end_of_the_time_cuts_what_is_being_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    def endless(*arguments: Any) -> Any:
        while True:
            try:
                sleep(0.001)
            except Exception:
                continue

    monkeypatch.setattr(run, "trained", lambda *arguments: ([1000.0], 1))
    monkeypatch.setattr(run, "generated", lambda *arguments: Generated([10.0], [20.0], 1, None))
    monkeypatch.setattr(run, "native_engine", lambda *arguments: None)
    monkeypatch.setattr(run, "peer_trained", endless)
    monkeypatch.setattr(run, "peer_generated", endless)
    monkeypatch.setattr(run, "plan", lambda *arguments, **more: [Cell(32, "AM", None), Cell(32, "AM", PEER)])
    monkeypatch.setattr(plans, "expected_seconds", lambda *arguments: 0.1)
    before, timer = signal.getsignal(signal.SIGALRM), signal.getitimer(signal.ITIMER_REAL)[0]
    setting, told = tiny(patterns="AM", seconds=2.0), list[str]()
    found = measure(setting, models_of(setting), AT_BEST, peers=True, say=told.append)
    assert [each.rate for each in found] == [1000.0, None, 10.0, 20.0, None, None]
    cut = [each for each in found if each.who != "longspan"]
    assert all(each.late for each in cut)
    # Training that never ends leaves generation its time.
    assert [each.failure.partition(" after ")[0] for each in cut] == ["cut off"] * 3
    assert cut[0].failure.endswith("predicted to take 0.1 s")
    assert any(line.startswith("  decode: 20 tok/s") for line in told)
    # Nothing of it is left behind.
    assert signal.getsignal(signal.SIGALRM) == before
    assert (signal.getitimer(signal.ITIMER_REAL)[0] > 0) == (timer > 0)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_whoever_stops_it_gets_what_was_measured(
    number: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "measure_ceilings", lambda device, dtype: Ceilings("a cpu", 1e11, 1e10))
    monkeypatch.setattr(run, "trained", lambda *arguments: ([1000.0], 1))

    def stopped(*arguments: Any) -> Any:
        signal.raise_signal(number)
        pytest.fail("it went on")

    monkeypatch.setattr(run, "generated", stopped)
    before = signal.getsignal(number)
    with pytest.raises(Stopped):
        bench(tiny(seconds=60.0), peers=False, json_only=False)
    shown = capsys.readouterr().out
    assert "training step" in shown
    assert f"note: {STOPPED}: longspan at 32 tokens: AM prefill, decode; MM prefill, decode" in shown
    rows = json.loads(shown.splitlines()[-1])["measured"]
    assert [row["rate"] for row in rows] == [1000.0] * 2 + [None] * 4
    assert {row["failure"] for row in rows[2:]} == {STOPPED}
    assert signal.getsignal(number) == before


def test_a_peer_that_tunes_its_kernels_is_not_begun_late() -> None:
    setting = replace(tiny(), device=torch.device("cuda"))
    tuning: Any = SimpleNamespace(name="slow", same_weights=False)
    config = models_of(tiny(patterns="MM"))["MM"]
    plain, slow = (
        expected_seconds(Cell(32, "MM", peer), ("train",), config, setting, AT_BEST) for peer in (PEER, tuning)
    )
    assert 5 < plain < slow - 30


def test_longer_contexts_are_expected_to_take_longer() -> None:
    setting = tiny(patterns="AA", contexts="32,4096")
    models = models_of(setting)
    short, long = (
        expected_seconds(cell, PARTS, models["AA"], setting, AT_BEST) for cell in plan(setting, models, peers=False)
    )
    assert 0 < short < long


def armed() -> bool:
    return signal.getitimer(signal.ITIMER_REAL)[0] > 0


def test_whoever_stops_it_just_when_the_timer_is_armed_leaves_no_timer(monkeypatch: pytest.MonkeyPatch) -> None:
    before, arm = armed(), signal.setitimer

    def interrupted(which: int, seconds: float, *interval: float) -> tuple[float, float]:
        others = arm(which, seconds, *interval)
        if seconds == 50.0:
            signal.raise_signal(signal.SIGINT)
        return others

    monkeypatch.setattr(limiting.signal, "setitimer", interrupted)
    with Limits() as limits:
        with pytest.raises(Cut), limits.measuring(50.0):
            pytest.fail("it went on")
        assert limits.stopped
        assert armed() == before
    assert armed() == before


def test_whoever_stops_it_just_when_it_ends_leaves_no_timer(monkeypatch: pytest.MonkeyPatch) -> None:
    before, rest, asked = armed(), Limits._rest, list[int]()

    def interrupted(limits: Limits) -> None:
        if not asked:
            asked.append(1)
            signal.raise_signal(signal.SIGINT)
        rest(limits)

    monkeypatch.setattr(Limits, "_rest", interrupted)
    with Limits() as limits:
        with pytest.raises(Cut), limits.measuring(50.0):
            pass
        assert armed() == before
        # Nothing is measured: nothing is cut.
        signal.raise_signal(signal.SIGALRM)
    assert armed() == before
