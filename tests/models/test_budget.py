"""Counts equal the real model's, and matching reaches its target or says what stopped it."""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from longspan.foundation.errors import UserError
from longspan.models import budget
from longspan.models.budget import MatchConfig, count_parameters, match
from longspan.models.language_model import LanguageModel, ModelConfig

SMOKE_TRANSFORMER = {
    "pattern": "AA",
    "width": 128,
    "heads": 4,
    "mlp": "gelu",
    "mlp_width": 512,
    "norm": "layernorm",
    "positions": "learned",
    "max_positions": 128,
    "tied": False,
    "init": "normal",
}
WIKITEXT_BASELINE = {
    "pattern": "A6",
    "width": 256,
    "heads": 4,
    "mlp": "gelu",
    "mlp_width": 1024,
    "norm": "layernorm",
    "positions": "learned",
    "max_positions": 128,
    "attention_bias": True,
    "init": "normal",
}
SMALL = {"width": 64, "heads": 4, "state": 16, "mamba_head_dim": 16}


def config(pattern: str, **settings: object) -> ModelConfig:
    return ModelConfig.parse({"pattern": pattern, **SMALL, **settings}, "model")


@pytest.mark.parametrize(
    ("settings", "vocab_size", "total", "non_embedding"),
    [(SMOKE_TRANSFORMER, 8000, 2_460_160, 395_776), (WIKITEXT_BASELINE, 8192, 6_868_992, 4_739_072)],
)
def test_published_models_have_the_published_size(settings, vocab_size, total, non_embedding):
    published = ModelConfig.parse(settings, "model")
    counted = count_parameters(published, vocab_size)
    assert sum(p.numel() for p in LanguageModel(published, vocab_size).parameters()) == counted.total == total
    # The earlier projects counted learned positions as non-embedding or not; the sheet's figures leave them out.
    assert counted.non_embedding == non_embedding


@pytest.mark.parametrize("pattern", ["A", "M", "G", "AMG", "(AM)2G"])
@pytest.mark.parametrize(
    "settings", [{}, {"tied": False, "mlp": "gelu"}, {"mlp": "none", "norm": "layernorm", "kv_heads": 2}]
)
def test_counts_equal_the_real_model(pattern, settings):
    counted = count_parameters(config(pattern, **settings), 300)
    model = LanguageModel(config(pattern, **settings), 300)
    assert counted.total == sum(p.numel() for p in model.parameters())
    assert counted.mixers == sum(p.numel() for b in model.blocks for p in b.mixer.parameters())
    assert counted.embedding == model.embedding.weight.numel()
    assert counted.total == counted.embedding + counted.head + counted.non_embedding


def test_counting_allocates_nothing():
    huge = ModelConfig(pattern="(AM)40", width=16_384, heads=128)
    assert count_parameters(huge, 128_000).total > 1e11


def test_mamba2_has_the_size_of_the_formula():
    """6.38 D^2 at D = 768, E = 2, N = 128 (facts, 5.6)."""
    mixers = count_parameters(ModelConfig(pattern="M", width=768, state=128, mlp="none"), 10).mixers
    assert mixers / 768**2 == pytest.approx(6.38, abs=0.01)


@pytest.mark.parametrize("pattern", ["A", "AA"])
@pytest.mark.parametrize("kv_heads", [2, 4])
def test_attention_flops_equal_the_counter_up_to_the_causal_half(pattern, kv_heads):
    context, vocab = 48, 50
    settings = config(pattern, kv_heads=kv_heads)
    model = LanguageModel(settings, vocab)
    # The counter does not know the CPU's fused attention; the plain kernel is made of products that it knows.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad():
        model.logits(model(torch.zeros(1, context, dtype=torch.long))[0])
    # The counter takes scores and values as dense: twice the causal average.
    causal_half = len(pattern) * 2 * context * settings.width
    ours = budget.forward_flops_per_token(settings, vocab, context)
    assert counter.get_total_flops() / context == ours + causal_half


@pytest.mark.parametrize("letter", ["M", "G"])
def test_the_rest_of_recurrent_flops_is_the_formula(letter):
    """What the counter sees of the linear layers, plus the recurrence by the facts' formula."""
    settings, context, vocab = config(letter), 64, 50
    model = LanguageModel(settings, vocab)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        for module in model.modules():
            if isinstance(module, torch.nn.Linear):
                module(torch.zeros(context, module.in_features))
        model.logits(torch.zeros(context, settings.width))
    inner, state, chunk, conv_channels = 128, 16, 64, 128 + 2 * 16
    recurrence = {
        "M": 2 * 4 * conv_channels + chunk * state + chunk * inner + 4 * inner * state,
        "G": 2 * 2 * 3 * settings.width**2,
    }
    ours = budget.forward_flops_per_token(settings, vocab, context)
    assert ours == counter.get_total_flops() / context + recurrence[letter]


