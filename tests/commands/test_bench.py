"""`longspan bench` at tiny sizes: what it measures, what it says of it, and what it refuses."""

from __future__ import annotations

import json
import signal
from contextlib import nullcontext
from dataclasses import replace
from time import sleep
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from longspan.commands.bench import limits as limiting
from longspan.commands.bench import peers, run
from longspan.commands.bench import plan as plans
from longspan.commands.bench.ceilings import Ceilings
from longspan.commands.bench.compared import times_as_fast
from longspan.commands.bench.limits import Cut, Limits
from longspan.commands.bench.measured import PARTS, Measured, share_of_ceiling
from longspan.commands.bench.own import Generated
from longspan.commands.bench.plan import STOPPED, Cell, Task, expected_seconds, plan, to_go_on
from longspan.commands.bench.run import bench, measure
from longspan.commands.bench.setting import models_of, read_setting
from longspan.commands.bench.show import show
from longspan.foundation.errors import Stopped, UserError
from longspan.models.budget import count_parameters, state_bytes

TINY: dict[str, Any] = {
    "patterns": "AM,MM", "contexts": "32", "parameters": "130k", "device": "cpu", "dtype": None, "seconds": 0.01,
    "vocab_size": 258, "batch_tokens": 64, "new_tokens": 3,
}  # fmt: skip


AT_BEST = Ceilings("", 1e12, 1e11)
PEER: Any = SimpleNamespace(name="a peer", same_weights=True)


def tiny(**changes: Any) -> Any:
    return read_setting(**{**TINY, **changes})


def test_patterns_are_measured_at_equal_parameters() -> None:
    setting = tiny(patterns="AAAA,MMMM,(AM)2", parameters="1.3M", vocab_size=2048)
    sizes = {pattern: count_parameters(model, 2048).total for pattern, model in models_of(setting).items()}
    assert list(sizes) == ["AAAA", "MMMM", "(AM)2"]
    assert all(abs(size / sizes["AAAA"] - 1) <= 0.02 for size in sizes.values())
    assert 0.7e6 < sizes["AAAA"] < 2.6e6


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"parameters": "1000"}, "--parameters 1,000"),
        ({"parameters": "many"}, "--parameters many"),
        ({"dtype": "fp8"}, "--dtype fp8"),
        ({"contexts": "long"}, "--contexts 'long'"),
        ({"contexts": "0"}, "--contexts '0'"),
        ({"patterns": "AX"}, "X"),
        ({"device": "tpu"}, "tpu"),
    ],
)
def test_what_cannot_be_measured_is_refused_by_name(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError) as refused:
        models_of(tiny(**changes))
    assert words in refused.value.given


@pytest.mark.parametrize(("parameters", "dims"), [("130k", 16), ("700k", 32), ("3M", 64)])
def test_gated_deltanet_is_measured_at_any_width(parameters: str, dims: int) -> None:
    setting = tiny(patterns="AAAA,DDDD", parameters=parameters, vocab_size=300)
    models = models_of(setting)
    assert models["DDDD"].delta_head_dim == dims
    sizes = [count_parameters(model, 300).total for model in models.values()]
    assert abs(sizes[1] / sizes[0] - 1) <= 0.02


def test_a_pattern_that_cannot_be_as_small_is_refused_in_words_of_the_command() -> None:
    with pytest.raises(UserError) as refused:
        models_of(tiny(patterns="A,MM", parameters="50000", vocab_size=300))
    assert refused.value.given.startswith("--patterns: pattern MM cannot be matched")
    assert "name MM first" in refused.value.fix


def test_it_ends_in_one_json_line_with_every_part(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "measure_ceilings", lambda device, dtype: Ceilings("a cpu", 1e11, 1e10))
    setting = tiny(seconds=0.3, patterns="AM")
    bench(setting, peers=False, json_only=False)
    shown = capsys.readouterr().out
    assert "█" in shown
    found = json.loads(shown.splitlines()[-1])
    assert [row["part"] for row in found["measured"]] == ["train", "prefill", "decode"]
    for row in found["measured"]:
        assert row["who"] == "longspan"
        assert row["failure"] == ""
        assert row["rate"] > 0
        assert len(row["rates"]) >= 2
        assert row["ceiling"] > 0
    config = models_of(setting)["AM"]
    # Each run ends before its last token is taken in.
    held = {state_bytes(config, 32 + tokens) for tokens in range(4)}
    assert found["measured"][2]["state_bytes"] in held
    assert found["measured"][0]["memory_bytes"] > 2**20


def test_a_rate_at_the_ceiling_is_a_share_of_one() -> None:
    setting = tiny()
    config = models_of(setting)["AM"]
    at_best = Ceilings("a cpu", 1e12, 1e11)
    for part in ("train", "prefill", "decode"):
        one = share_of_ceiling(part, [1000.0], config, 32, setting, at_best)  # type: ignore[arg-type]
        assert one is not None
        assert share_of_ceiling(part, [1.0, 1000.0 / one, 1e9], config, 32, setting, at_best) == pytest.approx(1.0)  # type: ignore[arg-type]


