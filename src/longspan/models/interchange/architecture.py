"""What one architecture of transformers must tell: which models it can hold, its config.json, its names of tensors."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

from longspan.foundation.config import Config
from longspan.models.config import ModelConfig
from longspan.models.interchange.config_keys import ConfigKeys
from longspan.models.interchange.layout import Multipliers, Weight
from longspan.models.mixers.attention import AttentionSettings
from longspan.models.mixers.mamba1 import Mamba1Settings
from longspan.models.mixers.mamba2 import Mamba2Settings

SettingsType = TypeVar("SettingsType", bound=Config)


@dataclass(frozen=True)
class Obstacle:
    """A setting that an architecture cannot hold.

    Attributes:
        setting: with its value, e.g. `norm = 'layernorm'`.
        allowed: what can be held.
    """

    setting: str
    allowed: str


class Architecture(ABC):
    """A class of transformers that a `LanguageModel` can be written as and read from.

    Class attributes:
        name: of the class.
        model_type: what its config.json calls it.
        mixers: names of those that it can hold.
        folds_embedding_multiplier: it has none, so the weights take it on writing.
    """

    name: ClassVar[str]
    model_type: ClassVar[str]
    mixers: ClassVar[frozenset[str]]
    folds_embedding_multiplier: ClassVar[bool] = True

    @abstractmethod
    def obstacles(self, config: ModelConfig) -> Iterator[Obstacle]:
        """What of `config` it cannot hold, beside the mixers; nothing: it can be written."""

    @abstractmethod
    def describe(self, config: ModelConfig, context: int) -> dict[str, Any]:
        """The settings for config.json, without vocabulary, dtype and special ids."""

    @abstractmethod
    def understand(self, keys: ConfigKeys) -> tuple[ModelConfig, Multipliers]:
        """The inverse of `describe`, for files of any origin.

        Raises:
            UserError: a value that Longspan's models cannot honour, by key.
        """

    @abstractmethod
    def weights(self, config: ModelConfig, by: Multipliers) -> Iterator[Weight]:
        """Where every parameter of a model is."""

    def notes(self, config: ModelConfig) -> list[str]:
        """What a user of the written folder must know."""
        if self.folds_embedding_multiplier and config.embedding_multiplier != 1.0:
            taken = "the embedding, its inverse into the last norm" if config.tied else "the embedding"
            return [
                f"{self.name} has no embedding multiplier: {config.embedding_multiplier:g} was multiplied into {taken}"
            ]
        return []

    def generation(self, config: ModelConfig) -> dict[str, Any]:
        """For generation_config.json, beside the special ids."""
        return {}


def settings_of(config: ModelConfig, mixer: str, kind: type[SettingsType]) -> list[SettingsType]:
    """The settings of every layer with a mixer, first layer first."""
    found = []
    for layer in config.layers():
        built, settings = config.mixer(layer)
        if built.name == mixer:
            assert isinstance(settings, kind)
            found.append(settings)
    return found


def attention_of(config: ModelConfig) -> AttentionSettings | None:
    """The settings that all attention layers share; None without such layers."""
    return next(iter(settings_of(config, "attention", AttentionSettings)), None)


def mamba2_of(config: ModelConfig) -> Mamba2Settings | None:
    """The settings that all Mamba-2 layers share; None without such layers."""
    return next(iter(settings_of(config, "mamba2", Mamba2Settings)), None)


def mamba1_of(config: ModelConfig) -> Mamba1Settings | None:
    """The settings that all Mamba-1 layers share; None without such layers."""
    return next(iter(settings_of(config, "mamba1", Mamba1Settings)), None)


def common_obstacles(config: ModelConfig, mlp: Sequence[str], mlp_bias: bool = False) -> Iterator[Obstacle]:
    """What no architecture can hold, and MLPs other than these."""
    if config.state_bits is not None:
        yield Obstacle(f"state_bits = {config.state_bits}", "none: nothing else rounds its state inside a row")
    if config.norm != "rmsnorm":
        yield Obstacle(f"norm = {config.norm!r}", "rmsnorm")
    if config.positions == "learned":
        yield Obstacle("positions = 'learned'", "rope or nope")
    if config.mlp not in mlp:
        yield Obstacle(f"mlp = {config.mlp!r}", " or ".join(mlp))
    elif config.mlp != "none" and config.mlp_bias and not mlp_bias:
        yield Obstacle("mlp_bias = True", "False")


def attention_obstacles(config: ModelConfig, positions: Sequence[str], bias: bool = True) -> Iterator[Obstacle]:
    """Attention layers that differ, other positions than these, biases."""
    found = settings_of(config, "attention", AttentionSettings)
    yield from _differing(found, "attention")
    for settings in found[:1]:
        if settings.positions not in positions and settings.positions != "learned":
            yield Obstacle(f"positions = {settings.positions!r}", " or ".join(positions))
        if settings.attention_bias and not bias:
            yield Obstacle("attention_bias = True", "False")


def mamba2_obstacles(config: ModelConfig) -> Iterator[Obstacle]:
    """Mamba-2 layers that differ, or whose norm has another epsilon than the model."""
    found = settings_of(config, "mamba2", Mamba2Settings)
    yield from _differing(found, "mamba2", but=("decay_init", "dt_init"))
    for settings in found[:1]:
        if settings.norm_eps != config.norm_eps:
            yield Obstacle(
                f"norm_eps = {settings.norm_eps:g} in mamba2 and {config.norm_eps:g} elsewhere", "one for all norms"
            )


def mamba1_obstacles(config: ModelConfig) -> Iterator[Obstacle]:
    """Mamba-1 layers that differ."""
    yield from _differing(settings_of(config, "mamba1", Mamba1Settings), "mamba1")


def _differing(found: Sequence[Config], mixer: str, but: Collection[str] = ()) -> Iterator[Obstacle]:
    for name in (each for each in type(found[0]).model_fields if each not in but) if found else ():
        values = list(dict.fromkeys(getattr(settings, name) for settings in found))
        if len(values) > 1:
            yield Obstacle(f"{name} = {' and '.join(map(repr, values))} in layers of {mixer}", "one value for all")
