"""Any order of attention and Mamba-2 layers with SwiGLU: `GraniteMoeHybridForCausalLM` without experts."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from longspan.models.config import ModelConfig
from longspan.models.interchange.architecture import (
    Architecture,
    Obstacle,
    attention_obstacles,
    attention_of,
    common_obstacles,
    mamba2_obstacles,
    mamba2_of,
)
from longspan.models.interchange.config_keys import ConfigKeys
from longspan.models.interchange.layout import Multipliers, Weight, attention, embedding_and_head, mamba2, same
from longspan.models.interchange.rope import describe_rope, understand_rope
from longspan.models.mixers.attention import AttentionSettings
from longspan.models.mixers.mamba2 import Mamba2Settings

LAYERS = {"attention": "A", "full_attention": "A", "mamba": "M", "linear_attention": "M"}
_EXPERTS = ("num_experts_per_tok", "intermediate_size", "output_router_logits", "router_aux_loss_coef")


class GraniteMoeHybrid(Architecture):
    """See `Architecture`. Layers are called `attention` and `mamba`, which transformers 4 and 5 both understand."""

    name = "GraniteMoeHybridForCausalLM"
    model_type = "granitemoehybrid"
    mixers = frozenset({"attention", "mamba2"})
    folds_embedding_multiplier = False

    def obstacles(self, config: ModelConfig) -> Iterator[Obstacle]:
        """See `Architecture.obstacles`."""
        yield from common_obstacles(config, ["swiglu"])
        yield from attention_obstacles(config, ["rope", "nope"])
        yield from mamba2_obstacles(config)

    def describe(self, config: ModelConfig, context: int) -> dict[str, Any]:
        """See `Architecture.describe`."""
        # Where there is no such layer, the settings only have to be ones that are accepted.
        heads = attention_of(config) or AttentionSettings(heads=1, positions="nope")
        mamba = mamba2_of(config) or Mamba2Settings(mamba_head_dim=2 * config.width)
        assert heads.heads is not None
        inner = mamba.expand * config.width
        rope = describe_rope(heads.rope_base, heads.rope_scaling)
        return {
            "hidden_size": config.width,
            "num_hidden_layers": len(config.layers()),
            "layer_types": ["attention" if name == "attention" else "mamba" for name in _names(config)],
            "num_local_experts": 0,
            "num_experts_per_tok": 0,
            "intermediate_size": config.hidden,
            "shared_intermediate_size": config.hidden,
            "hidden_act": "silu",
            "num_attention_heads": heads.heads,
            "num_key_value_heads": heads.kv_heads or heads.heads,
            "attention_bias": heads.attention_bias,
            "attention_dropout": heads.attention_dropout,
            "attention_multiplier": (config.width // heads.heads) ** -0.5,
            "position_embedding_type": "rope" if heads.positions == "rope" else None,
            **(rope if heads.positions == "rope" else {}),
            "max_position_embeddings": context,
            "mamba_expand": mamba.expand,
            "mamba_n_heads": inner // mamba.mamba_head_dim,
            "mamba_d_head": mamba.mamba_head_dim,
            "mamba_d_state": mamba.state,
            "mamba_n_groups": 1,
            "mamba_d_conv": mamba.conv,
            "mamba_chunk_size": mamba.chunk,
            "mamba_conv_bias": True,
            "mamba_proj_bias": False,
            "rms_norm_eps": config.norm_eps,
            "embedding_multiplier": config.embedding_multiplier,
            "logits_scaling": 1.0,
            "residual_multiplier": 1.0,
            "tie_word_embeddings": config.tied,
            **self.generation(config),
        }

    def understand(self, keys: ConfigKeys) -> tuple[ModelConfig, Multipliers]:
        """See `Architecture.understand`."""
        keys.only("num_local_experts", 0, default=8, why="a mixture of experts")
        keys.without_influence((*_EXPERTS, "init_method", "time_step_min", "time_step_max", "time_step_floor"))
        keys.only("normalization_function", "rmsnorm")
        keys.only("hidden_act", "silu", "swish")
        pattern = layer_letters(keys, "layer_types", LAYERS, keys.integer("num_hidden_layers"))
        width, attends = keys.integer("hidden_size"), "A" in pattern
        keys.only("position_embedding_type", None, "rope", "nope")
        rotary = keys.take("position_embedding_type") == "rope"
        base, scaling = understand_rope(keys)
        heads = keys.integer("num_attention_heads", 32)
        kv_heads = heads if keys.take("num_key_value_heads") is None else keys.integer("num_key_value_heads")
        if attends and (width % heads or keys.take("head_dim", None) not in (None, width // heads)):
            raise keys.refuse("head_dim", f"hidden_size / num_attention_heads = {width / heads:g}")
        scores = keys.number("attention_multiplier", 1.0)
        by = Multipliers(
            queries=scores / (width // heads) ** -0.5 if attends else 1.0,
            residual=keys.number("residual_multiplier", 1.0),
            logits=1.0 / keys.number("logits_scaling", 1.0),
        )
        config = ModelConfig.parse(
            {
                "pattern": pattern,
                "width": width,
                "heads": heads if attends else None,
                "kv_heads": kv_heads if attends else None,
                "positions": "rope" if rotary else "nope",
                "rope_base": base,
                "attention_bias": keys.flag("attention_bias", False),
                **_understand_mamba(keys, width),
                "mlp_width": keys.integer("shared_intermediate_size", 1024),
                "norm_eps": keys.number("rms_norm_eps", 1e-6),
                "tied": keys.flag("tie_word_embeddings", False),
                "embedding_multiplier": keys.number("embedding_multiplier", 1.0),
                "mixers": {"A": {"rope_scaling": scaling}} if scaling and rotary and attends else {},
            },
            str(keys.where),
        )
        return config, by

    def weights(self, config: ModelConfig, by: Multipliers) -> Iterator[Weight]:
        """See `Architecture.weights`."""
        heads = attention_of(config)
        yield from embedding_and_head(config, "model.embed_tokens.weight", "model.norm.weight", by, fold=False)
        for i, name in enumerate(_names(config)):
            ours, theirs = f"layers.{i}", f"model.layers.{i}"
            yield same(f"{ours}.mixer_norm.weight", f"{theirs}.input_layernorm.weight")
            if name == "attention":
                assert heads is not None
                yield from attention(config, heads, f"{ours}.mixer", f"{theirs}.self_attn", by)
            else:
                yield from mamba2(f"{ours}.mixer", f"{theirs}.mamba", by)
            yield same(f"{ours}.mlp_norm.weight", f"{theirs}.post_attention_layernorm.weight")
            yield same(f"{ours}.mlp.input_linear.weight", f"{theirs}.shared_mlp.input_linear.weight")
            yield same(f"{ours}.mlp.output_linear.weight", f"{theirs}.shared_mlp.output_linear.weight", by.residual)

    def notes(self, config: ModelConfig) -> list[str]:
        """See `Architecture.notes`."""
        if attention_of(config) is not None:
            return []
        return [
            f"without attention layers, {self.name} of transformers 5 fails with a cache, so config.json and "
            "generation_config.json say `use_cache: false`: generation there computes the whole context for every token"
        ]

    def generation(self, config: ModelConfig) -> dict[str, Any]:
        """See `Architecture.generation`."""
        return {} if attention_of(config) is not None else {"use_cache": False}


def layer_letters(keys: ConfigKeys, name: str, letters: dict[str, str], num_layers: int) -> str:
    """The pattern behind a list of layer names.

    Raises:
        UserError: another length, or a name that is not among `letters`.
    """
    layers = keys.take(name)
    if not isinstance(layers, list) or len(layers) != num_layers or not set(layers) <= letters.keys():
        raise keys.refuse(name, f"{num_layers} times {', '.join(letters)}")
    return "".join(letters[layer] for layer in layers)


def _understand_mamba(keys: ConfigKeys, width: int) -> dict[str, Any]:
    keys.only("mamba_n_groups", 1, why="groups of B and C")
    keys.only("mamba_conv_bias", True)
    keys.only("mamba_proj_bias", False)
    no_step_limit(keys)
    expand, heads = keys.integer("mamba_expand", 2), keys.integer("mamba_n_heads", 128)
    if (expand * width) % heads:
        raise keys.refuse("mamba_n_heads", f"a divisor of mamba_expand * hidden_size = {expand * width}")
    keys.only("mamba_d_head", expand * width // heads, "auto")
    return {
        "expand": expand,
        "mamba_head_dim": expand * width // heads,
        "state": keys.integer("mamba_d_state", 256),
        "conv": keys.integer("mamba_d_conv", 4),
        "chunk": keys.integer("mamba_chunk_size", 256),
    }


def no_step_limit(keys: ConfigKeys) -> None:
    """Step sizes from 0 to infinity, as JSON or as transformers 5 writes it."""
    infinity = float("inf")
    keys.only("time_step_limit", None, [0.0, infinity], [0.0, {"__float__": "Infinity"}], [0.0, "Infinity"])


def _names(config: ModelConfig) -> list[str]:
    return [config.mixer(layer)[0].name for layer in config.layers()]
