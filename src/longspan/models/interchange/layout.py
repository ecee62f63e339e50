"""Which tensors of a checkpoint hold which parameter: one table per architecture serves writing and reading.

Legend: D model width, C convolution channels, K taps.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from longspan.models.config import ModelConfig
from longspan.models.mixers.attention import AttentionSettings


@dataclass(frozen=True)
class Part:
    """A tensor of a checkpoint.

    Attributes:
        name: there.
        rows: of the parameter that it holds; None: all.
        to_theirs: what the parameter is multiplied by when it is written.
        to_ours: what the tensor is multiplied by when it is read.
    """

    name: str
    rows: int | None = None
    to_theirs: float = 1.0
    to_ours: float = 1.0


@dataclass(frozen=True)
class Weight:
    """A parameter of a `LanguageModel`.

    Attributes:
        name: of the parameter.
        parts: the tensors that hold it, first rows first.
        channel_axis: it is (C, K) here and (C, 1, K) there, as `torch.nn.Conv1d` has it.
    """

    name: str
    parts: tuple[Part, ...]
    channel_axis: bool = False


@dataclass(frozen=True)
class Multipliers:
    """Factors of a checkpoint's forward pass that become part of its weights when it is read.

    Attributes:
        queries: on the queries, so that scores are scaled by 1/sqrt(head_dim) afterwards.
        residual: on what mixers and MLPs write into the residual stream.
        logits: on the logits; the norm before the head takes it, which a tied head allows too.
    """

    queries: float = 1.0
    residual: float = 1.0
    logits: float = 1.0


def same(ours: str, theirs: str, to_ours: float = 1.0) -> Weight:
    """One parameter that is one tensor."""
    return Weight(ours, (Part(theirs, to_ours=to_ours),))


def embedding_and_head(config: ModelConfig, embedding: str, norm: str, by: Multipliers, fold: bool) -> Iterator[Weight]:
    """Embedding, last norm and head.

    Args:
        config: of the model.
        embedding: name of the embedding there.
        norm: name of the last norm there.
        by: what is multiplied in on reading.
        fold: the architecture has no embedding multiplier, so the embedding takes it on writing; with a tied head the
            last norm takes its inverse.
    """
    multiplier = config.embedding_multiplier if fold else 1.0
    yield Weight("embedding.weight", (Part(embedding, to_theirs=multiplier),))
    yield Weight("norm.weight", (Part(norm, to_theirs=1.0 / multiplier if config.tied else 1.0, to_ours=by.logits),))
    if not config.tied:
        yield same("head.weight", "lm_head.weight")


def attention(
    config: ModelConfig, settings: AttentionSettings, ours: str, theirs: str, by: Multipliers
) -> Iterator[Weight]:
    """Query, key, value and output projections, with their biases where the settings have them."""
    assert settings.heads is not None
    head_dim = config.width // settings.heads
    kv_rows = (settings.kv_heads or settings.heads) * head_dim
    for kind in ("weight", "bias") if settings.attention_bias else ("weight",):
        yield Weight(
            f"{ours}.qkv_proj.{kind}",
            (
                Part(f"{theirs}.q_proj.{kind}", config.width, to_ours=by.queries),
                Part(f"{theirs}.k_proj.{kind}", kv_rows),
                Part(f"{theirs}.v_proj.{kind}", kv_rows),
            ),
        )
        yield same(f"{ours}.out_proj.{kind}", f"{theirs}.o_proj.{kind}", by.residual)


def convolution(ours: str, theirs: str) -> Iterator[Weight]:
    """The depthwise convolution of a Mamba mixer."""
    yield Weight(f"{ours}.conv_weight", (Part(f"{theirs}.conv1d.weight"),), channel_axis=True)
    yield same(f"{ours}.conv_bias", f"{theirs}.conv1d.bias")


def mamba2(ours: str, theirs: str, by: Multipliers) -> Iterator[Weight]:
    """A Mamba-2 mixer: the order z, x, B, C, dt in `in_proj` is the same everywhere."""
    for name in ("in_proj.weight", "dt_bias", "A_log", "D", "norm.weight"):
        yield same(f"{ours}.{name}", f"{theirs}.{name}")
    yield from convolution(ours, theirs)
    yield same(f"{ours}.out_proj.weight", f"{theirs}.out_proj.weight", by.residual)


def mamba1(ours: str, theirs: str) -> Iterator[Weight]:
    """A Mamba-1 mixer: the order x, z in `in_proj` is the same everywhere."""
    for name in ("in_proj.weight", "x_proj.weight", "dt_proj.weight", "A_log", "D", "out_proj.weight"):
        yield same(f"{ours}.{name}", f"{theirs}.{name}")
    yield same(f"{ours}.dt_bias", f"{theirs}.dt_proj.bias")
    yield from convolution(ours, theirs)
