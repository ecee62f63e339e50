"""Checkpoints that others wrote are read as they compute, and nothing in them is ignored unseen."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from longspan.foundation.errors import DataError, UserError
from longspan.foundation.randomness import torch_generator
from longspan.models.budget import count_parameters
from longspan.models.interchange import read_config, read_folder

from .conftest import VOCAB, batch, case, logits

WIDE = {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2}
LLAMA = {**WIDE, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
GRANITE = {
    **LLAMA, "shared_intermediate_size": 40, "num_local_experts": 0, "num_experts_per_tok": 0, "mamba_n_heads": 4,
    "layer_types": ["mamba", "attention"], "mamba_d_head": 16, "mamba_d_state": 8, "mamba_chunk_size": 16,
}  # fmt: skip
MUP = {"embedding_multiplier": 12, "logits_scaling": 8, "residual_multiplier": 0.22, "attention_multiplier": 0.015625}
MAMBA2 = {**WIDE, "num_heads": 4, "head_dim": 16, "n_groups": 1, "state_size": 8, "chunk_size": 16}
NEMOTRON = {
    **WIDE, "layers_block_type": ["linear_attention", "full_attention"], "num_attention_heads": 4, "head_dim": 8,
    "num_key_value_heads": 2, "ssm_state_size": 8, "mamba_num_heads": 4, "mamba_head_dim": 16, "n_groups": 1,
    "chunk_size": 16, "time_step_min": 1e-30,
}  # fmt: skip

OTHERS = {
    "llama": ("Llama", LLAMA),
    "llama tied, scaled": ("Llama", {**LLAMA, "tie_word_embeddings": True, "rope_parameters": LLAMA3}),
    "llama, all heads, biases": (
        "Llama",
        {**LLAMA, "num_key_value_heads": 4, "attention_bias": True, "mlp_bias": True},
    ),
    "granite": ("GraniteMoeHybrid", {**GRANITE, "attention_multiplier": 8**-0.5}),
    "granite with multipliers": ("GraniteMoeHybrid", {**GRANITE, **MUP, "tie_word_embeddings": True}),
    "granite with rope, biases": (
        "GraniteMoeHybrid",
        {**GRANITE, **MUP, "position_embedding_type": "rope", "rope_parameters": LLAMA3, "attention_bias": True},
    ),
    "mamba2": ("Mamba2", MAMBA2),
    "mamba": ("Mamba", {**WIDE, "state_size": 8}),
    "mamba untied, of rank 3": ("Mamba", {**WIDE, "time_step_rank": 3, "expand": 3, "tie_word_embeddings": False}),
    "nemotron": ("NemotronH", NEMOTRON),
}


def initialised_there(kind, settings):
    """A model of transformers with its own random weights, off zeros and ones."""
    transformers = pytest.importorskip("transformers")
    transformers.logging.set_verbosity_error()
    torch.manual_seed(0)
    model = getattr(transformers, f"{kind}ForCausalLM")(getattr(transformers, f"{kind}Config")(**settings)).eval()
    generator = torch_generator(0, "perturb")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
            elif "embed" in name or "lm_head" in name:
                parameter.normal_(0, 1, generator=generator)
    return model


@pytest.mark.parametrize("name", OTHERS)
def test_what_transformers_initialised_and_saved_computes_the_same_here(name, tmp_path):
    other = initialised_there(*OTHERS[name])
    other.save_pretrained(tmp_path)
    model, tokens_BT = read_folder(tmp_path), batch(2, 75)
    with torch.no_grad():
        expected = other(input_ids=tokens_BT, use_cache=False).logits
    assert expected.abs().max() > 2
    assert (logits(model, tokens_BT) - expected).abs().max() <= 1e-4
    assert (logits(model, tokens_BT, 20, 33, *[1] * 22) - expected).abs().max() <= 1e-4


def test_shards_are_read_as_one(tmp_path):
    other = initialised_there("Llama", LLAMA)
    other.save_pretrained(tmp_path / "whole")
    other.save_pretrained(tmp_path / "cut", max_shard_size="10KB")
    assert len(list((tmp_path / "cut").glob("*.safetensors"))) > 5
    whole, cut = read_folder(tmp_path / "whole"), read_folder(tmp_path / "cut")
    assert all(torch.equal(one, two) for one, two in zip(whole.parameters(), cut.parameters(), strict=True))
    next((tmp_path / "cut").glob("*.safetensors")).unlink()
    with pytest.raises(DataError, match=r"index\.json names 'model-"):
        read_folder(tmp_path / "cut")


def test_reading_needs_no_transformers(written):
    code = (
        "import sys; from pathlib import Path; from longspan.models.interchange import read_folder\n"
        f"read_folder(Path({str(written('MAM'))!r}))\n"
        "sys.exit('transformers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path, written):
    """A copy of a written folder, its config.json changed; None takes a key away."""

    def change(name, **changes):
        shutil.copytree(written(name), tmp_path, dirs_exist_ok=True)
        path = tmp_path / "config.json"
        config = {**json.loads(path.read_text()), **changes}
        path.write_text(json.dumps({key: value for key, value in config.items() if value is not ...}))
        return tmp_path

    return change


LINEAR = {"rope_type": "linear", "factor": 2.0}
REFUSED = [
    ("AA", {"model_type": "mistral"}, '`model_type` = "mistral"'),
    ("AA", {"model_type": ...}, "`model_type` is missing"),
    ("AA", {"architectures": ["LlamaForSequenceClassification"]}, '= ["LlamaForSequenceClassification"]'),
    ("AA", {"hidden_act": "gelu"}, '`hidden_act` = "gelu"'),
    ("AA", {"head_dim": 16}, "`head_dim` = 16"),
    ("AA", {"pretraining_tp": 2}, "`pretraining_tp` = 2"),
    ("AA", {"rope_interleaved": True}, "`rope_interleaved` = true"),
    ("AA", {"num_key_value_heads": 3}, "kv_heads = 3"),
    ("AA", {"sliding_window": 4096}, "unknown key `sliding_window` = 4096"),
    ("AA", {"quantization_config": {"bits": 4}}, 'unknown key `quantization_config` = {"bits": 4}'),
    ("AA", {"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, '`rope_scaling` = {"rope_type": "yarn"'),
    ("AA", {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, '"dynamic"'),
    ("AA", {"rope_scaling": {**LINEAR, "attention_factor": 1.2}}, '"attention_factor"'),
    ("AA", {"rope_scaling": {"rope_type": "llama3", "factor": 2.0}}, "incomplete"),
    ("AA", {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, "rope_theta = 10000"),
    ("AA", {"partial_rotary_factor": 0.5}, "`partial_rotary_factor` = 0.5"),
    ("AA", {"hidden_size": "32"}, '`hidden_size` = "32"'),
    ("AA", {"hidden_size": ...}, "`hidden_size` is missing"),
    ("AA", {"mlp_bias": 1}, "`mlp_bias` = 1"),
    ("AA", {"rms_norm_eps": -1}, "`rms_norm_eps` = -1"),
    ("AA", {"tie_word_embeddings": False}, "no tensor `lm_head.weight`"),
    ("AA", {"num_hidden_layers": 1}, "tensor `model.layers.1."),
    ("AA", {"num_hidden_layers": 3}, "no tensor `model.layers.2."),
    ("AA", {"attention_bias": True}, "no tensor `model.layers.0.self_attn.q_proj.bias`"),
    ("AA", {"vocab_size": 100}, "tensor `model.embed_tokens.weight` is (101, 32), config.json says (100, 32)"),
    ("MAM", {"num_local_experts": 8}, "`num_local_experts` = 8"),
    ("MAM", {"num_local_experts": ...}, "`num_local_experts` is missing"),
    ("MAM", {"mamba_n_groups": 8}, "`mamba_n_groups` = 8, groups of B and C"),
    ("MAM", {"mamba_conv_bias": False}, "`mamba_conv_bias` = false"),
    ("MAM", {"mamba_proj_bias": True}, "`mamba_proj_bias` = true"),
    ("MAM", {"mamba_expand": 1.5}, "`mamba_expand` = 1.5"),
    ("MAM", {"mamba_d_head": 8}, "`mamba_d_head` = 8"),
    ("MAM", {"mamba_n_heads": 5}, "`mamba_n_heads` = 5"),
    ("MAM", {"layer_types": ["mamba", "attention"]}, '`layer_types` = ["mamba", "attention"]'),
    ("MAM", {"layer_types": ["mamba", "attention", "sliding_attention"]}, "sliding_attention"),
    ("MAM", {"position_embedding_type": "alibi"}, '`position_embedding_type` = "alibi"'),
    ("MAM", {"time_step_limit": [0.01, 1.0]}, "`time_step_limit` = [0.01, 1.0]"),
    ("MAM", {"shared_intermediate_size": 0}, "`shared_intermediate_size` = 0"),
    ("MAM", {"normalization_function": "layernorm"}, "normalization_function"),
    ("MAM", {"logits_scaling": 0}, "`logits_scaling` = 0"),
    ("MM bare", {"n_groups": 8}, "`n_groups` = 8, groups of B and C"),
    ("MM bare", {"n_groups": ...}, "`n_groups` is missing"),
    ("MM bare", {"num_heads": ...}, "`num_heads` is missing"),
    ("MM bare", {"use_bias": True}, "`use_bias` = true"),
    ("MM bare", {"use_conv_bias": False}, "`use_conv_bias` = false"),
    ("MM bare", {"num_heads": 8}, "`num_heads` = 8"),
    ("MM bare", {"rms_norm": False}, "`rms_norm` = false"),
    ("MM bare", {"time_step_limit": [0.0, 1.0]}, "`time_step_limit`"),
    ("mm", {"intermediate_size": 48}, "`intermediate_size` = 48"),
    ("mm", {"use_bias": True}, "`use_bias` = true"),
    ("MAMA bare", {"time_step_min": 0.001}, "`time_step_min` = 0.001"),
    ("MAMA bare", {"hybrid_override_pattern": "M*M-"}, '`hybrid_override_pattern` = "M*M-"'),
    ("MAMA bare", {"head_dim": 16}, "`head_dim` = 16"),
    ("MAMA bare", {"sliding_window": 8}, "`sliding_window` = 8"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "changes", "said"), REFUSED, ids=[said for _, _, said in REFUSED])
def test_what_cannot_be_honoured_is_refused_by_key_and_value(name, changes, said, folder):
    with pytest.raises(UserError) as refusal:
        read_folder(folder(name, **changes))
    assert said in str(refusal.value)


PUBLISHED = {
    # meta-llama/Llama-3.2-1B
    "A16": (
        1_235_814_400,
        {
            "architectures": ["LlamaForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
            "bos_token_id": 128000, "eos_token_id": 128001, "head_dim": 64, "hidden_act": "silu", "hidden_size": 2048,
            "initializer_range": 0.02, "intermediate_size": 8192, "max_position_embeddings": 131072, "mlp_bias": False,
            "model_type": "llama", "num_attention_heads": 32, "num_hidden_layers": 16, "num_key_value_heads": 8,
            "pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_theta": 500000.0, "tie_word_embeddings": True,
            "rope_scaling": {
                "factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
                "original_max_position_embeddings": 8192, "rope_type": "llama3",
            },
            "torch_dtype": "bfloat16", "transformers_version": "4.45.0.dev0", "use_cache": True, "vocab_size": 128256,
        },
    ),
    # HuggingFaceTB/SmolLM2-135M
    "A30": (
        134_515_008,
        {
            "architectures": ["LlamaForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 0,
            "eos_token_id": 0, "hidden_act": "silu", "hidden_size": 576, "initializer_range": 0.041666666666666664,
            "intermediate_size": 1536, "is_llama_config": True, "max_position_embeddings": 8192, "model_type": "llama",
            "num_attention_heads": 9, "num_hidden_layers": 30, "num_key_value_heads": 3, "pretraining_tp": 1,
            "rms_norm_eps": 1e-05, "rope_interleaved": False, "rope_scaling": None, "rope_theta": 100000,
            "tie_word_embeddings": True, "torch_dtype": "bfloat16", "transformers_version": "4.40.1", "use_cache": True,
            "vocab_size": 49152,
        },
    ),
    # state-spaces/mamba-130m-hf
    "m24": (
        129_135_360,
        {
            "architectures": ["MambaForCausalLM"], "bos_token_id": 0, "conv_kernel": 4, "d_inner": 1536, "d_model": 768,
            "eos_token_id": 0, "expand": 2, "fused_add_norm": True, "hidden_act": "silu", "hidden_size": 768,
            "initializer_range": 0.1, "intermediate_size": 1536, "layer_norm_epsilon": 1e-05, "model_type": "mamba",
            "n_layer": 24, "num_hidden_layers": 24, "pad_token_id": 0, "pad_vocab_size_multiple": 8,
            "rescale_prenorm_residual": False, "residual_in_fp32": True, "rms_norm": True, "ssm_cfg": {},
            "state_size": 16, "time_step_floor": 0.0001, "time_step_init_scheme": "random", "time_step_max": 0.1,
            "time_step_min": 0.001, "time_step_rank": 48, "time_step_scale": 1.0, "torch_dtype": "float32",
            "transformers_version": "4.39.0.dev0", "use_bias": False, "use_cache": True, "use_conv_bias": True,
            "vocab_size": 50280,
        },
    ),
    # AntonV/mamba2-780m-hf
    "M48": (
        780_161_280,
        {
            "chunk_size": 256, "conv_kernel": 4, "expand": 2, "head_dim": 64, "hidden_act": "silu", "hidden_size": 1536,
            "layer_norm_epsilon": 1e-05, "model_type": "mamba2", "n_groups": 1, "num_heads": 48,
            "num_hidden_layers": 48, "residual_in_fp32": True, "rms_norm": True, "state_size": 128,
            "tie_word_embeddings": True, "time_step_limit": [0.0, "Infinity"], "use_bias": False,
            "use_conv_bias": True, "vocab_size": 50288,
        },
    ),
}  # fmt: skip
"""pattern -> parameters and keys of config.json, as published; the parameters of M48 are counted from its shapes."""


@pytest.mark.parametrize("pattern", PUBLISHED)
def test_published_configurations_are_understood(pattern, tmp_path):
    parameters, values = PUBLISHED[pattern]
    (tmp_path / "config.json").write_text(json.dumps(values))
    config, vocab_size = read_config(tmp_path)
    assert config.pattern == pattern
    assert count_parameters(config, vocab_size).total == parameters


# Keys of published checkpoints, each with the values it has there.
HARMLESS = [
    ("AA", {"use_cache": True, "transformers_version": "4.43.0", "torch_dtype": "bfloat16", "pretraining_tp": 1}),
    ("AA", {"eos_token_id": [1, 2], "initializer_range": 0.02, "rope_scaling": None, "_name_or_path": "x"}),
    ("AA", {"rope_theta": ..., "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"}}),
    ("MAM", {"init_method": "mup", "normalization_function": "rmsnorm", "router_aux_loss_coef": 0.01}),
    ("MAM", {"layer_types": ["linear_attention", "full_attention", "linear_attention"]}),
    ("MAM", {"time_step_limit": [0.0, float("inf")], "mamba_d_head": "auto", "output_router_logits": False}),
    ("MM bare", {"time_step_limit": [0.0, {"__float__": "Infinity"}], "time_step_rank": 2, "rms_norm": True}),
    ("mm", {"d_inner": 64, "d_model": 32, "n_layer": 2, "ssm_cfg": {}, "fused_add_norm": True, "rms_norm": True}),
    ("mm", {"pad_vocab_size_multiple": 8, "intermediate_size": 64, "time_step_scale": 1.0, "use_mambapy": False}),
]  # fmt: skip


@pytest.mark.parametrize(("name", "changes"), HARMLESS)
def test_what_changes_no_logit_is_let_through(name, changes, folder):
    tokens_BT = batch(1, 20)
    assert torch.equal(logits(read_folder(folder(name, **changes)), tokens_BT), logits(case(name), tokens_BT))


def test_no_tensor_is_ignored(folder, tmp_path):
    file = folder("AA") / "model.safetensors"
    tensors = load_file(file)

    def read_with(**changes):
        save_file({**tensors, **changes}, file)
        return read_folder(tmp_path)

    read_with(**{"lm_head.weight": tensors["model.embed_tokens.weight"].clone()})
    read_with(**{"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(4)})
    with pytest.raises(DataError, match=r"`lm_head.weight` differs from the embedding"):
        read_with(**{"lm_head.weight": tensors["model.embed_tokens.weight"] + 1})
    with pytest.raises(DataError, match=r"`model.layers.0.self_attn.q_norm.weight` is unknown"):
        read_with(**{"model.layers.0.self_attn.q_norm.weight": torch.ones(8)})
    with pytest.raises(UserError, match=r"`model\.norm\.weight` is I8"):
        read_with(**{"model.norm.weight": tensors["model.norm.weight"].to(torch.int8)})


def test_the_oldest_name_of_mambas_embedding_is_known(folder, tmp_path):
    file = folder("mm") / "model.safetensors"
    tensors = load_file(file)
    tensors["backbone.embedding.weight"] = tensors.pop("backbone.embeddings.weight")
    save_file(tensors, file)
    assert torch.equal(read_folder(tmp_path).embedding.weight, case("mm").embedding.weight)


def test_mixed_dtypes_lose_nothing(folder, tmp_path):
    file = folder("MAM") / "model.safetensors"
    tensors = load_file(file)
    save_file({name: t if "norm" in name else t.bfloat16() for name, t in tensors.items()}, file)
    model = read_folder(tmp_path)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert torch.equal(model.norm.weight, case("MAM").norm.weight)
    save_file({name: t.bfloat16() for name, t in tensors.items()}, file)
    kept = {name: p.dtype for name, p in read_folder(tmp_path).named_parameters() if p.dtype == torch.float32}
    assert {name.rpartition(".")[2] for name in kept} == {"A_log", "D", "dt_bias"}


def test_pickles_are_never_opened(folder):
    place = folder("AA")
    (place / "model.safetensors").rename(place / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"pickles only \(pytorch_model.bin\)"):
        read_folder(place)
    (place / "pytorch_model.bin").unlink()
    with pytest.raises(UserError, match="holds no weights"):
        read_folder(place)


def test_damaged_files_are_named(folder, tmp_path):
    place = folder("AA")
    weights = (place / "model.safetensors").read_bytes()
    (place / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    with pytest.raises(DataError, match=r"model.safetensors is not readable"):
        read_folder(place)
    (place / "config.json").write_text("{")
    with pytest.raises(DataError, match=r"config.json is not readable JSON"):
        read_folder(place)
    (place / "config.json").write_text("[]")
    with pytest.raises(DataError, match="holds list"):
        read_folder(place)
    with pytest.raises(UserError, match=r"holds no config.json"):
        read_folder(tmp_path / "nowhere")


def test_an_index_reaches_no_file_outside(folder):
    place = folder("AA")
    (place / "model.safetensors").rename(place.parent / "outside.safetensors")
    (place / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../outside.safetensors"}}))
    with pytest.raises(DataError, match=r"names '../outside.safetensors'"):
        read_folder(place)
    (place / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(DataError, match="is damaged"):
        read_folder(place)
