"""The norms' own backward equals autograd's."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from longspan.foundation.randomness import torch_generator
from longspan.models.norms import GatedRMSNorm, RMSNorm


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("shape", [(1, 1, 8), (2, 5, 24), (7, 16)])
def test_gradients_equal_autograd(gated, shape):
    generator = torch_generator(0, "norms")
    x, z, upstream = (torch.randn(shape, generator=generator) for _ in range(3))
    norm = (GatedRMSNorm if gated else RMSNorm)(shape[-1], 1e-5)
    with torch.no_grad():
        norm.weight.copy_(torch.randn(shape[-1], generator=generator))
    inputs = [x.requires_grad_(), *([z.requires_grad_()] if gated else []), norm.weight]
    ours = norm(*inputs[:-1])
    exact = [t.detach().double().requires_grad_() for t in inputs]
    source = exact[0] * F.silu(exact[1]) if gated else exact[0]
    plain = F.rms_norm(source, shape[-1:], exact[-1], eps=1e-5)
    torch.testing.assert_close(ours, plain.float())
    gradients = torch.autograd.grad(ours, inputs, upstream)
    expected = torch.autograd.grad(plain, exact, upstream.double())
    for mine, other in zip(gradients, expected, strict=True):
        torch.testing.assert_close(mine, other.float(), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("gated", [False, True])
def test_with_and_without_gradients_the_result_is_the_same(gated):
    x, z = torch.randn(2, 3, 7, 32, generator=torch_generator(1, "norms"))
    norm = (GatedRMSNorm if gated else RMSNorm)(32, 1e-5)
    norm.init_weights()
    inputs = (x, z) if gated else (x,)
    with torch.no_grad():
        plain = norm(*inputs)
    torch.testing.assert_close(norm(*inputs), plain, atol=1e-6, rtol=1e-6)


def test_low_precision_keeps_its_dtype_and_fp32_statistics():
    x = torch.full((4,), 300.0, dtype=torch.float16)  # its square overflows float16
    norm = RMSNorm(4, 1e-5)
    norm.init_weights()
    assert norm(x).dtype == torch.float16
    torch.testing.assert_close(norm(x), torch.ones(4, dtype=torch.float16))
