"""What two forms of one scan are compared by: values and gradients of all they take and return."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor


def values_and_gradients(
    scan: Callable[..., tuple[Tensor, Tensor]],
    given: Mapping[str, Tensor],
    state_argument: str | None,
    **settings: Any,
) -> list[Tensor]:
    """Both outputs, then the gradients of a random but fixed linear loss on them.

    `given`: the inputs by name in the scan's order, the state before it last, which is its `state_argument`
    (None: it begins with nothing).
    """
    *inputs, state = (value.detach().clone().requires_grad_() for value in given.values())
    if state_argument is not None:
        settings[state_argument] = state
    outputs = scan(*inputs, **settings)
    generator = torch.Generator().manual_seed(99)
    weights = [torch.randn(z.shape, generator=generator, dtype=torch.float64).to(z.dtype) for z in outputs]
    wanted = inputs if state_argument is None else [*inputs, state]
    loss = sum((z * weight).sum() for z, weight in zip(outputs, weights, strict=True))
    gradients = torch.autograd.grad(loss, wanted, allow_unused=True)
    return [*outputs, *(torch.zeros_like(w) if g is None else g for w, g in zip(wanted, gradients, strict=True))]


def assert_same(got: Sequence[Tensor], expected: Sequence[Tensor], tolerance: float = 1e-11) -> None:
    """Within `tolerance` of the largest entry, or of 1 where that is larger."""
    for i, (one, other) in enumerate(zip(got, expected, strict=False)):
        scale = other.abs().max().clamp_min(1.0)
        assert (one.double() - other.double()).abs().max() <= tolerance * scale, f"result {i}"
