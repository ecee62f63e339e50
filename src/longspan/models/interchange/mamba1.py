"""Mamba-1 layers without MLP: `MambaForCausalLM`, the class of `state-spaces/mamba-*-hf`."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from longspan.models.config import ModelConfig
from longspan.models.interchange.architecture import (
    Architecture,
    Obstacle,
    common_obstacles,
    mamba1_obstacles,
    mamba1_of,
)
from longspan.models.interchange.config_keys import ConfigKeys
from longspan.models.interchange.layout import Multipliers, Weight, embedding_and_head, mamba1, same

# Initialisation, choice of kernel, and what the published conversions took over from the original repository: none of
# it is read by transformers.
WITHOUT_INFLUENCE = (
    *("time_step_scale", "time_step_min", "time_step_max", "time_step_init_scheme", "time_step_floor"),
    *("use_mambapy", "use_associative_scan", "fused_add_norm", "pad_vocab_size_multiple"),
    *("d_inner", "d_model", "n_layer", "rms_norm", "ssm_cfg"),
)


class MambaLm(Architecture):
    """See `Architecture`."""

    name = "MambaForCausalLM"
    model_type = "mamba"
    mixers = frozenset({"mamba1"})

    def obstacles(self, config: ModelConfig) -> Iterator[Obstacle]:
        """See `Architecture.obstacles`."""
        yield from common_obstacles(config, ["none"])
        yield from mamba1_obstacles(config)

    def describe(self, config: ModelConfig, context: int) -> dict[str, Any]:
        """See `Architecture.describe`."""
        settings = mamba1_of(config)
        assert settings is not None
        return {
            "hidden_size": config.width,
            "num_hidden_layers": len(config.layers()),
            "state_size": settings.mamba1_state,
            "expand": settings.expand,
            "conv_kernel": settings.conv,
            "time_step_rank": settings.dt_rank or math.ceil(config.width / 16),
            "use_bias": False,
            "use_conv_bias": True,
            "hidden_act": "silu",
            "layer_norm_epsilon": config.norm_eps,
            "residual_in_fp32": True,
            "tie_word_embeddings": config.tied,
        }

    def understand(self, keys: ConfigKeys) -> tuple[ModelConfig, Multipliers]:
        """See `Architecture.understand`."""
        keys.only("use_bias", False)
        keys.only("use_conv_bias", True)
        keys.only("hidden_act", "silu", "swish")
        keys.without_influence(WITHOUT_INFLUENCE)
        width, expand = keys.integer("hidden_size"), keys.integer("expand", 2)
        keys.only("intermediate_size", expand * width)
        rank = math.ceil(width / 16) if keys.take("time_step_rank", "auto") == "auto" else None
        config = ModelConfig.parse(
            {
                "pattern": f"m{keys.integer('num_hidden_layers')}",
                "width": width,
                "mlp": "none",
                "norm_eps": keys.number("layer_norm_epsilon", 1e-5),
                "tied": keys.flag("tie_word_embeddings", True),
                "mixers": {
                    "m": {
                        "mamba1_state": keys.integer("state_size", 16),
                        "expand": expand,
                        "conv": keys.integer("conv_kernel", 4),
                        "dt_rank": rank or keys.integer("time_step_rank"),
                    }
                },
            },
            str(keys.where),
        )
        return config, Multipliers()

    def weights(self, config: ModelConfig, by: Multipliers) -> Iterator[Weight]:
        """See `Architecture.weights`."""
        yield from embedding_and_head(config, "backbone.embeddings.weight", "backbone.norm_f.weight", by, fold=True)
        for i in range(len(config.layers())):
            yield same(f"layers.{i}.mixer_norm.weight", f"backbone.layers.{i}.norm.weight")
            yield from mamba1(f"layers.{i}.mixer", f"backbone.layers.{i}.mixer")
