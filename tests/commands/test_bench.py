"""`longspan bench` at tiny sizes: what it measures, and what it refuses."""

from __future__ import annotations

import json
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from longspan.commands.bench import peers, run
from longspan.commands.bench.ceilings import Ceilings
from longspan.commands.bench.limits import Limits
from longspan.commands.bench.measured import share_of_ceiling
from longspan.commands.bench.run import bench, measure
from longspan.commands.bench.setting import models_of
from longspan.foundation.errors import UserError
from longspan.models.budget import count_parameters, state_bytes

from .benching import AT_BEST, tiny


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


@pytest.mark.parametrize(("cuda", "why"), [("13.0", "torch sees no GPU here"), (None, "built for CPUs alone")])
def test_a_gpu_that_is_not_there_is_refused_with_the_reason(
    monkeypatch: pytest.MonkeyPatch, cuda: str | None, why: str
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    with pytest.raises(UserError, match=why):
        tiny(device="cuda")
