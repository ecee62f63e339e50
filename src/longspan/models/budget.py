"""What a configuration costs, without building it: parameters, FLOPs, state bytes, bytes read to decode.

Conventions: 2 FLOPs per multiply-add, training = 3 x forward, recomputation not counted; each mixer states its own
formulas. `matching.py` holds one of these costs equal between subjects.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from longspan.models.block import Block, build_norm
from longspan.models.config import ModelConfig


@dataclass(frozen=True)
class Parameters:
    """Parameter counts of a whole model.

    Attributes:
        total: all, a tied head counted once.
        embedding: token embedding and learned positions.
        head: output matrix, 0 where tied.
        non_embedding: total without embedding and head.
        mixers: in all mixers, their inner norms included.
        mlp: in all MLPs.
        norms: before mixers, MLPs and head.
        ranges: of the rounded state, one a tensor where `state_bits` is set.
    """

    total: int
    embedding: int
    head: int
    non_embedding: int
    mixers: int
    mlp: int
    norms: int
    ranges: int = 0


def count_parameters(config: ModelConfig, vocab_size: int) -> Parameters:
    """Count without allocating: one layer of each kind in the pattern is built on the meta device."""
    layers = _layers(config)
    mixers = sum(n * _count(block.mixer) for block, n in layers)
    mlp = sum(n * _count(block.mlp) for block, n in layers)
    with torch.device("meta"):
        final_norm = build_norm(config)
    norms = sum(n * _count(block) for block, n in layers) - mixers - mlp + _count(final_norm)
    rows = vocab_size + (config.max_positions or 0 if config.positions == "learned" else 0)
    embedding = rows * config.width
    head = 0 if config.tied else vocab_size * config.width
    ranges = 0 if config.state_bits is None else config.carried()
    non_embedding = mixers + mlp + norms + ranges
    return Parameters(embedding + head + non_embedding, embedding, head, non_embedding, mixers, mlp, norms, ranges)


def forward_flops_per_token(config: ModelConfig, vocab_size: int, context: int) -> float:
    """FLOPs of one forward pass per token of a row of `context` tokens, every token scored.

    Matrix products, convolutions and scans; attention at its causal average of context/2 keys. Norms, activations and
    the embedding look-up are not counted.
    """
    forward = 2.0 * config.width * vocab_size
    for block, n in _layers(config):
        forward += n * (block.mixer.flops(context) + (block.mlp.flops() if block.mlp is not None else 0.0))
    return forward


def training_flops_per_token(config: ModelConfig, vocab_size: int, context: int) -> float:
    """Three times the forward pass."""
    return 3.0 * forward_flops_per_token(config, vocab_size, context)


def state_bytes(config: ModelConfig, context: int, dtype: torch.dtype = torch.float32) -> int:
    """Bytes of one row's state after `context` tokens of one document: key-value caches, recurrent and conv states."""
    return sum(n * block.mixer.state_bytes(context, dtype.itemsize) for block, n in _layers(config))


def decode_bytes_per_token(
    config: ModelConfig, vocab_size: int, context: int, dtype: torch.dtype = torch.bfloat16
) -> int:
    """Bytes moved to decode one token of one row after `context` tokens: what bounds decoding at batch size 1.

    Every weight is read once (of the embedding and of learned positions one row each; a tied embedding in full, as the
    head), at `dtype`, or at fp32 where a mixer keeps it so. The state is read, and rewritten or appended to (see
    `Mixer.decode_bytes`). Activations, which stay in cache, are not counted.
    """
    rows = 2 if config.positions == "learned" else 1
    weights = (count_parameters(config, vocab_size).non_embedding + (vocab_size + rows) * config.width) * dtype.itemsize
    kept = sum(n * _count_fp32(block) for block, n in _layers(config)) * (torch.float32.itemsize - dtype.itemsize)
    return weights + kept + sum(n * block.mixer.decode_bytes(context, dtype.itemsize) for block, n in _layers(config))


def _layers(config: ModelConfig) -> list[tuple[Block, int]]:
    """One layer of each kind, without memory, and how often it stands in the pattern."""
    layers = config.layers()
    with torch.device("meta"):
        return [(Block(config, layer), layers.count(layer)) for layer in dict.fromkeys(layers)]


def _count(module: nn.Module | None) -> int:
    if module is None:
        return 0
    return sum(parameter.numel() for parameter in module.parameters())


def _count_fp32(block: Block) -> int:
    return sum(block.mixer.get_parameter(name).numel() for name in block.mixer.fp32)
