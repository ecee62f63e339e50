"""What is written comes back bit for bit, whole or not at all, and what cannot be written says every reason."""

from __future__ import annotations

import json
import os
import signal

import pytest
import torch
from safetensors.torch import load_file

from longspan.foundation.errors import UserError
from longspan.models.interchange import architecture_of, read_folder, write_folder
from longspan.models.language_model import ModelConfig
from longspan.models.mixers import attention, mamba1, mamba2

from .conftest import CASES, CONTEXT, TINY, batch, build, case, logits

FOLDED = {"MM bare, untied, multiplied", "mm multiplied"}


@pytest.mark.parametrize("name", CASES)
def test_a_round_trip_changes_no_bit(name, written):
    model, back = case(name), read_folder(written(name))
    assert back.config.layers() == model.config.layers()
    tokens_BT = batch(2, 75)
    # Embeddings times 3, or times 4 with the inverse in the norm, are exact in the logits here, not in the weights.
    assert torch.equal(logits(back, tokens_BT), logits(model, tokens_BT))
    parameters = dict(back.named_parameters())
    assert parameters.keys() == dict(model.named_parameters()).keys()
    for parameter_name, parameter in model.named_parameters():
        if name not in FOLDED or parameter_name not in ("embedding.weight", "norm.weight"):
            assert torch.equal(parameters[parameter_name], parameter), parameter_name


