"""Matching reaches its target, or says which bound stopped it and what is in reach."""

from __future__ import annotations

import itertools

import pytest

from longspan.foundation.errors import UserError
from longspan.foundation.randomness import numpy_generator
from longspan.models.budget import count_parameters
from longspan.models.language_model import ModelConfig
from longspan.models.matching import QUANTITIES, MatchConfig, Matched, match
from longspan.models.mixers import registered

SMALL = {"width": 64, "heads": 4, "state": 16, "mamba_head_dim": 16, "delta_head_dim": 16}
LETTERS = sorted(registered())
TWELVE = [
    "AAMMAAMMAA",
    "MAMMAMMMA",
    "AMAMAMAM",
    "MAMAMAMA",
    "AMMMMMMA",
    "AAMMMMAA",
    "AMMMMMA",
    "MMMMAAAA",
    "MMMMAAA",
    "AAAAMMMM",
    "MMMMMMMM",
    "AAAAAAAA",
]


def config(pattern: str, **settings: object) -> ModelConfig:
    return ModelConfig.parse({"pattern": pattern, **SMALL, **settings}, "model")


def deep_patterns(number: int) -> list[str]:
    """1 to 24 layers of any letters, some of them side by side."""
    generator = numpy_generator(0, "matching")
    layers = [*LETTERS * 4, *(f"[{a}{b}]" for a, b in itertools.combinations_with_replacement(LETTERS, 2))]
    return ["".join(generator.choice(layers, length)) for length in generator.integers(1, 25, number)]


def check(matched: Matched, quantity: str, vocab_size: int) -> None:
    """Within half a percent, and the numbers say what the configuration is."""
    assert abs(matched.residual) <= 0.005
    assert matched.residual == matched.reached / matched.target - 1
    if "parameters" in quantity:
        counted = count_parameters(matched.config, vocab_size)
        assert matched.reached == (counted.total if quantity == "parameters" else counted.non_embedding)


@pytest.mark.parametrize("pattern", ["MMMM", "AMAM", "GGGG", "AAMG", "(AM)12", "[AM]M", "A[GA]"])
@pytest.mark.parametrize("quantity", QUANTITIES)
def test_match_reaches_the_reference_within_half_a_percent(pattern, quantity):
    wanted = ModelConfig(pattern=pattern, width=256, heads=4, mlp_width=1024)
    reference = "A" * len(wanted.layers())
    matched = match(wanted, MatchConfig(**{quantity: reference}), 4096, 512)
    check(matched, quantity, 4096)
    assert matched.config.model_dump(exclude={"mlp_width"}) == wanted.model_dump(exclude={"mlp_width"})


@pytest.mark.parametrize(
    ("quantity", "pattern"), list(zip(itertools.cycle(QUANTITIES), deep_patterns(20), strict=False))
)
def test_any_pattern_meets_any_target_within_its_bounds(quantity, pattern):
    wanted = ModelConfig(pattern=pattern, width=256, heads=4)
    generator = numpy_generator(0, pattern)
    in_reach = wanted.model_copy(update={"mlp_width": int(generator.integers(50, 4000))})
    cost = match(in_reach, MatchConfig(**{quantity: pattern}), 4096, 512).target
    target = int(cost * (1 + generator.uniform(0, 0.002)))
    check(match(wanted, MatchConfig(**{quantity: target}), 4096, 512), quantity, 4096)


@pytest.mark.parametrize(("quantity", "pattern"), list(zip(QUANTITIES, deep_patterns(4), strict=True)))
def test_a_target_out_of_reach_names_the_bound(quantity, pattern):
    wanted = ModelConfig(pattern=pattern, width=256, heads=4)
    for target, bound in ((10_000, "cannot be below 1 "), (10**14, "cannot be above 1,048,576 ")):
        with pytest.raises(UserError) as caught:
            match(wanted, MatchConfig(**{quantity: target}), 4096, 512)
        assert f"mlp_width {bound}" in caught.value.given


@pytest.mark.parametrize("pattern", TWELVE)
@pytest.mark.parametrize(
    "target", [{"non_embedding_parameters": 10_000_000}, {"training_flops_per_token": "M8", "context": 512}]
)
def test_the_twelve_patterns_of_the_earlier_study_agree_in_size_and_in_training_flops(pattern, target):
    wanted = ModelConfig(pattern=pattern, width=384, heads=8, state=64)
    matched = match(wanted, MatchConfig.parse(target, "match"), 49_152)
    check(matched, next(iter(target)), 49_152)
    assert matched.config.hidden % 8 == 0


@pytest.mark.parametrize("pattern", TWELVE)
def test_seven_million_is_less_than_three_of_them_have_before_any_mlp(pattern):
    wanted = ModelConfig(pattern=pattern, width=384, heads=8, state=64)
    to = MatchConfig(non_embedding_parameters=7_200_000)
    if pattern in ("AAMMAAMMAA", "MAMMAMMMA", "MMMMMMMM"):
        with pytest.raises(UserError, match=r"mlp_width cannot be below 1 .* everything but the MLPs already exceeds"):
            match(wanted, to, 49_152)
    else:
        check(match(wanted, to, 49_152), "non_embedding_parameters", 49_152)


