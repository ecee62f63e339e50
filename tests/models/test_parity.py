"""The same weights give the same logits as transformers' Llama, Mistral and Mamba-2, at random and at long inputs."""

from __future__ import annotations

import pytest
import torch

from longspan.foundation.randomness import torch_generator
from longspan.models.language_model import LanguageModel, ModelConfig

transformers = pytest.importorskip("transformers")
VOCAB = 101
LENGTHS = (1, 37, 1500)


@torch.no_grad()
def model_of(config: ModelConfig) -> LanguageModel:
    """Norm weights, biases and D away from one and zero, so that a swapped or missing one shows, and large logits."""
    model, generator = LanguageModel(config, VOCAB, 3), torch_generator(0, "perturb")
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    model.head_weight.mul_(10)
    return model


def llama_weights(model: LanguageModel) -> dict[str, torch.Tensor]:
    weights = {"model.embed_tokens.weight": model.embedding.weight, "model.norm.weight": model.norm.weight}
    weights["lm_head.weight"] = model.head_weight
    for i, block in enumerate(model.blocks):
        attention, mlp, prefix = block.mixer, block.mlp, f"model.layers.{i}"
        rows = [heads * attention.head_dim for heads in (attention.heads, attention.kv_heads, attention.kv_heads)]
        for kind in ("weight", "bias") if attention.settings.attention_bias else ("weight",):
            for name, part in zip("qkv", getattr(attention.qkv_proj, kind).split(rows), strict=True):
                weights[f"{prefix}.self_attn.{name}_proj.{kind}"] = part
            weights[f"{prefix}.self_attn.o_proj.{kind}"] = getattr(attention.out_proj, kind)
        gate, up = mlp.input_linear.weight.chunk(2)
        weights |= {f"{prefix}.mlp.gate_proj.weight": gate, f"{prefix}.mlp.up_proj.weight": up}
        weights[f"{prefix}.mlp.down_proj.weight"] = mlp.output_linear.weight
        weights[f"{prefix}.input_layernorm.weight"] = block.mixer_norm.weight
        weights[f"{prefix}.post_attention_layernorm.weight"] = block.mlp_norm.weight
    return weights


def mamba2_weights(model: LanguageModel) -> dict[str, torch.Tensor]:
    weights = {"backbone.embeddings.weight": model.embedding.weight, "backbone.norm_f.weight": model.norm.weight}
    weights["lm_head.weight"] = model.head_weight
    for i, block in enumerate(model.blocks):
        mixer, prefix = block.mixer, f"backbone.layers.{i}"
        weights[f"{prefix}.norm.weight"] = block.mixer_norm.weight
        weights |= {f"{prefix}.mixer.{name}": getattr(mixer, name) for name in ("A_log", "D", "dt_bias")}
        weights |= {f"{prefix}.mixer.{n}.weight": getattr(mixer, n).weight for n in ("in_proj", "norm", "out_proj")}
        weights[f"{prefix}.mixer.conv1d.weight"] = mixer.conv_weight[:, None]
        weights[f"{prefix}.mixer.conv1d.bias"] = mixer.conv_bias
    return weights


def assert_same_logits(model: LanguageModel, reference: torch.nn.Module, draw) -> None:
    for length in LENGTHS:
        batch = draw(2 if length < 1000 else 1, length, vocab=VOCAB)
        with torch.no_grad():
            ours = model.logits(model(batch)[0])
            theirs = reference(input_ids=batch, use_cache=False).logits
        assert theirs.abs().max() > 0.3
        assert (ours - theirs).abs().max() <= 1e-4, length


@pytest.mark.parametrize(("kv_heads", "bias", "tied"), [(4, False, False), (2, True, True)])
def test_attention_equals_llama(kv_heads, bias, tied, tokens):
    config = ModelConfig(
        pattern="AA", width=32, heads=4, kv_heads=kv_heads, attention_bias=bias, mlp_width=48, tied=tied, rope_base=5e4
    )
    model = model_of(config)
    reference = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=VOCAB,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=kv_heads,
            attention_bias=bias,
            rms_norm_eps=1e-5,
            rope_theta=5e4,
            max_position_embeddings=4096,
            tie_word_embeddings=tied,
        )
    ).eval()
    reference.load_state_dict(llama_weights(model))
    assert_same_logits(model, reference, tokens)


@pytest.mark.parametrize(("window", "kv_heads"), [(1, 4), (16, 2), (4096, 2)])
def test_sliding_window_attention_equals_mistral(window, kv_heads, tokens):
    config = ModelConfig(pattern="SS", width=32, heads=4, kv_heads=kv_heads, window=window, mlp_width=48, tied=False)
    model = model_of(config)
    reference = transformers.MistralForCausalLM(
        transformers.MistralConfig(
            vocab_size=VOCAB,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=kv_heads,
            head_dim=8,
            sliding_window=window,
            rms_norm_eps=1e-5,
            max_position_embeddings=4096,
        )
    ).eval()
    reference.load_state_dict(llama_weights(model))
    assert_same_logits(model, reference, tokens)
    # Two layers see the first token as long as both windows reach, in either model.
    batch = tokens(1, 60, vocab=VOCAB)
    other = torch.where(torch.arange(60) == 0, (batch + 7) % VOCAB, batch)
    with torch.no_grad():
        ours = model(batch)[0] - model(other)[0]
        theirs = reference(input_ids=batch).logits - reference(input_ids=other).logits
    for felt in (ours, theirs):
        assert (felt.abs().amax((0, 2)) > 0).tolist() == [t <= 2 * (window - 1) for t in range(60)]


@pytest.mark.parametrize("tied", [False, True])
def test_mamba2_equals_transformers_mamba2(tied, tokens):
    config = ModelConfig(pattern="MM", width=32, state=16, mamba_head_dim=16, chunk=32, mlp="none", tied=tied)
    model = model_of(config)
    reference = transformers.Mamba2ForCausalLM(
        transformers.Mamba2Config(
            vocab_size=VOCAB,
            hidden_size=32,
            state_size=16,
            head_dim=16,
            num_heads=4,
            expand=2,
            conv_kernel=4,
            n_groups=1,
            num_hidden_layers=2,
            chunk_size=64,
            layer_norm_epsilon=1e-5,
            tie_word_embeddings=tied,
            use_bias=False,
            use_conv_bias=True,
            rms_norm=True,
        )
    ).eval()
    reference.load_state_dict(mamba2_weights(model))
    assert_same_logits(model, reference, tokens)
