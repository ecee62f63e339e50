"""Which architecture of transformers computes exactly what a model computes, or every reason why none does."""

from __future__ import annotations

from longspan.foundation.errors import UserError
from longspan.models.config import ModelConfig
from longspan.models.interchange.architecture import Architecture, attention_of
from longspan.models.interchange.granite import GraniteMoeHybrid
from longspan.models.interchange.llama import Llama
from longspan.models.interchange.mamba1 import MambaLm
from longspan.models.interchange.mamba2 import Mamba2Lm
from longspan.models.interchange.nemotron import NemotronH

ARCHITECTURES: dict[str, Architecture] = {
    each.model_type: each for each in (Llama(), GraniteMoeHybrid(), NemotronH(), Mamba2Lm(), MambaLm())
}
"""By the `model_type` of config.json."""


def architecture_of(config: ModelConfig) -> Architecture:
    """The architecture that a model is written as.

    Raises:
        UserError: none computes the same; every setting in the way is named, with what would be allowed.
    """
    _check_mixers(config)
    chosen = _closest(config)
    obstacles = list(chosen.obstacles(config))
    if obstacles:
        raise UserError(
            f"{config.pattern} cannot be written as {chosen.name}, the class of transformers nearest to it: "
            + "; ".join(obstacle.setting for obstacle in obstacles),
            "; ".join(f"{obstacle.setting.split(' = ')[0]}: {obstacle.allowed}" for obstacle in obstacles),
            "train a model with allowed settings; nothing is written that would compute something else",
        )
    return chosen


def _check_mixers(config: ModelConfig) -> None:
    """Refuse mixers that no class of transformers has in free order."""
    known = frozenset[str]().union(*(each.mixers for each in ARCHITECTURES.values()))
    names = {layer: config.mixer(layer)[0].name for layer in config.layers()}
    foreign = {layer: name for layer, name in names.items() if name not in known}
    if not foreign and ("mamba1" not in names.values() or set(names.values()) == {"mamba1"}):
        return
    shown = ", ".join(f"{layer} is {name}" for layer, name in (foreign or names).items())
    reason = "no class of transformers has these" if foreign else "no class of transformers mixes them in free order"
    raise UserError(
        f"{config.pattern} cannot be exported: {shown}; {reason}",
        "attention (A) and mamba2 (M) in any order, or mamba1 (m) alone",
        "export a run whose pattern has no other layers",
    )


def _closest(config: ModelConfig) -> Architecture:
    mixers = {config.mixer(layer)[0].name for layer in config.layers()}
    heads = attention_of(config)
    if mixers == {"mamba1"}:
        return ARCHITECTURES["mamba"]
    if config.mlp == "none":
        return ARCHITECTURES["mamba2" if heads is None else "nemotron_h"]
    rotary = heads is not None and heads.positions != "nope"
    if mixers == {"attention"} and rotary and config.embedding_multiplier == 1.0:
        return ARCHITECTURES["llama"]
    return ARCHITECTURES["granitemoehybrid"]