def test_the_reference_matches_itself_unchanged():
    wanted = ModelConfig(pattern="AAAA", width=256, heads=4)
    matched = match(wanted, MatchConfig(non_embedding_parameters="A4"), 4096)
    assert matched.config == wanted
    assert matched.residual == 0


def test_match_takes_the_largest_step_that_is_good_enough():
    def width(**settings: object) -> int:
        return match(config("MM", width=128), MatchConfig(parameters="AA", **settings), 500).config.mlp_width

    assert width(tolerance=0.2) % 64 == 0
    assert width(tolerance=0.003) % 64 != 0
    assert width(tolerance=0.02, step=24) % 24 == 0


def test_a_step_that_is_asked_for_is_kept_or_refused():
    def settings(**more: object) -> MatchConfig:
        return MatchConfig(non_embedding_parameters="AA", tolerance=0.0003, **more)

    assert match(config("MM", width=128), settings(), 500).config.mlp_width % 8
    with pytest.raises(UserError, match=r"mlp_width grows in steps of 8 .*step 8.*too coarse"):
        match(config("MM", width=128), settings(step=8), 500)


def test_match_frees_width_and_depth():
    wide = match(config("AM"), MatchConfig(parameters=1_000_000, free="width", tolerance=0.05), 500)
    assert wide.config.width % 8 == 0
    assert abs(wide.residual) <= 0.05
    deep = match(config("AM"), MatchConfig(non_embedding_parameters="(AM)6", free="depth"), 500)
    assert len(deep.config.layers()) == 12
    assert deep.residual == 0
    apart = match(config("[AM]"), MatchConfig(training_flops_per_token="[AM]70", context=64, free="depth"), 500)
    assert len(apart.config.layers()) == 70


def test_costs_are_matched_at_the_context_that_is_named_or_trained():
    def width(context: int | None, trained: int | None) -> int | None:
        settings = MatchConfig(training_flops_per_token="AAAA", context=context, tolerance=0.001)
        return match(config("MMMM"), settings, 500, trained).config.mlp_width

    assert width(4096, 512) == width(None, 4096) == width(4096, None)
    assert width(4096, None) > width(512, None)
    with pytest.raises(UserError, match="without a context"):
        width(None, None)


def test_bytes_depend_on_the_dtype_of_the_caches():
    def width(dtype: str) -> int | None:
        settings = MatchConfig(decode_bytes_per_token="AAAA", context=2048, dtype=dtype, tolerance=0.001)
        return match(config("MMMM", mlp_width=512), settings, 500).config.mlp_width

    assert width("bf16") != width("fp32")


@pytest.mark.parametrize(
    ("settings", "free", "target", "stopped_by", "reach"),
    [
        ({}, "mlp_width", 1000, "mlp_width cannot be below 1 .* everything but the MLPs", "45 times"),
        ({}, "width", 100, r"width cannot be below 8 \(heads and head dimensions\)", "times the target"),
        ({"heads": 8, "mamba_head_dim": 64}, "width", 300_000, "width grows in steps of 32", "%"),
        ({}, "depth", 1000, "depth cannot be below 1 .* one repeat of AM", "times the target"),
        ({}, "depth", 120_000, "depth grows in steps of 1 .repeats of AM", "%"),
        ({}, "depth", 10**12, "depth cannot be above 2,048 .repeats of AM", "%"),
        ({"mlp": "none"}, "mlp_width", 1000, "on a model without MLP", ""),
    ],
)
def test_an_impossible_match_names_the_bound_and_what_is_in_reach(settings, free, target, stopped_by, reach):
    with pytest.raises(UserError, match=stopped_by) as caught:
        match(config("AM", **settings), MatchConfig(non_embedding_parameters=target, free=free), 500)
    if settings != {"mlp": "none"}:
        assert caught.value.allowed.startswith(f"nearest in reach: {free} ")
        assert reach in caught.value.allowed


def test_a_wrong_reference_pattern_is_named():
    with pytest.raises(UserError, match=r"match\.parameters: .*'A\[A': this bracket is never closed"):
        match(config("AM"), MatchConfig(parameters="A[A"), 500)


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        ({}, "no target"),
        ({"parameters": 5, "training_flops_per_token": 5}, "the targets parameters and training_flops_per_token"),
        ({"parameters": 0}, "parameters = 0"),
        ({"decode_bytes_per_token": -1.0}, "decode_bytes_per_token = -1"),
        ({"parameters": 5, "context": 64}, "with `context`"),
        ({"training_flops_per_token": "AA", "dtype": "fp32"}, "with `dtype`"),
        ({"parameters": 5, "free": "depth", "step": 8}, "step = 8"),
    ],
)
def test_a_match_has_one_positive_target_and_nothing_without_effect(given, problem):
    with pytest.raises(UserError) as caught:
        MatchConfig.parse(given, "study.match")
    assert caught.value.given.startswith("study.match")
    assert problem in caught.value.given
