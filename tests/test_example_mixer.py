"""The mixer that the documentation shows keeps every law of a mixer."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from longspan.foundation.plugins import load_file
from longspan.models import budget
from longspan.models.language_model import LanguageModel, ModelConfig

EXAMPLES = Path(__file__).parents[1] / "docs" / "examples"


@pytest.fixture
def example_mixer(plugins_forgotten: None) -> str:
    load_file(EXAMPLES / "mixer.py")
    return "E"


def tiny_model(pattern: str) -> LanguageModel:
    settings = {
        "pattern": pattern, "width": 16, "heads": 2, "state": 8, "mamba_head_dim": 8, "mlp_width": 16,
        "mixers": {"E": {"average_heads": 4, "average_chunk": 8}},
    }  # fmt: skip
    return LanguageModel(ModelConfig.parse(settings, "model"), 29, 0)


DOC_T = torch.tensor([0] * 9 + [1] + [2] * 7 + [3] * 4, dtype=torch.int32)


@pytest.mark.parametrize("pattern", ["E", "EE", "AEM", "[AE]M"])
def test_the_example_mixer_keeps_the_laws(pattern: str, example_mixer: str) -> None:
    model = tiny_model(pattern)
    time = torch.arange(len(DOC_T))
    tokens_BT = ((time * 7 + 3) % 29)[None]
    with torch.no_grad():
        whole, _ = model(tokens_BT, DOC_T[None])

        later, _ = model(torch.where(time >= 11, (tokens_BT + 5) % 29, tokens_BT), DOC_T[None])
        assert torch.equal(whole[:, :11], later[:, :11]), "causality"

        other, _ = model(torch.where(DOC_T == 0, (tokens_BT + 5) % 29, tokens_BT), DOC_T[None])
        assert torch.equal(whole[:, DOC_T != 0], other[:, DOC_T != 0]), "isolation"
        assert not torch.equal(whole[:, DOC_T == 0], other[:, DOC_T == 0])

        leaking, _ = model(tokens_BT, DOC_T[None], isolation="none")
        assert not torch.equal(leaking[:, DOC_T != 0], whole[:, DOC_T != 0]), "isolation none lets the state flow on"

        for isolation in ("full", "none"):
            whole, _ = model(tokens_BT, DOC_T[None], isolation=isolation)
            for length in (1, 4, 10):
                state, parts = model.initial_state(), []
                for part, ids in zip(tokens_BT.split(length, 1), DOC_T[None].split(length, 1), strict=True):
                    hidden, state = model(part, ids, state, isolation=isolation)
                    parts.append(hidden)
                assert (torch.cat(parts, 1) - whole).abs().max() <= 1e-5, f"decode = prefill in steps of {length}"


def test_the_example_mixer_isolates_gradients_and_trains(example_mixer: str) -> None:
    model = tiny_model("E")
    tokens_BT = ((torch.arange(len(DOC_T)) * 7 + 3) % 29)[None]
    targets_BT = tokens_BT.roll(-1, 1)
    nll, _ = model.loss(tokens_BT, targets_BT, DOC_T[None], "full")
    nll.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients.values())
    assert next(g for name, g in gradients.items() if name.endswith("mixer.rate")).abs().min() > 0


def test_the_example_mixer_accounts_for_its_state(example_mixer: str) -> None:
    model = tiny_model("EE")
    tokens_BT = torch.zeros(1, 12, dtype=torch.long)
    with torch.no_grad():
        _, state = model(tokens_BT, None, model.initial_state())
    assert state.bytes() == budget.state_bytes(model.config, 12)
    assert budget.forward_flops_per_token(model.config, 29, 64) > 0
