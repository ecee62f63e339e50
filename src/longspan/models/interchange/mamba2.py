"""Mamba-2 layers without MLP: `Mamba2ForCausalLM`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from longspan.models.config import ModelConfig
from longspan.models.interchange.architecture import (
    Architecture,
    Obstacle,
    common_obstacles,
    mamba2_obstacles,
    mamba2_of,
)
from longspan.models.interchange.config_keys import ConfigKeys
from longspan.models.interchange.granite import no_step_limit
from longspan.models.interchange.layout import Multipliers, Weight, embedding_and_head, mamba2, same

INITIALISATION = ("time_step_rank", "time_step_min", "time_step_max", "time_step_floor")


class Mamba2Lm(Architecture):
    """See `Architecture`."""

    name = "Mamba2ForCausalLM"
    model_type = "mamba2"
    mixers = frozenset({"mamba2"})

    def obstacles(self, config: ModelConfig) -> Iterator[Obstacle]:
        """See `Architecture.obstacles`."""
        yield from common_obstacles(config, ["none"])
        yield from mamba2_obstacles(config)

    def describe(self, config: ModelConfig, context: int) -> dict[str, Any]:
        """See `Architecture.describe`."""
        settings = mamba2_of(config)
        assert settings is not None
        return {
            "hidden_size": config.width,
            "num_hidden_layers": len(config.layers()),
            "num_heads": settings.expand * config.width // settings.mamba_head_dim,
            "head_dim": settings.mamba_head_dim,
            "state_size": settings.state,
            "expand": settings.expand,
            "conv_kernel": settings.conv,
            "n_groups": 1,
            "chunk_size": settings.chunk,
            "use_bias": False,
            "use_conv_bias": True,
            "hidden_act": "silu",
            "layer_norm_epsilon": config.norm_eps,
            "residual_in_fp32": True,
            "tie_word_embeddings": config.tied,
        }

    def understand(self, keys: ConfigKeys) -> tuple[ModelConfig, Multipliers]:
        """See `Architecture.understand`."""
        keys.only("n_groups", 1, default=8, why="groups of B and C")
        keys.only("use_bias", False)
        keys.only("use_conv_bias", True)
        keys.only("hidden_act", "silu", "swish")
        keys.only("rms_norm", True)
        no_step_limit(keys)
        keys.without_influence(INITIALISATION)
        width, expand = keys.integer("hidden_size"), keys.integer("expand", 2)
        head_dim = keys.integer("head_dim", 64)
        keys.only("num_heads", expand * width // head_dim, default=128)
        config = ModelConfig.parse(
            {
                "pattern": f"M{keys.integer('num_hidden_layers')}",
                "width": width,
                "expand": expand,
                "mamba_head_dim": head_dim,
                "state": keys.integer("state_size", 128),
                "conv": keys.integer("conv_kernel", 4),
                "chunk": keys.integer("chunk_size", 256),
                "mlp": "none",
                "norm_eps": keys.number("layer_norm_epsilon", 1e-5),
                "tied": keys.flag("tie_word_embeddings", False),
            },
            str(keys.where),
        )
        return config, Multipliers()

    def weights(self, config: ModelConfig, by: Multipliers) -> Iterator[Weight]:
        """See `Architecture.weights`."""
        yield from embedding_and_head(config, "backbone.embeddings.weight", "backbone.norm_f.weight", by, fold=True)
        for i in range(len(config.layers())):
            yield same(f"layers.{i}.mixer_norm.weight", f"backbone.layers.{i}.norm.weight")
            yield from mamba2(f"layers.{i}.mixer", f"backbone.layers.{i}.mixer", by)
