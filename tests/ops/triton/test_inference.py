"""Without gradients a model on kernels, whose layers hand on normed streams, says what plain layers say."""

from __future__ import annotations

import pytest
import torch

from longspan.models.graphed_decoding import GraphedDecoding
from longspan.models.language_model import LanguageModel, ModelConfig
from longspan.ops import kernels

SETTINGS = {"width": 16, "heads": 1, "state": 16, "mamba_head_dim": 16, "mlp_width": 24}


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize(("pattern", "mlp"), [("MA", "swiglu"), ("MM", "none")])
@torch.no_grad()
def test_prefill_and_a_step(pattern, mlp, device, served, monkeypatch):
    config = ModelConfig(
        pattern=pattern, mlp=mlp, **{k: v for k, v in SETTINGS.items() if mlp != "none" or k != "mlp_width"}
    )
    model = LanguageModel(config, 32).eval().to(device)
    tokens = torch.randint(32, (2, 7), generator=torch.Generator().manual_seed(0)).to(device)

    def read() -> list[torch.Tensor]:
        first, state = model.next_logits(tokens[:, :6], model.initial_state())
        return [first, model.next_logits(tokens[:, 6:], state)[0]]

    chained = read()
    monkeypatch.setattr(type(model.blocks[0]), "forward", None)
    for one, same in zip(read(), chained, strict=True):
        assert torch.equal(one, same)
    monkeypatch.undo()
    kernels.choose("plain")
    for one, other in zip(chained, read(), strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("pattern", ["m", "M", "D", "C", "A", "[Mm]"])
@torch.no_grad()
def test_steps_on_fixed_memory(pattern, device, served):
    """Of whatever layout the states are that a prompt and a first token leave."""
    settings = {**SETTINGS, "state": 8, "mamba_head_dim": 8, "delta_head_dim": 6, "embedding_multiplier": 16.0}
    model = LanguageModel(ModelConfig(pattern=pattern, **settings), 32).eval().to(device)
    tokens = torch.randint(32, (2, 8), generator=torch.Generator().manual_seed(0)).to(device)
    graphed = GraphedDecoding(model, 2, 10)
    kernels.choose("plain")
    _, state = model.next_logits(tokens[:, :5], model.initial_state())
    kernels.choose("triton")
    graphed.load(state)
    found = [graphed.step(tokens[:, t : t + 1]).clone() for t in range(5, 8)]
    kernels.choose("plain")
    for t, one in zip(range(5, 8), found, strict=True):
        other, state = model.next_logits(tokens[:, t : t + 1], state)
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)
