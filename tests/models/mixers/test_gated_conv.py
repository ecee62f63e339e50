"""The layer without recurrence is the one that an earlier project ran, and sees what its convolution sees."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from longspan.foundation.randomness import torch_generator
from longspan.models import budget
from longspan.models.budget import count_parameters
from longspan.models.language_model import LanguageModel, ModelConfig
from longspan.models.mixers.gated_conv import GatedShortConvolution, GatedShortConvolutionSettings
from longspan.models.segments import Segments

VOCAB = 50


def build(width=16, seed=0, **settings: object) -> GatedShortConvolution:
    mixer = GatedShortConvolution(width, GatedShortConvolutionSettings(**settings))
    mixer.init_weights(torch_generator(seed, "weights"))
    return mixer


def random(*shape: int, name: object = 0) -> Tensor:
    return torch.randn(*shape, generator=torch_generator(0, "inputs", name))


def forward(mixer: GatedShortConvolution, x_BTD: Tensor) -> Tensor:
    return mixer(x_BTD, Segments.build(None, shape=x_BTD.shape[:2]), None)[0]


def token_by_token(mixer: GatedShortConvolution, u_BTD: Tensor) -> Tensor:
    """The earlier project's formula, written out with its (inner, N) "states" of one token at a time."""
    inner, features = mixer.A.shape
    taps = mixer.conv_weight.shape[1]
    outputs = []
    for t in range(u_BTD.shape[1]):
        z = (u_BTD[:, t] @ mixer.in_proj.weight.T)[:, inner:]
        x = torch.zeros_like(z)
        for k in range(min(taps, t + 1)):
            x = x + mixer.conv_weight[:, taps - 1 - k] * (u_BTD[:, t - k] @ mixer.in_proj.weight.T)[:, :inner]
        x = F.layer_norm(F.silu(x), (inner,), mixer.norm.weight, mixer.norm.bias, mixer.norm.eps)
        delta, b, c = (x @ mixer.x_proj.weight.T).split([1, features, features], dim=-1)
        delta = F.softplus(delta).clamp(1e-6, 10)
        rates = -(F.softplus(mixer.A).clamp(0.1, 10))
        decay = torch.exp(delta[:, :, None] * rates).clamp(1e-6, 1.0)
        states = x[:, :, None] * b[:, None] * decay
        y = (states * c[:, None]).sum(-1) + x * mixer.D
        outputs.append((y * F.silu(z)) @ mixer.out_proj.weight.T)
    return torch.stack(outputs, 1)


@pytest.mark.parametrize("scale", [1.0, 30.0])
def test_equals_the_published_formula_in_values_and_gradients(scale):
    """A large x_proj drives the step into both of its bounds, and decays below the floor."""
    mixer = build(conv=3, feature_state=5)
    with torch.no_grad():
        mixer.x_proj.weight.mul_(scale)
        mixer.A.mul_(30.0)
        mixer.norm.bias.add_(0.1 * random(mixer.inner))
        mixer.D.add_(random(mixer.inner, name="D"))
    x = random(2, 17, 16).requires_grad_()
    results = []
    for function in (forward, token_by_token):
        y = function(mixer, x)
        leaves = [x, *mixer.parameters()]
        results.append([y, *torch.autograd.grad((y * random(*y.shape, name="weights")).sum(), leaves)])
    assert results[0][0].abs().max() > 0.1
    for one, other in zip(*results, strict=True):
        assert (one - other).abs().max() <= 1e-5 * other.abs().max().clamp_min(1.0)


def test_has_the_published_size():
    """928,512 with its norm; eight of them made the earlier baseline of 26,303,232 parameters."""
    settings = {"width": 384, "heads": 8, "norm": "layernorm", "mlp": "none", "positions": "nope"}
    config = ModelConfig.parse({"pattern": "C8", **settings}, "model")
    counted = count_parameters(config, 49_152)
    assert counted.mixers // 8 + 768 == 928_512
    assert counted.non_embedding - 768 == 8 * 928_512
    assert counted.total == 26_303_232
    bound = ModelConfig.parse(
        {"pattern": "AM", "mixers": {"M": {"mixer": "gated_short_convolution"}}, **settings}, "model"
    )
    assert count_parameters(bound, 49_152).non_embedding == 590_592 + 928_512 + 768


