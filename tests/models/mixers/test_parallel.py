"""A layer of mixers side by side is a learned average of its branches, and an ordinary mixer to everybody else."""

from __future__ import annotations

import pytest
import torch

from longspan.models import budget
from longspan.models.language_model import LanguageModel, ModelConfig
from longspan.models.segments import Segments

SMALL = {"width": 32, "heads": 4, "state": 8, "mamba_head_dim": 16, "mlp_width": 32}


def build(pattern: str, **settings: object) -> LanguageModel:
    return LanguageModel(ModelConfig.parse({"pattern": pattern, **SMALL, **settings}, "model"), 29)


@torch.no_grad()
def test_the_layer_is_the_average_of_its_normalised_branches():
    mixer = build("[AMG]").blocks[0].mixer
    x = torch.randn(2, 11, 32, generator=torch.Generator().manual_seed(0))
    doc = torch.tensor([[0] * 4 + [1] * 7, [2] * 11])
    segments = Segments.build(doc)
    scales = [0.5, -2.0, 3.0]
    expected = torch.zeros_like(x)
    for branch, norm, scale in zip(mixer.branches, mixer.norms, scales, strict=True):
        norm.weight.fill_(scale)
        y, _ = branch(x, segments, None)
        expected += scale * y / (y.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt()
    torch.testing.assert_close(mixer(x, segments, None)[0], expected)


@pytest.mark.parametrize(("pattern", "branches"), [("[AM]", 2), ("[AMG]", 3), ("[AM][AM]", 2)])
def test_scales_start_as_a_plain_average_divided_by_the_residuals(pattern, branches):
    model = build(pattern)
    residuals = 2 * len(model.blocks)
    for block in model.blocks:
        for norm in block.mixer.norms:
            torch.testing.assert_close(norm.weight, torch.full((32,), 1 / branches / residuals**0.5))


def test_every_branch_learns_and_its_recurrence_parameters_are_spared_decay(tokens):
    model = build("[AM]")
    total, _ = model.loss(tokens(1, 12), tokens(1, 12, name="targets"))
    total.backward()
    names = {id(p): name for name, p in model.named_parameters()}
    assert all(p.grad is not None and p.grad.any() for p in model.parameters())
    spared = {names[id(p)] for p in model.parameter_groups(0.1)[1]["params"]}
    mamba, norm = "layers.0.mixer.branches.1", "layers.0.mixer.norms.0.weight"
    assert {f"{mamba}.A_log", f"{mamba}.D", f"{mamba}.dt_bias", f"{mamba}.conv_bias", norm} <= spared
    model.cast(torch.bfloat16)
    kept = {name for name, p in model.named_parameters() if p.dtype == torch.float32}
    assert kept == {f"{mamba}.A_log", f"{mamba}.D", f"{mamba}.dt_bias"}


def test_equal_letters_side_by_side_have_weights_of_their_own():
    first, second = build("[AA]").blocks[0].mixer.branches
    assert not torch.equal(first.qkv_proj.weight, second.qkv_proj.weight)


def test_letters_are_bound_inside_brackets_too(tokens):
    settings = {"mixers": {"B": {"mixer": "attention", "positions": "nope", "heads": 2}, "M": {"state": 4}}}
    model = build("[BM]A", **settings)
    inside, mamba = model.blocks[0].mixer.branches
    assert (inside.settings.positions, inside.heads, mamba.settings.state) == ("nope", 2, 4)
    assert model.blocks[1].mixer.settings.positions == "rope"
    assert model.config.describe_mixers() == "1 [attention+mamba2], 1 attention"
    assert ModelConfig.parse(model.config.model_dump(mode="json"), "model") == model.config
    model(tokens(1, 5))


def test_what_it_costs_is_what_its_branches_cost():
    def cost(pattern: str) -> tuple[float, ...]:
        mixer = build(pattern).blocks[0].mixer
        return (mixer.flops(64), mixer.state_bytes(64, 4), mixer.decode_bytes(64, 4))

    together, attention, mamba = cost("[AM]"), cost("A"), cost("M")
    assert together == tuple(a + m for a, m in zip(attention, mamba, strict=True))
    # One entry of a cache is written, a recurrent state is read and written.
    keys_and_values = 2 * 32 * 4
    assert attention[2] == 65 * keys_and_values
    assert mamba[2] == 2 * mamba[1]


def test_isolation_reaches_what_the_branches_are():
    isolated = {p: build(p).blocks[0].mixer.isolated_as for p in ("[AA]", "[MG]", "[AM]")}
    assert isolated == {"[AA]": "attention", "[MG]": "state", "[AM]": "both"}


def test_widths_suit_every_branch():
    config = ModelConfig.parse({"pattern": "[AM]", **SMALL, "heads": 3, "width": 48, "mamba_head_dim": 32}, "model")
    mixer, settings = config.mixer("[AM]")
    assert mixer.width_step(settings) == 48
    assert budget.count_parameters(config, 29).total == sum(p.numel() for p in LanguageModel(config, 29).parameters())
