"""Attention and Mamba-2 layers without MLP: `NemotronHForCausalLM`, which has no positions and no tied head."""

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
from longspan.models.interchange.granite import layer_letters
from longspan.models.interchange.layout import Multipliers, Weight, attention, embedding_and_head, mamba2, same
from longspan.models.mixers.mamba2 import Mamba2Settings

# Step sizes below `time_step_min` are raised to it; transformers also takes its logarithm, so it cannot be 0.
NO_LEAST_STEP = 1e-30
LAYERS = {"full_attention": "A", "attention": "A", "linear_attention": "M", "mamba": "M"}
_OF_MLP_LAYERS = (
    "intermediate_size", "mlp_hidden_act", "mlp_bias", "n_routed_experts", "n_shared_experts", "moe_intermediate_size",
    "moe_shared_expert_intermediate_size", "moe_latent_size", "moe_shared_expert_overlap", "num_experts_per_tok",
    "routed_scaling_factor", "n_group", "topk_group", "norm_topk_prob", "output_router_logits",
)  # fmt: skip


class NemotronH(Architecture):
    """See `Architecture`."""

    name = "NemotronHForCausalLM"
    model_type = "nemotron_h"
    mixers = frozenset({"attention", "mamba2"})

    def obstacles(self, config: ModelConfig) -> Iterator[Obstacle]:
        """See `Architecture.obstacles`."""
        yield from common_obstacles(config, ["none"])
        yield from attention_obstacles(config, ["nope"], bias=False)
        yield from mamba2_obstacles(config)
        if config.tied:
            yield Obstacle("tied = True", "False")

    def describe(self, config: ModelConfig, context: int) -> dict[str, Any]:
        """See `Architecture.describe`."""
        heads = attention_of(config)
        mamba = mamba2_of(config) or Mamba2Settings(mamba_head_dim=2 * config.width)
        assert heads is not None
        assert heads.heads is not None
        names = [config.mixer(layer)[0].name for layer in config.layers()]
        return {
            "hidden_size": config.width,
            "num_hidden_layers": len(names),
            "hybrid_override_pattern": "".join("*" if name == "attention" else "M" for name in names),
            "num_attention_heads": heads.heads,
            "num_key_value_heads": heads.kv_heads or heads.heads,
            "head_dim": config.width // heads.heads,
            "attention_bias": False,
            "attention_dropout": heads.attention_dropout,
            "max_position_embeddings": context,
            "expand": mamba.expand,
            "mamba_num_heads": mamba.expand * config.width // mamba.mamba_head_dim,
            "mamba_head_dim": mamba.mamba_head_dim,
            "ssm_state_size": mamba.state,
            "n_groups": 1,
            "conv_kernel": mamba.conv,
            "chunk_size": mamba.chunk,
            "mamba_hidden_act": "silu",
            "use_conv_bias": True,
            "use_bias": False,
            "mamba_proj_bias": False,
            "time_step_min": NO_LEAST_STEP,
            "layer_norm_epsilon": config.norm_eps,
            "residual_in_fp32": False,
            "rescale_prenorm_residual": False,
            "tie_word_embeddings": False,
        }

    def understand(self, keys: ConfigKeys) -> tuple[ModelConfig, Multipliers]:
        """See `Architecture.understand`."""
        keys.only("n_groups", 1, default=8, why="groups of B and C")
        for name in ("use_bias", "attention_bias", "mamba_proj_bias", "tie_word_embeddings"):
            keys.only(name, False)
        keys.only("use_conv_bias", True)
        keys.only("mamba_hidden_act", "silu", "swish")
        keys.only("sliding_window", None)
        keys.only("num_nextn_predict_layers", 0)
        if keys.number("time_step_min", 1e-3) > NO_LEAST_STEP:
            raise keys.refuse("time_step_min", f"at most {NO_LEAST_STEP:g}", "a least step size")
        keys.without_influence(
            (*_OF_MLP_LAYERS, "mtp_layers_block_type", "mtp_hybrid_override_pattern", "num_logits_to_keep")
        )
        keys.without_influence(("time_step_limit", "time_step_max", "time_step_floor", "mamba_ssm_cache_dtype"))
        keys.without_influence(("use_mamba_kernels",))
        width, heads = keys.integer("hidden_size"), keys.integer("num_attention_heads", 32)
        if width % heads or keys.integer("head_dim", 128) != width // heads:
            raise keys.refuse("head_dim", f"hidden_size / num_attention_heads = {width / heads:g}")
        head_dim, expand = keys.integer("mamba_head_dim", 64), keys.integer("expand", 2)
        keys.only("mamba_num_heads", expand * width // head_dim, default=128)
        config = ModelConfig.parse(
            {
                "pattern": _pattern(keys),
                "width": width,
                "heads": heads,
                "kv_heads": keys.integer("num_key_value_heads", 8),
                "positions": "nope",
                "expand": expand,
                "mamba_head_dim": head_dim,
                "state": keys.integer("ssm_state_size", 128),
                "conv": keys.integer("conv_kernel", 4),
                "chunk": keys.integer("chunk_size", 128),
                "mlp": "none",
                "norm_eps": keys.number("layer_norm_epsilon", 1e-5),
                "tied": False,
            },
            str(keys.where),
        )
        return config, Multipliers()

    def weights(self, config: ModelConfig, by: Multipliers) -> Iterator[Weight]:
        """See `Architecture.weights`."""
        heads = attention_of(config)
        yield from embedding_and_head(config, "backbone.embeddings.weight", "backbone.norm_f.weight", by, fold=True)
        for i, layer in enumerate(config.layers()):
            ours, theirs = f"layers.{i}", f"backbone.layers.{i}"
            yield same(f"{ours}.mixer_norm.weight", f"{theirs}.norm.weight")
            if config.mixer(layer)[0].name == "attention":
                assert heads is not None
                yield from attention(config, heads, f"{ours}.mixer", f"{theirs}.mixer", by)
            else:
                yield from mamba2(f"{ours}.mixer", f"{theirs}.mixer", by)


def _pattern(keys: ConfigKeys) -> str:
    letters = keys.take("hybrid_override_pattern")
    layers = keys.take("layers_block_type")
    if layers is None and isinstance(letters, str) and letters and not set(letters) - {"*", "M"}:
        keys.only("num_hidden_layers", len(letters))
        return letters.replace("*", "A")
    if layers is None:
        raise keys.refuse("hybrid_override_pattern", "letters `*` and `M`: layers with an MLP or experts have no place")
    keys.without_influence(("num_hidden_layers",))
    return layer_letters(keys, "layers_block_type", LAYERS, len(layers) if isinstance(layers, list) else 0)