@pytest.mark.parametrize("conv", [2, 4, 7])
@pytest.mark.parametrize("layers", [1, 3])
def test_reach_is_exactly_the_convolution_s(conv, layers, tokens):
    config = ModelConfig(pattern="C" * layers, width=16, conv=conv, mlp="swiglu", mlp_width=16)
    model, before = LanguageModel(config, VOCAB), tokens(1, 30)
    after = torch.where(torch.arange(30) == 2, (before + 7) % VOCAB, before)
    with torch.no_grad():
        changed = (model(before)[0] != model(after)[0]).any(-1)[0]
    assert changed.nonzero().flatten().tolist() == list(range(2, 2 + layers * (conv - 1) + 1))


def test_pytorch_init_is_kept_while_all_else_is_normal():
    """The earlier project put these layers in after its N(0, 0.02): in_proj has a deviation of 0.0295 there."""
    shared = {"pattern": "AC[AC]", "width": 384, "heads": 8, "init": "normal"}
    kept = LanguageModel(ModelConfig.parse({**shared, "mixers": {"C": {"pytorch_init": True}}}, "model"), VOCAB)
    rewritten = LanguageModel(ModelConfig.parse(shared, "model"), VOCAB)
    for model, deviations in ((kept, (0.0295, 0.0208)), (rewritten, (0.02, 0.02))):
        attention, own, pair = (block.mixer for block in model.blocks)
        for mixer in (own, pair.branches[1]):
            assert mixer.in_proj.weight.std().item() == pytest.approx(deviations[0], abs=3e-4)
            assert mixer.out_proj.weight.std().item() == pytest.approx(deviations[1], abs=3e-4)
        for linear in (attention.out_proj, pair.branches[0].out_proj, model.blocks[1].mlp.input_linear):
            assert linear.weight.std().item() == pytest.approx(0.02, abs=3e-4)
        assert own.A.std().item() == pytest.approx(0.1, abs=3e-3)
        assert own.conv_weight.abs().max() <= 0.5
        assert bool((own.D == 1).all())


def test_its_own_init_is_scaled_where_it_writes_into_the_residual_stream():
    model = LanguageModel(ModelConfig(pattern="C4", width=384, mlp="none"), VOCAB)
    assert model.blocks[0].mixer.in_proj.weight.std().item() == pytest.approx(0.0295, abs=3e-4)
    assert model.blocks[0].mixer.out_proj.weight.std().item() == pytest.approx(0.0208 / 2, abs=3e-4)


def test_rates_and_skips_have_no_weight_decay_and_stay_in_fp32():
    model = LanguageModel(ModelConfig(pattern="C", width=16), VOCAB)
    spared = {id(p) for p in model.parameter_groups(0.1)[1]["params"]}
    mixer = model.blocks[0].mixer
    assert {id(p) for p in (mixer.A, mixer.D, mixer.norm.weight, mixer.norm.bias)} <= spared
    assert not {id(p) for p in (mixer.in_proj.weight, mixer.conv_weight, mixer.x_proj.weight)} & spared
    model.cast(torch.bfloat16)
    assert mixer.A.dtype == mixer.D.dtype == torch.float32
    with torch.no_grad():
        assert model(torch.zeros(1, 5, dtype=torch.long))[0].dtype == torch.bfloat16


@pytest.mark.parametrize("conv", [2, 4])
def test_state_bytes_are_those_of_the_tail_at_every_context(conv, tokens):
    config = ModelConfig(pattern="C", width=16, conv=conv)
    model = LanguageModel(config, VOCAB)
    with torch.no_grad():
        state = model.initial_state()
        for length in (20, 1, 12):
            _, state = model(tokens(1, length), None, state)
            assert state.bytes() == budget.state_bytes(config, state.length) == (conv - 1) * 32 * 4


def test_flops_equal_the_counter():
    mixer, context = build(64, feature_state=9), 40
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        forward(mixer, random(1, context, 64))
    # The counter knows no convolution here.
    assert counter.get_total_flops() / context == mixer.flops(context) - 2 * mixer.conv_weight.numel()