def test_training_is_three_forwards():
    assert budget.training_flops_per_token(config("AMG"), 50, 64) == 3 * budget.forward_flops_per_token(
        config("AMG"), 50, 64
    )


@pytest.mark.parametrize("pattern", ["A", "M", "G", "AMG"])
@pytest.mark.parametrize("kv_heads", [1, 4])
def test_state_bytes_equal_what_a_state_holds(pattern, kv_heads):
    settings, context = config(pattern, kv_heads=kv_heads), 33
    model = LanguageModel(settings, 50)
    with torch.no_grad():
        state = model.initial_state()
        for length in (20, 1, 12):
            _, state = model(torch.zeros(1, length, dtype=torch.long), None, state)
    assert state.bytes() == budget.state_bytes(settings, context)
    assert state.expand(3).bytes() == 3 * budget.state_bytes(settings, context)


def test_state_bytes_of_published_shapes():
    """Llama-3.1-8B: 128 KiB per token at 16 bit (facts, benchmarks 5)."""
    llama = ModelConfig(pattern="A32", width=4096, heads=32, kv_heads=8)
    assert budget.state_bytes(llama, 1, torch.bfloat16) == 128 * 1024


@pytest.mark.parametrize("pattern", ["MMMM", "AMAM", "GGGG", "AAMG", "(AM)12"])
@pytest.mark.parametrize("quantity", ["parameters", "non_embedding_parameters"])
def test_match_reaches_the_reference_within_half_a_percent(pattern, quantity):
    wanted = ModelConfig(pattern=pattern, width=256, heads=4)
    reference = "A" * len(wanted.layers())
    matched = match(wanted, MatchConfig(**{quantity: reference}), 4096)
    counted = count_parameters(matched.config, 4096)
    reached = counted.total if quantity == "parameters" else counted.non_embedding
    assert matched.reached == reached
    assert abs(matched.residual) <= 0.005
    assert matched.residual == pytest.approx(reached / matched.target - 1)
    assert matched.config.model_dump(exclude={"mlp_width"}) == wanted.model_dump(exclude={"mlp_width"})


def test_the_reference_matches_itself_unchanged():
    wanted = ModelConfig(pattern="AAAA", width=256, heads=4)
    matched = match(wanted, MatchConfig(non_embedding_parameters="A4"), 4096)
    assert matched.config == wanted
    assert matched.residual == 0


def test_match_takes_the_largest_step_that_is_good_enough():
    wanted = config("MM", width=128)
    coarse = match(wanted, MatchConfig(parameters="AA", tolerance=0.2), 500).config.mlp_width
    fine = match(wanted, MatchConfig(parameters="AA", tolerance=0.003), 500).config.mlp_width
    assert coarse % 64 == 0
    assert fine % 64 != 0


def test_match_frees_width_and_depth():
    wide = match(config("AM"), MatchConfig(parameters=1_000_000, free="width", tolerance=0.05), 500)
    assert wide.config.width % 8 == 0
    assert abs(wide.residual) <= 0.05
    deep = match(config("AM"), MatchConfig(non_embedding_parameters="(AM)6", free="depth"), 500)
    assert len(deep.config.layers()) == 12
    assert deep.residual == 0


@pytest.mark.parametrize(
    ("settings", "free", "target", "stopped_by"),
    [
        ({}, "mlp_width", 1000, "mlp_width cannot be below 1, and everything but the MLPs"),
        ({}, "width", 100, "width cannot be below 8"),
        ({"heads": 8, "mamba_head_dim": 64}, "width", 300_000, "width must be a multiple of 32"),
        ({}, "depth", 1000, "depth cannot be below one repeat of AM"),
        ({}, "depth", 120_000, "depth grows by whole repeats of AM"),
        ({"mlp": "none"}, "mlp_width", 1000, "on a model without MLP"),
    ],
)
def test_an_impossible_match_names_the_bound_and_what_is_in_reach(settings, free, target, stopped_by):
    with pytest.raises(UserError) as caught:
        match(config("AM", **settings), MatchConfig(non_embedding_parameters=target, free=free), 500)
    assert stopped_by in caught.value.given
    if settings != {"mlp": "none"}:
        assert caught.value.allowed.startswith(f"nearest in reach: {free} ")


@pytest.mark.parametrize("given", [{}, {"parameters": 5, "non_embedding_parameters": 5}, {"parameters": 0}])
def test_a_match_has_one_positive_target(given):
    with pytest.raises(UserError, match=r"study\.match"):
        MatchConfig.parse(given, "study.match")