def measured(task: Task) -> list[Measured]:
    cell = task.cell
    return [Measured(cell.pattern, cell.context, part, cell.who, 1, (1000.0, 3000.0)) for part in task.parts]


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


@pytest.mark.parametrize(
    ("ours", "theirs", "ratio"),
    [
        ([2.0, 2.0, 2.0], [1.0, 1.0, 1.0], (2.0, 2.0, 2.0)),
        ([2.0, 2.0], [1.0, 1.0, 1.0], None),
        ([2.0, 2.0, 2.0], [1.0], None),
        ([], [1.0, 1.0, 1.0], None),
    ],
)
def test_a_ratio_needs_repeats_of_both(ours: list[float], theirs: list[float], ratio: Any) -> None:
    found = times_as_fast(ours, theirs)
    assert (None if found is None else (found.value, found.low, found.high)) == pytest.approx(ratio)


def test_a_ratio_of_few_repeats_is_less_certain_than_one_of_many() -> None:
    wide, narrow = (times_as_fast([1.9, 2.0, 2.1] * n, [0.9, 1.0, 1.1] * n) for n in (1, 8))
    assert wide is not None
    assert narrow is not None
    assert wide.value == narrow.value == 2.0
    assert wide.low < narrow.low < 2.0 < narrow.high < wide.high
    # Three repeats of each allow no less than all that they span.
    assert (wide.low, wide.high) == pytest.approx((1.9 / 1.1, 2.1 / 0.9))


@pytest.mark.parametrize(("n", "left_out"), [(4, 0), (5, 2), (10, 23), (20, 127)])
def test_the_interval_of_a_ratio_is_that_of_mann_and_whitney(n: int, left_out: int) -> None:
    # Critical values of U, two-sided 5 %, from the published table.
    ours, theirs = ([base + step / 100 for step in range(n)] for base in (2.0, 1.0))
    pairs = sorted(mine / other for mine in ours for other in theirs)
    ratio = times_as_fast(ours, theirs)
    assert ratio is not None
    assert (ratio.low, ratio.high) == pytest.approx((pairs[left_out], pairs[-1 - left_out]))


def test_a_few_slow_repeats_hardly_move_a_ratio() -> None:
    rates = [1.0 + step / 1000 for step in range(30)]
    ratio = times_as_fast([*rates, 0.1, 0.1, 0.1], [*rates, 1.0, 1.0, 1.0])
    assert ratio is not None
    assert 0.98 < ratio.low <= ratio.value <= ratio.high < 1.02


def test_a_machine_that_does_other_work_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    setting = tiny(patterns="AM")
    steady = Measured("AM", 32, "train", "longspan", 1, (100.0, 101.0, 102.0, 103.0))
    show(setting, models_of(setting), AT_BEST, [steady])
    assert "other work" not in capsys.readouterr().out
    show(
        setting, models_of(setting), AT_BEST, [steady, replace(steady, who="a peer", rates=(50.0, 80.0, 100.0, 130.0))]
    )
    assert "note: in 1 of 2 rows repeats are more than 20 % apart" in capsys.readouterr().out


def test_tables_and_json_say_how_many_repeats_a_ratio_rests_on(capsys: pytest.CaptureFixture[str]) -> None:
    setting = tiny(patterns="AM")
    own = Measured("AM", 32, "train", "longspan", 1, (1900.0, 2000.0, 2100.0))
    peer = Measured("AM", 32, "train", "a peer", 1, (900.0, 1000.0, 1100.0))
    show(setting, models_of(setting), AT_BEST, [own, peer, replace(peer, who="short", rates=(10.0, 11.0))])
    shown = capsys.readouterr().out
    (row,) = [line.split() for line in shown.splitlines() if " a peer " in line]
    assert row[:9] == ["AM", "a", "peer", "1.00", "k", "900…1.10", "k", "3", "2.00×"]
    assert "[1.73, 2.33]" in shown
    (few,) = [line.split() for line in shown.splitlines() if " short " in line]
    assert few[2:6] == ["10.5", "10…11", "2", "–"]
    assert peer.to_json(own.rates)["longspan_is"] == pytest.approx({"value": 2.0, "low": 1.7273, "high": 2.3333})
    assert peer.to_json(own.rates)["repeats"] == 3
    assert own.to_json(own.rates)["longspan_is"] is None


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


def test_a_gpu_gets_widths_of_whole_tiles() -> None:
    setting = replace(tiny(patterns="A12,M12,(AM)6", parameters="110M", vocab_size=32_768), device=torch.device("cuda"))
    models = models_of(setting)
    assert (models["A12"].width, models["A12"].heads, models["A12"].hidden) == (768, 12, 2048)
    assert all(model.hidden % 64 == 0 for model in models.values())


