"""The sum over features equals the sum over a tensor that holds them all."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from longspan.foundation.errors import UserError
from longspan.ops import decay_mixture as module
from longspan.ops.decay_mixture import decay_mixture


def inputs(batch=2, time=7, channels=5, features=3, largest_delta=2.0, dtype=torch.float64) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(batch, time, features, generator=generator, dtype=torch.float64)
    delta = torch.rand(batch, time, generator=generator, dtype=torch.float64) * largest_delta
    A = -0.1 - torch.rand(channels, features, generator=generator, dtype=torch.float64) * 5
    return tuple(z.to(dtype).requires_grad_() for z in (weight, delta, A))


def whole(weight: Tensor, delta: Tensor, A: Tensor) -> Tensor:
    return (weight[:, :, None] * (delta[..., None, None] * A).exp().clamp(1e-6, 1.0)).sum(-1)


@pytest.mark.parametrize("elements", [1, 40, 10**6])
@pytest.mark.parametrize("largest_delta", [2.0, 10.0])
def test_values_and_gradients_equal_those_of_the_whole_tensor(elements, largest_delta, monkeypatch):
    """A step of 10 at a rate of 5 lies far below the floor."""
    monkeypatch.setattr(module, "CACHED_ELEMENTS", elements)
    leaves = inputs(largest_delta=largest_delta)
    outputs = [function(*leaves) for function in (decay_mixture, whole)]
    weights = torch.randn(outputs[0].shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    gradients = [torch.autograd.grad((y * weights).sum(), leaves) for y in outputs]
    torch.testing.assert_close(outputs[0], outputs[1], atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(gradients[0], gradients[1], atol=1e-12, rtol=1e-12)


def test_gradients_pass_gradcheck():
    assert torch.autograd.gradcheck(decay_mixture, inputs())


def test_fp32_is_as_precise_as_fp32():
    exact = whole(*inputs())
    assert (decay_mixture(*inputs(dtype=torch.float32)).double() - exact).abs().max() <= 2e-6
    assert decay_mixture(*inputs(dtype=torch.bfloat16)).dtype == torch.float32


def test_shapes_that_do_not_fit_are_refused():
    weight, delta, A = inputs()
    with pytest.raises(UserError, match="weight, delta, A of shapes"):
        decay_mixture(weight, delta, A[:, :2])
