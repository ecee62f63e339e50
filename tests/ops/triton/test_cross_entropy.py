"""Logits turned into gradients in place: against fp64, for any chunk, vocabulary and choice of targets."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from longspan.ops.linear_cross_entropy import linear_cross_entropy


def targets_of(tokens: int, vocab: int, ignored: float, device: torch.device) -> torch.Tensor:
    generator = torch.Generator().manual_seed(tokens)
    targets = torch.randint(0, vocab, (tokens,), generator=generator)
    targets[torch.rand(tokens, generator=generator) < ignored] = -100
    return targets.to(device)


@pytest.mark.parametrize(("dtype", "roundings"), [(torch.float32, 1), (torch.bfloat16, 2)])
@pytest.mark.parametrize(
    ("tokens", "vocab", "chunk", "ignored"), [(9, 37, None, 0.3), (7, 64, 3, 0.0), (3, 11, 1, 1.0), (5, 100, 5, 0.5)]
)
@pytest.mark.parametrize("reduction", ["sum", "none"])
@pytest.mark.usefixtures("served")
def test_the_loss_and_its_gradients(
    device, dtype, roundings, tokens, vocab, chunk, ignored, reduction, normal, assert_same
):
    targets = targets_of(tokens, vocab, ignored, device)

    def kernel(hidden: torch.Tensor, weight: torch.Tensor) -> list[torch.Tensor]:
        return [linear_cross_entropy(hidden, weight, targets, chunk=chunk, reduction=reduction)]

    def plain(hidden: torch.Tensor, weight: torch.Tensor) -> list[torch.Tensor]:
        return [F.cross_entropy(hidden @ weight.T, targets.cpu(), ignore_index=-100, reduction=reduction)]

    tensors = [normal(tokens, 16), normal(vocab, 16, seed=1)]
    # Without a target there is neither loss nor gradient.
    zeros = range(3) if ignored == 1.0 else ()
    assert_same(kernel, plain, tensors, [dtype, dtype], roundings=roundings, zeros=zeros)


@pytest.mark.usefixtures("served")
def test_the_gradient_of_an_fp32_weight_is_not_rounded_to_the_dtype_of_the_activations(device, normal):
    hidden = normal(6, 16).to(device, torch.bfloat16).requires_grad_()
    weight = normal(40, 16, seed=1).to(device, torch.float32).requires_grad_()
    linear_cross_entropy(hidden, weight, targets_of(6, 40, 0.0, device), chunk=3).backward()
    assert weight.grad is not None
    assert weight.grad.dtype == torch.float32
    assert not torch.equal(weight.grad, weight.grad.bfloat16().float())


@pytest.mark.usefixtures("served")
def test_blocks_of_a_wide_vocabulary(device, normal, assert_same, monkeypatch):
    from longspan.ops.triton import cross_entropy

    if device.type == "cpu":
        monkeypatch.setattr(cross_entropy, "CUTS", {False: cross_entropy.Cut(16, 1, 2)})
    targets = targets_of(4, 50, 0.2, device)
    assert_same(
        lambda h, w: [linear_cross_entropy(h, w, targets)],
        lambda h, w: [F.cross_entropy(h @ w.T, targets.cpu(), ignore_index=-100, reduction="sum")],
        [20 * normal(4, 16), normal(50, 16, seed=1)],
        [torch.float32, torch.float32],
    )