@pytest.mark.parametrize("name", ["AA", "MAM", "MM bare", "mm"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_rounded_round_trip_is_the_cast_model(name, dtype, tmp_path):
    model = case(name)
    write_folder(model, tmp_path, context=CONTEXT, dtype=dtype)
    back = read_folder(tmp_path)
    cast = build(name.split()[0], **CASES[name][1]).cast(dtype)
    assert {parameter.dtype for parameter in cast.parameters()} == (
        {dtype, torch.float32} if name[0] != "A" else {dtype}
    )
    for one, other in zip(back.parameters(), cast.parameters(), strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)
    assert {parameter.dtype for parameter in read_folder(tmp_path, dtype=torch.float32).parameters()} == {torch.float32}


def test_the_file_says_what_servers_need(written):
    config = json.loads((written("MAM") / "config.json").read_text())
    assert config["layer_types"] == ["mamba", "attention", "mamba"]
    assert config["attention_multiplier"] == 8**-0.5
    assert config["max_position_embeddings"] == CONTEXT
    assert "time_step_limit" not in config
    tensors = load_file(written("MAM") / "model.safetensors")
    assert tensors["model.layers.0.mamba.conv1d.weight"].shape == (48, 1, 2)
    assert {tensors[f"model.layers.0.mamba.{name}"].dtype for name in ("A_log", "D", "dt_bias")} == {torch.float32}
    assert "lm_head.weight" not in tensors


REFUSED = {
    "AGM": ({}, ["G is gru", "attention (A) and mamba2 (M) in any order"]),
    "AM[AM]": ({}, ["[AM] is [attention+mamba2]"]),
    "SM": ({}, ["S is sliding_window_attention"]),
    "Am": ({}, ["A is attention, m is mamba1", "no class of transformers mixes them"]),
    "AM norm": ({"norm": "layernorm"}, ["norm = 'layernorm'", "norm: rmsnorm"]),
    "AM gelu": ({"mlp": "gelu"}, ["mlp = 'gelu'", "mlp: swiglu"]),
    "AA gelu": ({"mlp": "gelu"}, ["LlamaForCausalLM", "mlp = 'gelu'"]),
    "AM bias": ({"mlp_bias": True}, ["mlp_bias = True"]),
    "AA bias": ({"mlp_bias": True, "positions": "nope"}, ["GraniteMoeHybridForCausalLM", "mlp_bias = True"]),
    "MM bias": ({"mlp_bias": True}, ["mlp_bias = True"]),
    "AA alibi": ({"positions": "alibi"}, ["LlamaForCausalLM", "positions = 'alibi'", "positions: rope"]),
    "AM alibi": ({"positions": "alibi"}, ["positions = 'alibi'", "positions: rope or nope"]),
    "AA hard": ({"positions": "hard_alibi", "kv_heads": None}, ["LlamaForCausalLM", "positions = 'hard_alibi'"]),
    "MM learned": ({"positions": "learned", "max_positions": 9, "mlp": "none"}, ["positions = 'learned'"]),
    "mm mlp": ({}, ["MambaForCausalLM", "mlp = 'swiglu'", "mlp: none"]),
    "AM bare": ({"mlp": "none"}, ["NemotronHForCausalLM", "positions = 'rope'", "tied = True", "tied: False"]),
    "AM bare bias": ({"mlp": "none", "positions": "nope", "tied": False, "attention_bias": True}, ["attention_bias"]),
    "AAB heads": ({"mixers": {"B": {"mixer": "attention", "heads": 2}}}, ["heads = 4 and 2 in layers of attention"]),
    "MMB state": ({"mixers": {"B": {"mixer": "mamba2", "state": 4}}}, ["state = 8 and 4 in layers of mamba2"]),
    "MM eps": ({"mixers": {"M": {"norm_eps": 1e-3}}}, ["norm_eps = 0.001 in mamba2 and 1e-05 elsewhere"]),
    "mmb rank": ({"mlp": "none", "mixers": {"b": {"mixer": "mamba1", "dt_rank": 3}}}, ["dt_rank = None and 3"]),
    "AM all": ({"mlp": "gelu", "norm": "layernorm", "positions": "alibi"}, ["norm =", "mlp =", "positions ="]),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_no_class_computes_is_refused_with_every_reason(name, tmp_path):
    settings, reasons = REFUSED[name]
    model = build(name.split()[0], **settings)
    with pytest.raises(UserError) as refusal:
        write_folder(model, tmp_path / "out", context=CONTEXT)
    for reason in reasons:
        assert reason in str(refusal.value)
    assert not (tmp_path / "out").exists()


def test_a_letter_bound_to_a_known_mixer_is_that_mixer():
    config = ModelConfig.parse({"pattern": "AB", **TINY, "mixers": {"B": {"mixer": "mamba2"}}}, "model")
    assert architecture_of(config).name == "GraniteMoeHybridForCausalLM"


def test_every_setting_is_written_or_refused_or_without_influence():
    """A new setting must be given a place here, and in the architectures, before it can be exported by accident."""
    assert set(attention.AttentionSettings.model_fields) == {
        *("heads", "kv_heads", "positions", "rope_base", "rope_scaling", "attention_bias"),
        "attention_dropout",  # of training
        "masked_heads",  # of positions that are refused
    }
    assert set(mamba2.Mamba2Settings.model_fields) == {
        *("state", "expand", "mamba_head_dim", "conv", "chunk", "norm_eps"),
        *("decay_init", "dt_init"),  # before training
    }
    assert set(mamba1.Mamba1Settings.model_fields) == {"mamba1_state", "expand", "conv", "dt_rank"}
    own = {"pattern", "width", "mlp", "mlp_width", "mlp_bias", "norm", "norm_eps", "tied", "embedding_multiplier"}
    of_training = {"dropout", "init"}
    refused = {"state_bits", "handover"}
    of_mixers = {"mixers", "window", "delta_head_dim", "max_positions"}
    of_attention, of_mamba = set(attention.AttentionSettings.model_fields), set(mamba2.Mamba2Settings.model_fields)
    of_mamba |= set(mamba1.Mamba1Settings.model_fields)
    assert set(ModelConfig.model_fields) <= own | of_training | refused | of_mixers | of_attention | of_mamba


def test_a_taken_folder_is_kept(tmp_path):
    model, folder = case("AA"), tmp_path / "out"
    write_folder(model, folder, context=CONTEXT)
    before = (folder / "config.json").read_text()
    with pytest.raises(UserError, match="exists"):
        write_folder(case("MM bare"), folder, context=CONTEXT)
    assert (folder / "config.json").read_text() == before
    write_folder(case("MM bare"), folder, context=CONTEXT, replace=True)
    assert read_folder(folder).config.layers() == ["M", "M"]


def test_only_an_export_is_ever_replaced(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match="no export"):
        write_folder(case("AA"), tmp_path, context=CONTEXT, replace=True)
    assert (tmp_path / "thesis.tex").read_text() == "years of work"
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="exists"):
        write_folder(case("AA"), tmp_path / "file", context=CONTEXT)
    (tmp_path / "empty").mkdir()
    write_folder(case("AA"), tmp_path / "empty", context=CONTEXT)


@pytest.mark.parametrize("before", [False, True])
def test_a_killed_write_leaves_what_was_there(before, tmp_path):
    folder = tmp_path / "out"
    if before:
        write_folder(case("AA"), folder, context=CONTEXT)

    def die(partial):
        assert (partial / "model.safetensors").is_file()
        os.kill(os.getpid(), signal.SIGKILL)

    child = os.fork()
    if child == 0:
        write_folder(case("MM bare"), folder, context=CONTEXT, replace=before, verify=die)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert folder.exists() == before
    if before:
        assert read_folder(folder).config.layers() == ["A", "A"]
    write_folder(case("MM bare"), folder, context=CONTEXT, replace=True)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_failed_check_leaves_nothing(tmp_path):
    def fail(partial):
        raise UserError("the check failed", "success", "none")

    with pytest.raises(UserError, match="the check failed"):
        write_folder(case("AA"), tmp_path / "out", context=CONTEXT, verify=fail)
    assert not list(tmp_path.iterdir())


def test_an_unknown_dtype_is_refused(tmp_path):
    with pytest.raises(UserError, match="float64"):
        write_folder(case("AA"), tmp_path / "out", context=CONTEXT, dtype=torch.float64)
