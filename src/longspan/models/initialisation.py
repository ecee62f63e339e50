"""What a model starts from: every parameter drawn from a named stream of one seed.

Each part has a stream of its own, so that equal parts of two patterns start equal.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import nn

from longspan.foundation.errors import UserError
from longspan.foundation.randomness import torch_generator
from longspan.models.mixers import Mixer

if TYPE_CHECKING:
    from longspan.models.block import Block
    from longspan.models.language_model import LanguageModel

INIT_STD = 0.02
CALIBRATION_ROWS = 8
"""Of drawn tokens, from whose state the ranges of a rounded one start."""


@torch.no_grad()
def draw_parameters(model: LanguageModel, seed: int) -> None:
    """Give every parameter its first value, on the device where it is.

    Embeddings, learned positions and head are N(0, 0.02); mixers and MLPs draw as they say themselves, unless the
    configuration's `init` is `normal`.

    Raises:
        UserError: a mixer left a parameter without a value.
    """
    for parameter in model.parameters():
        parameter.fill_(torch.nan)
    draws = partial(torch_generator, seed, "init", device=model.embedding.weight.device)
    model.embedding.weight.normal_(0.0, INIT_STD, generator=draws("embedding"))
    if model.position_embedding is not None:
        model.position_embedding.weight.normal_(0.0, INIT_STD, generator=draws("positions"))
    if model.head is not None:
        model.head.weight.normal_(0.0, INIT_STD, generator=draws("head"))
    blocks = model.blocks
    num_residuals = sum(1 if block.mlp is None else 2 for block in blocks)
    for i, block in enumerate(blocks):
        mixer_stream, mlp_stream = (draws(i, part) for part in (block.mixer.name, "mlp"))
        block.init_weights(mixer_stream, mlp_stream, num_residuals)
        if model.config.init == "normal":
            _draw_linears(block, draws(i, "normal"))
    model.norm.init_weights()
    if model.handover is not None:
        model.handover.calibrate(model.state_to_hand_over(draws("handover"), CALIBRATION_ROWS))
    for name, parameter in model.named_parameters():
        if not bool(parameter.isfinite().all()):
            raise UserError(f"`{name}` has no value after initialisation", "a value in every entry", "set it there")


def _draw_linears(block: Block, generator: torch.Generator) -> None:
    """N(0, 0.02) without bias, except in mixers that keep what they drew."""
    kept = {
        part for mixer in block.modules() if isinstance(mixer, Mixer) and mixer.keeps_init for part in mixer.modules()
    }
    for module in block.modules():
        if isinstance(module, nn.Linear) and module not in kept:
            module.weight.normal_(0.0, INIT_STD, generator=generator)
            if module.bias is not None:
                module.bias.zero_()
