"""Gated DeltaNet is the published layer: transformers' weights give transformers' outputs."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode, bmm_flop

from longspan.foundation.errors import UserError
from longspan.foundation.randomness import torch_generator
from longspan.models import budget
from longspan.models.budget import count_parameters
from longspan.models.language_model import LanguageModel, ModelConfig
from longspan.models.mixers.gated_deltanet import GatedDeltaNet, GatedDeltaNetSettings
from longspan.models.segments import Segments

WIDTH, VOCAB = 32, 50


def build(width=WIDTH, seed=0, **settings: object) -> GatedDeltaNet:
    mixer = GatedDeltaNet(width, GatedDeltaNetSettings(**{"delta_head_dim": 8, "chunk": 16, **settings}))
    mixer.init_weights(torch_generator(seed, "weights"))
    return mixer


def random(*shape: int, name: object = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch_generator(0, "inputs", name))


def forward(mixer: GatedDeltaNet, x_BTD: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return mixer(x_BTD, Segments.build(None, shape=x_BTD.shape[:2]), None)[0]


@pytest.mark.parametrize("expand_v", [1, 2])
def test_equals_qwen3_next(expand_v):
    pytest.importorskip("transformers")
    from transformers.models.qwen3_next import configuration_qwen3_next, modeling_qwen3_next

    mixer = build(expand_v=expand_v, seed=expand_v)
    with torch.no_grad():
        mixer.norm.weight.add_(0.3 * random(*mixer.norm.weight.shape))
    heads, key_dim, value_dim = mixer.heads, 8, 8 * expand_v
    reference = modeling_qwen3_next.Qwen3NextGatedDeltaNet(
        configuration_qwen3_next.Qwen3NextConfig(
            hidden_size=WIDTH,
            linear_num_key_heads=heads,
            linear_num_value_heads=heads,
            linear_key_head_dim=key_dim,
            linear_value_head_dim=value_dim,
            linear_conv_kernel_dim=4,
            rms_norm_eps=mixer.settings.norm_eps,
            hidden_act="silu",
            num_hidden_layers=1,
            layer_types=["linear_attention"],
        ),
        0,
    ).eval()
    sizes = [heads * d for d in (key_dim, key_dim, value_dim, value_dim)] + [heads, heads]
    *qkvz, b, a = (rows.view(heads, -1, WIDTH) for rows in mixer.in_proj.weight.detach().split(sizes))
    reference.load_state_dict(
        {
            # Both of their projections hold the parts of one head side by side.
            "in_proj_qkvz.weight": torch.cat(qkvz, 1).flatten(0, 1),
            "in_proj_ba.weight": torch.cat((b, a), 1).flatten(0, 1),
            "conv1d.weight": mixer.conv_weight.detach()[:, None],
            "A_log": mixer.A_log.detach(),
            "dt_bias": mixer.dt_bias.detach(),
            "norm.weight": mixer.norm.weight.detach(),
            "out_proj.weight": mixer.out_proj.weight.detach(),
        }
    )
    for length in (1, 37, 400):
        x = random(2, length, WIDTH, name=length)
        with torch.no_grad():
            theirs = reference(x)
        assert theirs.abs().max() > 0.1
        assert (forward(mixer, x) - theirs).abs().max() <= 1e-4, length


def test_parameters_are_six_times_the_square_of_the_width():
    mixers = count_parameters(ModelConfig(pattern="D", width=1024, mlp="none"), 10).mixers
    assert mixers / 1024**2 == pytest.approx(6.0, abs=0.05)


def test_starts_with_the_published_decays():
    model = LanguageModel(ModelConfig(pattern="DD", width=256, delta_head_dim=4), VOCAB)
    for block in model.blocks:
        dt = torch.nn.functional.softplus(block.mixer.dt_bias)
        assert 1e-3 <= dt.min() < 2e-3
        assert 5e-2 < dt.max() <= 1e-1 + 1e-6
        assert 0.01 <= block.mixer.A_log.exp().min() < 2
        assert 12 < block.mixer.A_log.exp().max() <= 16
        assert bool((block.mixer.norm.weight == 1).all())


def test_decays_and_norms_have_no_weight_decay_and_stay_in_fp32():
    model = LanguageModel(ModelConfig(pattern="D", width=32, delta_head_dim=8), VOCAB)
    spared = {id(p) for p in model.parameter_groups(0.1)[1]["params"]}
    mixer = model.blocks[0].mixer
    assert {id(p) for p in (mixer.A_log, mixer.dt_bias, mixer.norm.weight)} <= spared
    assert not {id(p) for p in (mixer.in_proj.weight, mixer.conv_weight, mixer.out_proj.weight)} & spared
    model.cast(torch.bfloat16)
    assert mixer.A_log.dtype == mixer.dt_bias.dtype == torch.float32
    assert mixer.in_proj.weight.dtype == torch.bfloat16


def test_bf16_weights_decode_like_one_pass(tokens):
    model = LanguageModel(ModelConfig(pattern="DD", width=32, delta_head_dim=8), VOCAB).cast(torch.bfloat16)
    batch = tokens(2, 20)
    with torch.no_grad():
        whole, _ = model(batch)
        state, parts = model.initial_state(), []
        for part in batch.split([13] + [1] * 7, 1):
            hidden, state = model(part, None, state)
            parts.append(hidden)
    assert whole.dtype == torch.bfloat16
    assert state.layers[0].memory.dtype == torch.float32
    assert (torch.cat(parts, 1).float() - whole.float()).abs().max() <= 0.1


def test_a_negative_eigenvalue_flips_what_a_key_holds():
    """beta = 2 writes v once and, at the same key with value 0, leaves -v: the state changes its sign."""
    positive, negative = build(), build(negative_eigenvalues=True)
    x = random(1, 30, WIDTH)
    assert not torch.equal(forward(positive, x), forward(negative, x))
    b = random(1, 30, 3)
    (_, once), (_, twice) = (mixer._gates(b, b) for mixer in (positive, negative))
    assert torch.equal(2 * once, twice)
    assert 1 < twice.max() < 2


@pytest.mark.parametrize(
    ("width", "head_dim", "words"),
    [
        (192, 64, r"delta_head_dim = 64.*\n.*3/4 width = 144\n.*use one of 24, 36, 48, 72, or set delta_heads"),
        (30, 4, r"width = 30.*\n.*multiple of 4"),
        (8, 64, r"use one of 1, 2, 3, 6"),
    ],
)
def test_a_head_that_does_not_fit_is_refused_with_what_does(width, head_dim, words):
    with pytest.raises(UserError, match=words):
        ModelConfig.parse({"pattern": "D", "width": width, "delta_head_dim": head_dim}, "model")


@pytest.mark.parametrize("head_dim", [1, 4, 6, 9, 64])
def test_the_width_step_is_the_smallest(head_dim):
    settings = GatedDeltaNetSettings(delta_head_dim=head_dim)
    step = GatedDeltaNet.width_step(settings)
    for width in range(1, 2 * step + 1):
        if width % step:
            with pytest.raises(UserError):
                GatedDeltaNet.check(width, settings)
        else:
            GatedDeltaNet.check(width, settings)
    GatedDeltaNet.check(step + 1, GatedDeltaNetSettings(delta_head_dim=head_dim, delta_heads=2))


@pytest.mark.parametrize("settings", [{}, {"delta_heads": 5, "expand_v": 1}, {"conv": 2}])
def test_state_bytes_equal_what_a_state_holds(settings, tokens):
    config = ModelConfig(pattern="D", width=32, delta_head_dim=8, mixers={"D": settings})
    model = LanguageModel(config, VOCAB)
    with torch.no_grad():
        state = model.initial_state()
        for length in (20, 1, 12):
            _, state = model(tokens(1, length), None, state)
    assert state.bytes() == budget.state_bytes(config, 33)


@pytest.mark.parametrize("settings", [{}, {"delta_heads": 5, "expand_v": 1}])
def test_flops_equal_the_counter_up_to_the_causal_half(settings):
    chunk, context = 16, 64
    mixer = build(64, chunk=chunk, **settings)
    # The counter knows baddbmm but not its in-place form.
    in_place = {torch.ops.aten.baddbmm_: lambda _, a, b, **kwargs: bmm_flop(a, b)}
    with FlopCounterMode(display=False, custom_mapping=in_place) as counter:
        forward(mixer, random(1, context, 64))
    # It knows no convolution here, and takes the (chunk, chunk) products as dense: twice the causal half.
    unseen = 2 * mixer.conv_weight.numel()
    causal_half = chunk * (3 * mixer.keys + 2 * mixer.values)
    expected = mixer.flops(context) - unseen + causal_half
    assert counter.get_total_flops() / context == pytest.approx(expected, rel=0.02)
    assert mixer.flops(8) < mixer.flops(16) == mixer.flops(10**6)


def test_columns_of_zeros_change_nothing() -> None:
    mixer = GatedDeltaNet(96, GatedDeltaNetSettings(delta_head_dim=24))
    mixer.init_weights(torch.Generator().manual_seed(0))
    x_BTD = torch.randn(2, 5, 96, generator=torch.Generator().manual_seed(1), requires_grad=True)
    found = []
    for whole in (1, 8):
        parts = mixer._split_projected(mixer._projected(x_BTD, whole))
        gradients = torch.autograd.grad(sum(part.square().sum() for part in parts), (x_BTD, mixer.in_proj.weight))
        found.append((*parts, *gradients))
    assert parts[0].stride(1) % 8 == 0 != sum(part.shape[-1] for part in parts) % 8
    for usual, padded in zip(*found, strict=True):
        torch.testing.assert_close(padded, usual)
