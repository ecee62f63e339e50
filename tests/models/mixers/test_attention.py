"""Attention weights are dropped in training only, and a cache lets go of keys that nobody can see."""

from __future__ import annotations

import pytest
import torch

from longspan.foundation.errors import UserError
from longspan.models.language_model import LanguageModel, ModelConfig


def model_with(dropout: float, pattern: str = "A") -> LanguageModel:
    settings = {"pattern": pattern, "width": 16, "heads": 2, "mlp_width": 16, "window": 4}
    return LanguageModel(ModelConfig.parse({**settings, "attention_dropout": dropout}, "model"), 29)


def hidden(model, batch, seed, doc=None):
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        return model(batch, doc)[0]


@pytest.mark.parametrize("doc", [None, torch.tensor([[0] * 9 + [1] * 12])])
@pytest.mark.parametrize("pattern", ["A", "S"])
def test_attention_weights_are_dropped_in_training_only(pattern, doc, tokens):
    batch, dropped, kept = tokens(1, 21), model_with(0.5, pattern), model_with(0.0, pattern)
    first, second, other = (hidden(dropped, batch, seed, doc) for seed in (0, 0, 1))
    assert torch.equal(first, second)
    assert not torch.equal(first, other)
    dropped.eval()
    assert torch.equal(hidden(dropped, batch, 0, doc), hidden(kept, batch, 0, doc))


def test_the_only_weight_of_a_first_token_is_gone_or_doubled(tokens):
    model, batch = model_with(0.5), tokens(1, 1)
    attention = model.blocks[0].mixer
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        attention.out_proj.weight.copy_(torch.eye(16))
        x, segments = model.embedding(batch), model.segments(batch)
        draws = torch.stack([attention(x, segments, None)[0] for _ in range(200)])
        whole = attention.eval()(x, segments, None)[0]
    scale = (draws / whole).view(200, 2, 8)
    kept = scale[:, :, 0] > 1
    assert torch.allclose(scale, torch.where(kept, 2.0, 0.0)[..., None].expand_as(scale))
    assert 0.4 < kept.float().mean() < 0.6
    assert not torch.equal(kept[:, 0], kept[:, 1])


@pytest.mark.parametrize("dropout", [-0.1, 1.0])
def test_no_probability_is_refused(dropout):
    with pytest.raises(UserError, match="attention_dropout"):
        model_with(dropout)


def test_keys_of_closed_documents_leave_the_cache_and_then_its_room(tiny, tokens):
    model = tiny("A")
    with torch.no_grad():
        state = model.initial_state()
        for i in range(40):
            _, state = model(tokens(1, 10, name=i), torch.full((1, 10), i), state)
            (layer,) = state.layers
            assert layer.length == 10
            assert layer.cache.k_BSGP.shape[1] <= 2 * (10 + 64)
