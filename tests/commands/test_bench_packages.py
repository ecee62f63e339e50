"""The packages that bench measures beside Longspan: which patterns they get, what they are asked, what they hold."""

from __future__ import annotations

import sys
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from longspan.commands.bench import packages
from longspan.commands.bench.peers import peers_of
from longspan.commands.bench.setting import Setting, read_setting
from longspan.models.config import ModelConfig

NEW = 4


def tiny(device: str = "cpu") -> Setting:
    setting = read_setting(
        patterns="MM", contexts="6", parameters=None, device="cpu", dtype=None, seconds=1.0, vocab_size=30,
        batch_tokens=64, new_tokens=NEW,
    )  # fmt: skip
    return replace(setting, device=torch.device(device))


def config(pattern: str, **settings: Any) -> ModelConfig:
    return ModelConfig(pattern=pattern, width=32, heads=2, state=8, mamba_head_dim=16, delta_head_dim=8, **settings)


@pytest.mark.parametrize(("pattern", "names"), [
    ("MM", ["mamba-ssm without causal-conv1d", "flash-linear-attention"]),
    ("AM", ["mamba-ssm without causal-conv1d"]),
    ("DD", ["flash-linear-attention"]),
    ("AA", []),
    ("MD", []),
])  # fmt: skip
def test_who_has_a_model_like_it(pattern: str, names: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packages, "has", lambda module: module in ("mamba_ssm", "fla"))
    assert [peer.name for peer in peers_of(config(pattern), tiny("cuda"))] == names
    assert not list(peers_of(config(pattern), tiny()))


def test_flash_linear_attention_is_asked_token_by_token_with_its_cache() -> None:
    asked: list[tuple[int, bool]] = []

    def model(input_ids: torch.Tensor, *, use_cache: bool, past_key_values: Any = None, logits_to_keep: int = 0) -> Any:
        asked.append((input_ids.shape[1], past_key_values is not None))
        state = {"recurrent_state": torch.zeros(2), "conv_state": (torch.zeros(3), None), "attn_state": None}
        cache = SimpleNamespace(layers=[SimpleNamespace(state=state)])
        return SimpleNamespace(logits=torch.zeros(1, 1, 30), past_key_values=cache)

    found = packages.fla_generated(model, 6, tiny(), 0.0)
    assert asked == [(6, False), *[(1, True)] * (NEW - 1)] * 4
    assert found.state_bytes == 5 * 4
    assert len(found.prefill) == len(found.decode) == 3
    assert min(found.prefill + found.decode) > 0


def test_mamba_ssm_generates_by_itself_with_a_graph() -> None:
    lengths: list[int] = []

    def generate(prompt: torch.Tensor, length: int, *, cg: bool, streamer: Any) -> None:
        assert cg
        lengths.append(length)
        for _ in range(1 + length - prompt.shape[1]):
            streamer.put(prompt)
        streamer.end()

    held = SimpleNamespace(key_value_memory_dict={0: (torch.zeros(4), None), 1: (torch.zeros(2), torch.zeros(1))})
    model = SimpleNamespace(generate=generate, _decoding_cache=SimpleNamespace(inference_params=held))
    found = packages.mamba_ssm_generated(model, 6, tiny(), 0.0)
    assert lengths == [6 + NEW] * 4
    assert found.state_bytes == 7 * 4
    assert len(found.decode) == 3


def test_flash_linear_attentions_mamba2_has_layers_for_as_many_parameters(monkeypatch: pytest.MonkeyPatch) -> None:
    made: dict[str, Any] = {}
    module = SimpleNamespace(
        Mamba2Config=lambda **given: made.update(given),
        Mamba2ForCausalLM=lambda made: None,
        GatedDeltaNetConfig=lambda **given: made.update(given),
        GatedDeltaNetForCausalLM=lambda made: None,
    )
    monkeypatch.setitem(sys.modules, "fla.models", module)  # type: ignore[arg-type]
    monkeypatch.setitem(sys.modules, "fla", SimpleNamespace(models=module))  # type: ignore[arg-type]
    # An MLP of 64 has 3 x 32 x 64 weights, a Mamba-2 of this width about 7,000: two of both are as many as four.
    packages.fla_model(config("MM", mlp_width=64), tiny())
    assert (made["num_hidden_layers"], made["num_heads"], made["state_size"]) == (4, 4, 8)
    packages.fla_model(config("DD", mlp_width=64), tiny())
    assert (made["num_hidden_layers"], made["num_heads"], made["intermediate_size"]) == (2, 3, 64)
