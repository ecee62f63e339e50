"""The state handed over in a few bits a number: so that what a state can hold binds, and is known to the bit.

At one position of every row all that later tokens can know of earlier ones is the state: keys and values, or the
recurrent state. Rounded there to b bits a number, a state of n numbers is one of 2^(n b), whatever its dtype.

Legend: B rows.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from longspan.foundation.errors import UserError
from longspan.models.mixers.base import visited
from longspan.models.state import ModelState

SMALLEST_RANGE = 1e-6
"""Where a range starts if all numbers are 0."""


class Handover(nn.Module):
    """Rounds the state of every layer to 2^bits evenly spaced levels between -range and range.

    The levels are (2 i + 1) / 2^bits - 1 times the range, i from 0 to 2^bits - 1: none is 0, so that one bit is a sign.
    The range of a tensor is one learned number for all items, which says nothing about any of them. Gradients pass the
    rounding as if it were clipping alone (straight-through, Bengio et al. 2013) and reach the range as in learned step
    size quantisation (Esser et al. 2020, eq. 3). Windows of convolutions hand nothing over, see
    `MixerState.handed_over`.

    Attributes:
        at: tokens of a row before it is handed over.
        bits: of each number.
    """

    def __init__(self, num_tensors: int, at: int, bits: int) -> None:
        super().__init__()
        self.at, self.bits = at, bits
        self.log_range = nn.Parameter(torch.empty(num_tensors))

    def forward(self, state: ModelState) -> ModelState:
        """The state as it is handed over."""
        ranges = iter(self.log_range.float().exp())

        def next_rounded(tensor: Tensor) -> Tensor:
            return rounded(tensor, largest=next(ranges), bits=self.bits)

        after = tuple(layer.handed_over(next_rounded) for layer in state.layers)
        return ModelState(after, state.past)

    @torch.no_grad()
    def calibrate(self, state: ModelState) -> None:
        """Sets every range to twice the mean magnitude in a state, where learned step size quantisation starts.

        Raises:
            UserError: a mixer's state has another number of tensors than it says.
        """
        tensors = [tensor for layer in state.layers for tensor in visited(layer.handed_over)]
        if len(tensors) != self.log_range.numel():
            given = f"states of {len(tensors)} tensors where mixers say {self.log_range.numel()}"
            raise UserError(given, "as many as `carried` says", "set `carried` of your mixer")
        means = torch.stack([tensor.float().abs().mean() for tensor in tensors])
        self.log_range.copy_((2 * means).clamp(min=SMALLEST_RANGE).log())

    def num_bits(self, state: ModelState) -> int:
        """Bits in which one row of a state is handed over."""
        return self.bits * sum(tensor[0].numel() for layer in state.layers for tensor in visited(layer.handed_over))


def rounded(values: Tensor, *, largest: Tensor, bits: int) -> Tensor:
    """The nearest of 2^bits levels between -largest and largest; differentiable, see `Handover`."""
    steps = 2 ** (bits - 1)
    clipped = (values / largest).clamp(-1, 1)
    # The largest of all belongs to the highest level.
    level = ((clipped * steps).floor().clamp(max=steps - 1) + 0.5) / steps
    through: Tensor = clipped + (level - clipped).detach()
    return largest * through
