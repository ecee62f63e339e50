"""What a model is made of, as data: validated once, with the settings of every mixer resolved."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from longspan.foundation.config import Config, ConfigError
from longspan.foundation.errors import UserError
from longspan.foundation.registry import unknown_name
from longspan.models.mixers import Mixer, registered
from longspan.models.mixers.attention import Positions
from longspan.models.mixers.parallel import ParallelSettings, side_by_side
from longspan.models.pattern import letters_of, parse_pattern

MOST_BITS = 16
"""Of a number that is rounded: fp32 holds no more levels exactly by a wide margin."""


class ModelConfig(Config):
    """A language model without its vocabulary.

    Settings of mixers that the pattern does not use have no effect, so that a study can vary the pattern alone.

    Attributes:
        pattern: the layer string, see `parse_pattern`; `[AM]` is one layer with two mixers, see `Parallel`.
        width: D, the residual stream.
        heads, kv_heads, positions, masked_heads, rope_base, attention_bias, attention_dropout: attention, see
            `AttentionSettings`.
        window: tokens that sliding-window attention sees, see `SlidingWindowAttentionSettings`.
        max_positions: rows of the learned position table; required with `positions: learned`.
        state, expand, mamba_head_dim, conv, chunk: Mamba-2, see `Mamba2Settings`.
        delta_head_dim: Gated DeltaNet, see `GatedDeltaNetSettings`.
        mlp: `swiglu`, `gelu` (exact, two matrices) or `none`, the same in every layer.
        mlp_width: hidden width of the MLP; None: 8/3 width rounded to a multiple of 8 (`swiglu`), 4 width (`gelu`).
        mlp_bias: biases in the MLP; None: with `gelu` only.
        norm: `rmsnorm` or `layernorm`, before every mixer and MLP and before the head.
        norm_eps: one epsilon for all norms, the gated norm of Mamba-2 included.
        tied: the head is the token embedding.
        embedding_multiplier: scales the token embeddings where they enter the first layer, not the tied head; 1 leaves
            them as they are, some models take the square root of the width.
        dropout: probability after the embedding and on every residual branch in training; drawn from torch's own
            generator of the device.
        init: `scaled`: each mixer's own, MLPs kaiming-uniform, weights that write into the residual stream divided by
            the square root of the number of residuals. `normal`: N(0, 0.02) for every linear layer and zero biases, as
            the earlier small Transformers (other mixer parameters as in `scaled`). Embeddings are N(0, 0.02) in both.
        state_bits: b; at `handover` the state is rounded to 2^b levels a number, so that what a row's later tokens know
            of its earlier ones is b bits a number, see `Handover`; None: the state is as precise as its dtype.
        handover: tokens of a row after which that happens; with `state_bits` only. Where a model is trained on a task
            it is where the questions begin.
        mixers: settings per letter, over those above; `mixer: NAME` in them binds the letter to another mixer, e.g.
            `{B: {mixer: attention, positions: nope}}`.
    """

    pattern: str
    width: int = Field(ge=1)
    heads: int | None = None
    kv_heads: int | None = None
    positions: Positions = "rope"
    masked_heads: int | None = Field(None, ge=1)
    rope_base: float = 10_000.0
    attention_bias: bool = False
    attention_dropout: float = Field(0.0, ge=0, lt=1)
    window: int = Field(128, ge=1)
    max_positions: int | None = Field(None, ge=1)
    state: int = 64
    expand: int = 2
    mamba_head_dim: int = 64
    delta_head_dim: int = 64
    conv: int = 4
    chunk: int = 64
    mlp: Literal["swiglu", "gelu", "none"] = "swiglu"
    mlp_width: int | None = Field(None, ge=1)
    mlp_bias: bool | None = None
    norm: Literal["rmsnorm", "layernorm"] = "rmsnorm"
    norm_eps: float = Field(1e-5, gt=0)
    tied: bool = True
    embedding_multiplier: float = Field(1.0, gt=0)
    dropout: float = Field(0.0, ge=0, lt=1)
    init: Literal["scaled", "normal"] = "scaled"
    state_bits: int | None = Field(None, ge=1, le=MOST_BITS)
    handover: int | None = Field(None, ge=1)
    mixers: dict[str, dict[str, Any]] = Field(default_factory=dict)

    @field_validator("pattern", mode="before")
    @classmethod
    def _quoted(cls, pattern: object) -> object:
        if isinstance(pattern, list):
            raise UserError(f"the list {pattern}", "text, e.g. `AAMM`", 'quote a pattern that begins with `[`: "[AM]4"')
        return pattern

    @model_validator(mode="after")
    def _check(self) -> Self:
        for letter in self.mixers:
            if len(letter) != 1 or not (letter.isascii() and letter.isalpha()):
                fix = "settings go to the letters one by one, also to those in `[..]`"
                raise UserError(f"mixers.{letter}", "one ASCII letter", fix)
            self.mixer(letter)
        for layer in dict.fromkeys(self.layers()):
            mixer, settings = self.mixer(layer)
            mixer.check(self.width, settings)
        if self.positions == "learned" and self.max_positions is None:
            raise UserError(
                "learned positions without `max_positions`", "a number of positions", "set it to the context"
            )
        self._check_handover()
        return self

    def _check_handover(self) -> None:
        if (self.state_bits is None) != (self.handover is None):
            given, lacks = ("state_bits", "handover") if self.handover is None else ("handover", "state_bits")
            raise UserError(
                f"`{given}` without `{lacks}`",
                "both, or neither: in how many bits a number the state is handed over, and after how many tokens",
                f"add `{lacks}`, or remove `{given}`",
            )
        if self.state_bits is not None and not self.carried():
            raise UserError(
                f"state_bits = {self.state_bits} with the pattern {self.pattern}",
                "a layer that carries a state on; a convolution alone begins anew where it is handed over",
                "add a layer with a state, or remove `state_bits`",
            )

    def carried(self) -> int:
        """Tensors of the state of all layers that can be handed over."""
        return sum(self.mixer(layer)[0].carried for layer in self.layers())

    def layers(self) -> list[str]:
        """What mixes in every layer: a letter or a group such as `[AM]`."""
        return parse_pattern(self.pattern, {*registered(), *self.mixers})

    def mixer(self, layer: str) -> tuple[type[Mixer], Config]:
        """The mixer class behind a layer and its settings: those under `mixers`, else this config's, else its own.

        Args:
            layer: a letter, or a group such as `[AM]`, whose letters are bound one by one.

        Raises:
            UserError: an unknown setting or mixer name.
        """
        if len(layer) == 1:
            return self._mixer_of(layer)
        mixers, settings = zip(*map(self._mixer_of, letters_of(layer)), strict=True)
        return side_by_side(mixers), ParallelSettings(branches=settings, norm_eps=self.norm_eps)

    def _mixer_of(self, letter: str) -> tuple[type[Mixer], Config]:
        given = dict(self.mixers.get(letter, {}))
        known = registered()
        if "mixer" in given:
            name = given.pop("mixer")
            by_name = {mixer.name: mixer for mixer in known.values()}
            if name not in by_name:
                raise unknown_name("mixer", name, sorted(by_name), where=f"mixers.{letter}.mixer")
            mixer = by_name[name]
        elif letter in known:
            mixer = known[letter]
        else:
            allowed = f"a registered letter ({', '.join(sorted(known))}), or settings that name their mixer"
            raise UserError(f"mixers.{letter} has no mixer", allowed, f"add `mixer: NAME` to mixers.{letter}")
        inherited = {key: getattr(self, key) for key in mixer.Settings.model_fields if key in ModelConfig.model_fields}
        try:
            settings = mixer.Settings.parse({**inherited, **given}, f"mixers.{letter}")
        except ConfigError as error:
            key = error.path.removeprefix(f"mixers.{letter}.")
            # What the model says for all its mixers stands there.
            raise error.at(key) if key in inherited and key not in given else error from None
        if given.get("positions") == "learned" and self.positions != "learned":
            allowed = "other positions, or learned ones for the whole model"
            raise UserError(f"mixers.{letter}.positions = 'learned'", allowed, "set `positions: learned` on the model")
        return mixer, settings

    @property
    def hidden(self) -> int:
        """The hidden width of the MLP, 0 without one."""
        if self.mlp == "none":
            return 0
        if self.mlp_width is not None:
            return self.mlp_width
        return 4 * self.width if self.mlp == "gelu" else max(8, 8 * round(self.width / 3))

    def describe_mixers(self) -> str:
        """The true mixers in the order of the layers, e.g. `2 attention, 2 mamba2, 1 [attention+mamba2]`."""
        names = [self.mixer(layer)[0].name for layer in self.layers()]
        return ", ".join(f"{names.count(name)} {name}" for name in dict.fromkeys(names))
