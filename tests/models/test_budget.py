"""What a configuration is said to cost is what the real model holds, computes and moves."""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode, bmm_flop, mm_flop

from longspan.models import budget
from longspan.models.budget import count_parameters
from longspan.models.language_model import LanguageModel, ModelConfig
from longspan.models.mixers import registered
from longspan.models.pattern import letters_of

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
SMALL = {"width": 64, "heads": 4, "state": 16, "mamba_head_dim": 16, "delta_head_dim": 16}
LETTERS = sorted(registered())
PATTERNS = [*LETTERS, "AMG", "(AM)2G", "[AM]G", "[MAG][AA]"]


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


@pytest.mark.parametrize(
    ("pattern", "total"),
    [
        ("AAMMAAMMAA", 26_132_736),
        ("MAMMAMMMA", 26_217_984),
        ("AMAMAMAM", 24_951_552),
        ("MAMAMAMA", 24_951_552),
        ("AMMMMMMA", 25_627_392),
        ("AAMMMMAA", 24_951_552),
        ("AMMMMMA", 24_698_880),
        ("MMMMAAAA", 24_951_552),
        ("MMMMAAA", 24_360_960),
        ("AAAAMMMM", 24_951_552),
        ("MMMMMMMM", 26_303_232),
        ("AAAAAAAA", 23_599_872),
    ],
)
def test_the_twelve_published_patterns_have_the_published_size(pattern, total):
    """What that study called Mamba has no recurrence: it is the gated short convolution (facts, seeds 3.4)."""
    bound = {"M": {"mixer": "gated_short_convolution"}}
    settings = {"norm": "layernorm", "mlp": "none", "positions": "nope", "mixers": bound}
    published = ModelConfig.parse({"pattern": pattern, "width": 384, "heads": 8, **settings}, "model")
    assert count_parameters(published, 49_152).total == total
    assert total == 18_874_368 + 768 + pattern.count("A") * 590_592 + pattern.count("M") * 928_512


@pytest.mark.parametrize("pattern", PATTERNS)
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


# What the counter sees of one layer per token beyond our formula, less what it does not see: it takes causal products
# as dense, and knows only matrix products (facts, 5.6, for the formulas).
BEYOND = {
    "A": lambda mixer, context: 2 * context * mixer.heads * mixer.head_dim,
    # A window of the whole context here; test_sliding_window.py has the narrow ones.
    "S": lambda mixer, context: 2 * context * mixer.heads * mixer.head_dim,
    "M": lambda mixer, context: (
        min(mixer.settings.chunk, context) * (mixer.settings.state + mixer.inner) - 2 * mixer.conv_weight.numel()
    ),
    "G": lambda mixer, context: 0,
    "L": lambda mixer, context: 0,
    "D": lambda mixer, context: (
        min(mixer.settings.chunk, context) * (3 * mixer.keys + 2 * mixer.values) - 2 * mixer.conv_weight.numel()
    ),
    # Of its scan only reading the state is a product.
    "m": lambda mixer, context: -mixer.inner * (5 * mixer.settings.mamba1_state + 3) - 2 * mixer.conv_weight.numel(),
    "C": lambda mixer, context: -2 * mixer.conv_weight.numel(),
}


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("settings", [{}, {"kv_heads": 2, "tied": False}, {"mlp": "gelu", "chunk": 32}])
def test_flops_equal_the_counter(pattern, settings):
    context, vocab = 128, 50
    wanted = config(pattern, **settings)
    model = LanguageModel(wanted, vocab)
    in_place = {
        torch.ops.aten.addmm_: lambda _, a, b, **kwargs: mm_flop(a, b),
        torch.ops.aten.baddbmm_: lambda _, a, b, **kwargs: bmm_flop(a, b),
    }
    # The counter does not know the CPU's fused attention; the plain kernel is made of products that it knows.
    counting = FlopCounterMode(display=False, custom_mapping=in_place)
    with sdpa_kernel(SDPBackend.MATH), counting as counter, torch.no_grad():
        model.logits(model(torch.zeros(1, context, dtype=torch.long))[0])
    beyond = 0.0
    for block in model.blocks:
        mixers = block.mixer.branches if len(block.letter) > 1 else [block.mixer]
        beyond += sum(BEYOND[letter](m, context) for letter, m in zip(letters_of(block.letter), mixers, strict=True))
    ours = budget.forward_flops_per_token(wanted, vocab, context)
    assert counter.get_total_flops() / context == pytest.approx(ours + beyond, rel=0.02)


def test_training_is_three_forwards():
    assert budget.training_flops_per_token(config("AMG"), 50, 64) == 3 * budget.forward_flops_per_token(
        config("AMG"), 50, 64
    )


@pytest.mark.parametrize("pattern", PATTERNS)
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


def test_decoding_reads_every_weight_once_and_the_state():
    settings, vocab, context = config("AM", tied=False), 500, 1000
    model = LanguageModel(settings, vocab)
    read = sum(p.numel() for name, p in model.named_parameters() if not name.startswith("embedding")) + settings.width
    kept = sum(getattr(model.blocks[1].mixer, name).numel() for name in model.blocks[1].mixer.fp32)
    attention, mamba = (budget.state_bytes(config(letter), context, torch.bfloat16) for letter in "AM")
    one_entry = budget.state_bytes(config("A"), 1, torch.bfloat16)
    moved = 2 * read + 2 * kept + attention + one_entry + 2 * mamba
    assert budget.decode_bytes_per_token(settings, vocab, context) == moved
    # A tied embedding is read in full, as the head.
    assert budget.decode_bytes_per_token(config("AM"), vocab, context) == moved


def test_decode_bytes_grow_with_the_context_where_a_cache_does():
    def at(pattern: str, context: int) -> int:
        return budget.decode_bytes_per_token(config(pattern), 500, context, torch.float32)

    assert at("M", 100) == at("M", 100_000)
    assert at("A", 300) - at("A", 200) == 100 * 2 * 64 * 4
    assert at("[AM]", 300) - at("[AM]", 200) == 100 * 2 * 64 * 4
