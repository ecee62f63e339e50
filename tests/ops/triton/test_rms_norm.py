"""The norms' kernels say what the plain norms say in fp64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from longspan.models.norms import GatedRMSNorm, RMSNorm

FP32, BF16 = torch.float32, torch.bfloat16


def norm(kind: type[RMSNorm], *tensors: Tensor) -> Tensor:
    """The norm of what comes before the last tensor, its weight."""
    module = kind(tensors[-1].shape[0], 1e-5)
    del module.weight
    module.weight = tensors[-1]
    return module(*tensors[:-1])


@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("kind", [RMSNorm, GatedRMSNorm])
def test_matches_fp64(kind, dtype, assert_same, monkeypatch, normal, served):
    from longspan.ops.triton import rms_norm

    monkeypatch.setattr(rms_norm, "PROGRAMS", 3)
    num_inputs = 2 if kind is GatedRMSNorm else 1
    tensors = [normal(2, 4, 24, seed=i) for i in range(num_inputs)]

    def fp64(*z: Tensor) -> list[Tensor]:
        x = z[0] if kind is RMSNorm else z[0] * torch.nn.functional.silu(z[1])
        return [torch.nn.functional.rms_norm(x, x.shape[-1:], z[-1], 1e-5)]

    assert_same(lambda *z: [norm(kind, *z)], fp64, [*tensors, normal(24, seed=5)], [*[dtype] * num_inputs, FP32])


def test_rows_of_a_wider_tensor_need_no_copy(device, normal, served):
    y, z = normal(2, 3, 8).float().to(device), normal(2, 3, 20, seed=1).float().to(device)[..., 4:12]
    weight = normal(8).float().to(device)
    assert torch.equal(norm(GatedRMSNorm, y, z, weight), norm(GatedRMSNorm, y, z.contiguous(), weight))


def test_under_autocast_it_hands_on_what_a_matmul_takes(device, normal, served):
    x, weight = normal(5, 16).float().to(device), normal(16).float().to(device)
    exact = norm(RMSNorm, x, weight)
    with torch.autocast(device.type, dtype=BF16):
        rounded = norm(RMSNorm, x, weight)
    assert rounded.dtype == BF16
    torch.testing.assert_close(rounded.float(), exact, rtol=2**-7, atol=0)


def test_the_compiler_sees_through(device, normal, served):
    from longspan.ops.triton.rms_norm import rms_norm

    y, z, weight = (z.float().to(device).requires_grad_() for z in (normal(3, 8), normal(3, 8, seed=1), normal(8)))
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(rms_norm, (y, z, weight, 1e-5, BF16), test_utils=tests)
