"""`longspan bench` at tiny sizes: what it measures, what it says of it, and what it refuses."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from longspan.commands.bench import run
from longspan.commands.bench.ceilings import Ceilings
from longspan.commands.bench.measured import Measured, share_of_ceiling
from longspan.commands.bench.plan import LEFT_OUT, expected_seconds, plan, to_go_on
from longspan.commands.bench.run import bench, measure
from longspan.commands.bench.setting import models_of, read_setting
from longspan.foundation.errors import UserError
from longspan.models.budget import count_parameters, state_bytes

TINY: dict[str, Any] = {
    "patterns": "AM,MM", "contexts": "32", "parameters": "130k", "device": "cpu", "dtype": None, "seconds": 0.01,
    "vocab_size": 258, "batch_tokens": 64, "new_tokens": 3,
}  # fmt: skip


AT_BEST = Ceilings("", 1e12, 1e11)


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
        ({"contexts": "long"}, "--contexts long"),
        ({"contexts": "0"}, "--contexts 0"),
        ({"patterns": "AX"}, "X"),
        ({"device": "tpu"}, "tpu"),
    ],
)
def test_what_cannot_be_measured_is_refused_by_name(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError) as refused:
        models_of(tiny(**changes))
    assert words in refused.value.given


def test_it_ends_in_one_json_line_with_every_part(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "measure_ceilings", lambda device, dtype: Ceilings("a cpu", 1e11, 1e10))
    setting = tiny(seconds=0.3, patterns="AM")
    bench(setting, peers=False, json_only=False)
    shown, told = capsys.readouterr()
    assert "█" in shown
    assert re.search(r"training step: [\d,]+ tok/s; prefill, one prompt: [\d,]+ tok/s; decoding", told)
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


def test_what_the_time_does_not_allow_is_named() -> None:
    setting = tiny(seconds=0.0)
    models = models_of(setting)
    found = measure(setting, models, AT_BEST, peers=False, say=lambda text: None)
    assert [each.failure for each in found] == [LEFT_OUT] * 6
    command = "longspan bench --patterns AM,MM --contexts 32 --seconds 10 --device cpu --parameters 130000 "
    assert to_go_on(setting, models, AT_BEST, found) == f"{command}--vocab-size 258 --batch-tokens 64 --new-tokens 3"
    assert to_go_on(setting, models, AT_BEST, [replace(each, failure="") for each in found]) is None


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
    monkeypatch.setattr(run, "expected_seconds", lambda cell, *others: 60.0 if cell.pattern != "AA" else 1.0)
    got = Measured("", 32, "train", "longspan", 1, (1.0,))
    monkeypatch.setattr(run, "_measure_one", lambda config, pattern, *others: [replace(got, pattern=pattern)])
    found = measure(setting, models, AT_BEST, peers=False, say=lambda text: None)
    assert [each.failure or each.pattern for each in found] == ["AM", *[LEFT_OUT] * 3, "AA"]


def test_longer_contexts_are_expected_to_take_longer() -> None:
    setting = tiny(patterns="AA", contexts="32,4096")
    models = models_of(setting)
    short, long = (
        expected_seconds(cell, models["AA"], setting, AT_BEST) for cell in plan(setting, models, peers=False)
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


def test_transformers_computes_the_same_models_beside(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    setting = tiny(patterns="AA,MS", seconds=1.5)
    # However busy the machine, the time is never over.
    monkeypatch.setattr(run, "time", SimpleNamespace(monotonic=lambda: 0.0))
    found = measure(setting, models_of(setting), AT_BEST, peers=True, say=lambda text: None)
    theirs = [each for each in found if each.who == "transformers LlamaForCausalLM"]
    # No class of transformers computes MS.
    assert {each.who for each in found} == {"longspan", "transformers LlamaForCausalLM"}
    assert [each.part for each in theirs] == ["train", "prefill", "decode"]
    assert all(each.rate and not each.failure for each in theirs), theirs
    assert {each.parameters for each in theirs} == {each.parameters for each in found if each.pattern == "AA"}
    assert torch.get_default_dtype() == torch.float32
