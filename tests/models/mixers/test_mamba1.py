"""Mamba-1 is the authors': the logits of transformers' Mamba, its initialisation, its costs."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from longspan.foundation.errors import UserError
from longspan.foundation.randomness import torch_generator
from longspan.models import budget
from longspan.models.language_model import LanguageModel, ModelConfig

VOCAB = 101


def config(pattern: str = "m", **settings: object) -> ModelConfig:
    return ModelConfig.parse({"pattern": pattern, "width": 32, "heads": 2, **settings}, "model")


def transformers_weights(model: LanguageModel) -> dict[str, torch.Tensor]:
    weights = {"backbone.embeddings.weight": model.embedding.weight, "backbone.norm_f.weight": model.norm.weight}
    weights["lm_head.weight"] = model.head_weight
    for i, block in enumerate(model.blocks):
        mixer, prefix = block.mixer, f"backbone.layers.{i}"
        weights[f"{prefix}.norm.weight"] = block.mixer_norm.weight
        weights |= {f"{prefix}.mixer.{name}": getattr(mixer, name) for name in ("A_log", "D")}
        linears = ("in_proj", "x_proj", "dt_proj", "out_proj")
        weights |= {f"{prefix}.mixer.{name}.weight": getattr(mixer, name).weight for name in linears}
        weights[f"{prefix}.mixer.dt_proj.bias"] = mixer.dt_bias
        weights[f"{prefix}.mixer.conv1d.weight"] = mixer.conv_weight[:, None]
        weights[f"{prefix}.mixer.conv1d.bias"] = mixer.conv_bias
    return weights


@pytest.mark.parametrize(
    ("tied", "settings"),
    [(True, {}), (False, {"mamba1_state": 5, "expand": 3, "conv": 3, "dt_rank": 7})],
)
def test_logits_equal_transformers_mamba(tied, settings, tokens):
    transformers = pytest.importorskip("transformers")
    model = LanguageModel(config("mm", mlp="none", tied=tied, mixers={"m": settings}), VOCAB, 3)
    generator = torch_generator(0, "perturb")
    with torch.no_grad():
        # Away from ones, zeros and equal rows, so that a swapped or missing parameter shows.
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1 or name.endswith("A_log"):
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
        model.head_weight.mul_(10)
    reference = transformers.MambaForCausalLM(
        transformers.MambaConfig(
            vocab_size=VOCAB,
            hidden_size=32,
            num_hidden_layers=2,
            state_size=settings.get("mamba1_state", 16),
            expand=settings.get("expand", 2),
            conv_kernel=settings.get("conv", 4),
            time_step_rank=settings.get("dt_rank", "auto"),
            layer_norm_epsilon=1e-5,
            tie_word_embeddings=tied,
        )
    ).eval()
    reference.load_state_dict(transformers_weights(model))
    for length in (1, 37, 1500):
        batch = tokens(2 if length < 1000 else 1, length, vocab=VOCAB)
        with torch.no_grad():
            ours = model.logits(model(batch)[0])
            theirs = reference(input_ids=batch, use_cache=False).logits
        assert theirs.abs().max() > 0.3
        assert (ours - theirs).abs().max() <= 1e-4, length


@pytest.mark.parametrize("init", ["scaled", "normal"])
def test_a_whole_model_starts_with_the_step_sizes_of_the_authors(init):
    model = LanguageModel(config("AmMm", width=64, mamba_head_dim=32, init=init), VOCAB)
    for mixer in (model.blocks[1].mixer, model.blocks[3].mixer):
        dt = F.softplus(mixer.dt_bias)
        assert 1e-3 * 0.999 <= dt.min() < 2e-3
        assert 5e-2 < dt.max() <= 1e-1 * 1.001
        assert torch.allclose(mixer.A_log.exp(), torch.arange(1.0, 17.0).expand(128, 16))
        assert torch.equal(mixer.D, torch.ones(128))
    assert not torch.equal(model.blocks[1].mixer.dt_bias, model.blocks[3].mixer.dt_bias)


def test_projections_start_uniform_and_what_writes_into_the_residual_is_scaled():
    mixer = LanguageModel(config("mm", width=64, mlp="none"), VOCAB).blocks[0].mixer
    bounds = {"in_proj": 64**-0.5, "x_proj": 128**-0.5, "dt_proj": 4**-0.5, "out_proj": 128**-0.5 * 2**-0.5}
    for name, bound in bounds.items():
        largest = getattr(mixer, name).weight.abs().max()
        assert 0.97 * bound < largest <= bound, name
    assert 0.4 < mixer.conv_weight.abs().max() <= 0.5
    assert 0.4 < mixer.conv_bias.abs().max() <= 0.5


def test_decay_vectors_are_spared_weight_decay_and_low_precision():
    model = LanguageModel(config(), VOCAB)
    mixer = model.blocks[0].mixer
    decayed = {id(p) for p in model.parameter_groups(0.1)[0]["params"]}
    assert not decayed & {id(p) for p in (mixer.A_log, mixer.D, mixer.dt_bias, mixer.conv_bias)}
    assert {id(linear.weight) for linear in (mixer.in_proj, mixer.x_proj, mixer.dt_proj, mixer.out_proj)} <= decayed
    model.cast(torch.bfloat16)
    assert {p.dtype for p in (mixer.A_log, mixer.D, mixer.dt_bias)} == {torch.float32}
    assert mixer.in_proj.weight.dtype == torch.bfloat16


def test_the_rank_of_the_step_size_is_a_sixteenth_of_the_width_rounded_up():
    assert LanguageModel(config(width=40), VOCAB).blocks[0].mixer.rank == 3
    assert LanguageModel(config(mixers={"m": {"dt_rank": 5}}), VOCAB).blocks[0].mixer.dt_proj.weight.shape == (64, 5)


def test_flops_are_what_the_counter_sees_and_the_elementwise_part_of_the_scan():
    context, wanted = 128, config(width=64)
    model = LanguageModel(wanted, VOCAB)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.logits(model(torch.zeros(1, context, dtype=torch.long))[0])
    # Matrix products only: reading the state is one, its five other operations and three per channel are not.
    mixer = model.blocks[0].mixer
    unseen = mixer.inner * (5 * 16 + 3) + 2 * mixer.conv_weight.numel()
    ours = budget.forward_flops_per_token(wanted, VOCAB, context)
    assert ours == pytest.approx(counter.get_total_flops() / context + unseen, rel=0.02)


@pytest.mark.parametrize("element", [torch.float32, torch.bfloat16])
def test_state_bytes_equal_what_a_state_holds(element):
    model = LanguageModel(config(mixers={"m": {"mamba1_state": 6, "conv": 3}}), VOCAB).cast(element)
    mixer = model.blocks[0].mixer
    with torch.no_grad():
        state = model.initial_state()
        for length in (20, 1, 12):
            _, state = model(torch.zeros(1, length, dtype=torch.long), None, state)
            assert state.bytes() == mixer.state_bytes(33, element.itemsize) == 64 * (6 * 4 + 2 * element.itemsize)


@pytest.mark.parametrize("element", [torch.float32, torch.bfloat16])
def test_long_chunked_prefill_and_decode_equal_one_pass(element, tokens):
    """Across edges of the scan's chunks, documents included."""
    model = LanguageModel(config("mm"), VOCAB).cast(element)
    batch = tokens(2, 150, vocab=VOCAB)
    doc = torch.stack(
        [(torch.arange(150) >= 33).int(), (torch.arange(150) >= 64).int() + (torch.arange(150) >= 65).int()]
    )
    with torch.no_grad():
        whole, _ = model(batch, doc)
        state, parts = model.initial_state(), []
        for length in (31, 1, 1, 1, 64, 2, 47, 1, 1, 1):
            at = sum(part.shape[1] for part in parts)
            span = slice(at, at + length)
            hidden, state = model(batch[:, span], doc[:, span], state)
            parts.append(hidden)
    tolerance = 1e-5 if element == torch.float32 else 0.1
    assert (torch.cat(parts, 1) - whole).abs().max() <= tolerance


@pytest.mark.parametrize("given", [{"mamba1_state": 0}, {"conv": 1}, {"dt_rank": 0}, {"state": 8}])
def test_settings_out_of_range_or_of_another_mixer_are_refused(given):
    with pytest.raises(UserError, match=r"mixers\.m"):
        config(mixers={"m": given})
