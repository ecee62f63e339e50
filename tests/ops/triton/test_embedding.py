"""The gradient of an embedding by a kernel: every place counts once, at its token, however the tokens are spread."""

from __future__ import annotations

import pytest
import torch

from longspan.ops import embedding as op

VOCAB, WIDTH = 11, 20


@pytest.fixture(autouse=True)
def few_places(monkeypatch):
    """Tokens that lie in the places of several programs even at small shapes."""
    from longspan.ops.triton import embedding as kernels

    monkeypatch.setattr(op, "FEWEST_PLACES", 1)
    monkeypatch.setattr(kernels, "PLACES", 4)
    monkeypatch.setattr(kernels, "COLUMNS", 16)


def spread(kind: str) -> torch.Tensor:
    if kind == "one token":
        return torch.full((3, 7), 5)
    if kind == "every token once":
        return torch.randperm(VOCAB, generator=torch.Generator().manual_seed(0))[None]
    most = 2 if kind == "few tokens" else VOCAB
    return torch.randint(0, most, (3, 7), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("kind", ["one token", "every token once", "few tokens", "any"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_matches_fp64(kind, dtype, assert_same, device, normal, served):
    tokens = spread(kind)
    on_device = tokens.to(device)
    assert_same(
        lambda weight: [op.embedding(on_device, weight)],
        lambda weight: [torch.nn.functional.embedding(tokens, weight)],
        [normal(VOCAB, WIDTH)],
        [dtype],
    )


@pytest.mark.parametrize("before", range(5))
@pytest.mark.parametrize("times", range(1, 10))
def test_a_token_may_begin_and_end_anywhere_among_the_programs(before, times, device, served):
    tokens = torch.tensor([0] * before + [1] * times + [2] * 3, device=device)
    weight = torch.zeros(4, WIDTH, device=device, requires_grad=True)
    slopes = 2.0 ** torch.arange(len(tokens), device=device)[:, None].expand(-1, WIDTH)
    (found,) = torch.autograd.grad(op.embedding(tokens, weight), weight, slopes)
    expected = torch.stack([slopes[tokens == token].sum(0) for token in range(4)])
    assert torch.equal(found, expected)


def test_a_part_of_wider_gradients_needs_no_copy_of_its_own(device, normal, served):
    tokens = spread("any").to(device)
    weight = normal(VOCAB, WIDTH).float().to(device).requires_grad_()
    wide = normal(3, 7, 2 * WIDTH).float().to(device)
    (found,) = torch.autograd.grad(op.embedding(tokens, weight), weight, wide[..., WIDTH:])
    (same,) = torch.autograd.grad(op.embedding(tokens, weight), weight, wide[..., WIDTH:].contiguous())
    assert torch.equal(found, same)


def test_the_compiler_sees_through(device, normal, served):
    from longspan.ops.triton.embedding import embedding

    weight = normal(VOCAB, WIDTH).float().to(device).requires_grad_()
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(embedding, (spread("any").to(device), weight), test_utils=tests)
