"""How matrices lie in memory: a token is decoded on a CPU as fast as its weights are read.

A product with one row of inputs reads every weight once. MKL reads short rows at a third of the rate of long ones, and
a matrix with more rows than columns has long ones once it lies column by column (docs/LOG.md, 2026-11-30).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from longspan.models.language_model import LanguageModel
from longspan.models.mixers import Mixer


@torch.no_grad()
def lay_out_for_decoding(model: LanguageModel) -> None:
    """Have every matrix with more rows than columns lie column by column, in place; values, shapes and names stay.

    For answers in fp32 on a CPU. Products of one or two rows gain up to 3 times, those of many rows nothing; of four to
    eight rows in models wider than 700 they lose up to a fifth. In bf16 nothing gains.
    """
    for weight in _multiplied(model):
        if weight.shape[0] > weight.shape[1]:
            weight.data = weight.data.t().contiguous().t()


def _multiplied(model: LanguageModel) -> Iterator[Tensor]:
    yield model.head_weight
    for module in model.modules():
        if isinstance(module, nn.Linear):
            yield module.weight
        elif isinstance(module, Mixer):
            yield from (module.get_parameter(name) for name in module.matrices)
