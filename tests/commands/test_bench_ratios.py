"""What `longspan bench` says of its measurements: how certain ratios are, and what its tables hold."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from longspan.commands.bench.compared import times_as_fast
from longspan.commands.bench.measured import Measured
from longspan.commands.bench.setting import models_of
from longspan.commands.bench.show import show

from .benching import AT_BEST, tiny


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
