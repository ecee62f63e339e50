"""Attention with rotary positions and SwiGLU: `LlamaForCausalLM`."""

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
)
from longspan.models.interchange.config_keys import ConfigKeys
from longspan.models.interchange.layout import Multipliers, Part, Weight, attention, embedding_and_head, same
from longspan.models.interchange.rope import describe_rope, understand_rope


class Llama(Architecture):
    """See `Architecture`."""

    name = "LlamaForCausalLM"
    model_type = "llama"
    mixers = frozenset({"attention"})

    def obstacles(self, config: ModelConfig) -> Iterator[Obstacle]:
        """See `Architecture.obstacles`."""
        yield from common_obstacles(config, ["swiglu"], mlp_bias=True)
        yield from attention_obstacles(config, ["rope"])

    def describe(self, config: ModelConfig, context: int) -> dict[str, Any]:
        """See `Architecture.describe`."""
        settings = attention_of(config)
        assert settings is not None
        assert settings.heads is not None
        return {
            "hidden_size": config.width,
            "intermediate_size": config.hidden,
            "num_hidden_layers": len(config.layers()),
            "num_attention_heads": settings.heads,
            "num_key_value_heads": settings.kv_heads or settings.heads,
            "head_dim": config.width // settings.heads,
            "hidden_act": "silu",
            "max_position_embeddings": context,
            "rms_norm_eps": config.norm_eps,
            **describe_rope(settings.rope_base, settings.rope_scaling),
            "attention_bias": settings.attention_bias,
            "attention_dropout": settings.attention_dropout,
            "mlp_bias": bool(config.mlp_bias),
            "tie_word_embeddings": config.tied,
        }

    def understand(self, keys: ConfigKeys) -> tuple[ModelConfig, Multipliers]:
        """See `Architecture.understand`."""
        keys.only("hidden_act", "silu", "swish")
        keys.only("pretraining_tp", 1)
        keys.only("rope_interleaved", False)
        keys.without_influence(["is_llama_config"])
        base, scaling = understand_rope(keys)
        width, heads = keys.integer("hidden_size"), keys.integer("num_attention_heads")
        if width % heads or keys.take("head_dim", None) not in (None, width // heads):
            raise keys.refuse("head_dim", f"hidden_size / num_attention_heads = {width / heads:g}")
        config = ModelConfig.parse(
            {
                "pattern": f"A{keys.integer('num_hidden_layers')}",
                "width": width,
                "heads": heads,
                "kv_heads": keys.integer("num_key_value_heads", heads),
                "rope_base": base,
                "attention_bias": keys.flag("attention_bias", False),
                "mlp_width": keys.integer("intermediate_size"),
                "mlp_bias": keys.flag("mlp_bias", False),
                "norm_eps": keys.number("rms_norm_eps", 1e-6),
                "tied": keys.flag("tie_word_embeddings", False),
                "mixers": {"A": {"rope_scaling": scaling}} if scaling else {},
            },
            str(keys.where),
        )
        return config, Multipliers()

    def weights(self, config: ModelConfig, by: Multipliers) -> Iterator[Weight]:
        """See `Architecture.weights`."""
        settings = attention_of(config)
        assert settings is not None
        yield from embedding_and_head(config, "model.embed_tokens.weight", "model.norm.weight", by, fold=True)
        for i in range(len(config.layers())):
            ours, theirs = f"layers.{i}", f"model.layers.{i}"
            yield same(f"{ours}.mixer_norm.weight", f"{theirs}.input_layernorm.weight")
            yield from attention(config, settings, f"{ours}.mixer", f"{theirs}.self_attn", by)
            yield same(f"{ours}.mlp_norm.weight", f"{theirs}.post_attention_layernorm.weight")
            for kind in ("weight", "bias") if config.mlp_bias else ("weight",):
                gate, up = (Part(f"{theirs}.mlp.{name}_proj.{kind}", config.hidden) for name in ("gate", "up"))
                yield Weight(f"{ours}.mlp.input_linear.{kind}", (gate, up))
                yield same(f"{ours}.mlp.output_linear.{kind}", f"{theirs}.mlp.down_proj.{kind}")