def test_a_peer_that_fails_does_not_end_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*arguments: Any) -> Any:
        raise TypeError("no such kernel here\nand more")

    monkeypatch.setattr(run, "trained", broken)
    setting = tiny(patterns="AM", seconds=0.3)
    found = measure(setting, models_of(setting), AT_BEST, peers=False, say=lambda text: None)
    assert [each.failure for each in found] == ["TypeError: no such kernel here", "", ""]
    assert found[1].rate is not None


def test_why_a_peer_has_no_rate_stands_in_the_tables(capsys: pytest.CaptureFixture[str]) -> None:
    setting = tiny(patterns="AM")
    reason = "AssertionError: rotary requires flash_attn to be installed, which is not so here"
    broken = Measured("AM", 32, "train", "a peer", 1, failure=reason)
    show(setting, models_of(setting), AT_BEST, [Measured("AM", 32, "train", "longspan", 1, (1.0, 2.0)), broken])
    shown = capsys.readouterr().out
    (row,) = [line for line in shown.splitlines() if "a peer" in line and not line.startswith("note")]
    assert row.rstrip().endswith("AssertionError: rotary requires f…")
    assert f"note: a peer, AM, train at 32 tokens: {reason}" in shown
    assert broken.to_json()["failure"] == reason


def test_tables_have_no_column_without_a_value_and_name_classes_once(capsys: pytest.CaptureFixture[str]) -> None:
    setting, name = tiny(patterns="AM"), "transformers LlamaForCausalLM"
    late = Measured("AM", 32, "decode", name, 1, failure="not measured: predicted to take 3 min 20 s, 1 min 05 s left")
    show(
        setting,
        models_of(setting),
        AT_BEST,
        [
            Measured("AM", 32, "train", "longspan", 1, (3.0, 4.0, 5.0), memory_bytes=2**20),
            Measured("AM", 32, "train", name, 1, (1.0, 2.0, 2.0), memory_bytes=2**20),
            replace(late, who="longspan", failure="", rates=(1.0, 2.0), state_bytes=1024),
            replace(late, late=True),
        ],
    )
    shown = capsys.readouterr().out
    training, decoding = shown[shown.index("training step") :].split("decoding, one sequence")
    assert "transformers: AM LlamaForCausalLM" in shown
    assert shown.count("LlamaForCausalLM") == 1
    assert "memory" in training
    assert "longspan is" in training
    assert "state" not in training
    assert "memory" not in decoding
    assert "note: not measured, the time was short: transformers at 32 tokens: AM decode" in decoding


def test_a_peer_whose_batch_does_not_fit_trains_in_parts_of_it() -> None:
    asked: list[int] = []

    def loss(model: Any, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        asked.append(len(tokens))
        if len(tokens) > 1:
            raise torch.OutOfMemoryError("no room")
        return model(tokens.float()).square().mean()

    setting = tiny(batch_tokens=128)
    peer: Any = SimpleNamespace(build=lambda dtype: torch.nn.Linear(32, 1), loss=loss)
    run_of = peers.peer_trained(peer, 32, setting, 0.0)
    assert (run_of.parts, run_of.parameters, len(run_of.rates)) == (4, 33, 3)
    # 4 rows, then 2, then one by one: two steps that are not counted and three that are.
    assert asked == [4, 2, *[1] * 20]
    too_large: Any = SimpleNamespace(build=peer.build, loss=lambda *given: loss(given[0], torch.zeros(2, 32), given[2]))
    with pytest.raises(torch.OutOfMemoryError):
        peers.peer_trained(too_large, 32, setting, 0.0)


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


def test_transformers_computes_the_same_models_beside(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    setting = tiny(patterns="AA,MS", seconds=6.0)
    # However busy the machine, the time is never over.
    monkeypatch.setattr(run, "time", SimpleNamespace(monotonic=lambda: 0.0))
    monkeypatch.setattr(Limits, "measuring", lambda limits, seconds: nullcontext())
    monkeypatch.setattr(run, "MOST_SECONDS", {"cpu": 0.1})
    found = measure(setting, models_of(setting), AT_BEST, peers=True, say=lambda text: None)
    theirs = [each for each in found if each.who == "transformers LlamaForCausalLM"]
    # No class of transformers computes MS.
    assert {each.who for each in found} == {"longspan", "transformers LlamaForCausalLM"}
    assert [each.part for each in theirs] == ["train", "prefill", "decode"]
    assert all(each.rate and not each.failure for each in theirs), theirs
    assert {each.parameters for each in theirs} == {each.parameters for each in found if each.pattern == "AA"}
    assert torch.get_default_dtype() == torch.float32
