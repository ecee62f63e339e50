"""`torch.compile` takes a model with any mixer and changes nothing: scans stay as they are written."""

from __future__ import annotations

import shutil

import pytest
import torch

from longspan.models.language_model import LanguageModel
from longspan.ops import attention

DOC = torch.tensor([[0] * 8 + [1] + [2] * 7 + [3] * 5, [0] * 21], dtype=torch.int32)


@pytest.mark.slow
@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="torch.compile needs a C++ compiler")
@pytest.mark.timeout(600)
@pytest.mark.parametrize("letter", ["A", "S", "M", "m", "G", "L", "D", "C", "[AM]"])
def test_a_compiled_loss_has_the_same_value_and_gradients(letter, tiny, tokens):
    assert_same_when_compiled(tiny(letter), tokens(2, 21))


@pytest.mark.slow
@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="torch.compile needs a C++ compiler")
@pytest.mark.timeout(600)
@pytest.mark.parametrize(("letter", "cost"), [("A", 0), ("S", 0), ("S", 10**9)])
def test_attention_in_pieces_too(letter, cost, tiny, tokens, monkeypatch):
    """Document by document, and in blocks of a window."""
    monkeypatch.setattr(attention, "CALL_COST_PAIRS", cost)
    monkeypatch.setattr(attention, "GATHER_COST_PAIRS", 0)
    monkeypatch.setattr(attention, "SMALLEST_BLOCK", 4)
    assert_same_when_compiled(tiny(letter, window=3), tokens(2, 21))


def assert_same_when_compiled(model: LanguageModel, batch: torch.Tensor) -> None:
    # Otherwise the compiler gives up after so many models and runs the next ones as they are.
    torch._dynamo.reset()
    parameters = list(model.parameters())
    results = []
    for loss in (model.loss, torch.compile(model.loss, dynamic=False)):
        nll, _ = loss(batch, batch, DOC)
        results.append((nll, torch.autograd.grad(nll, parameters)))
    torch.testing.assert_close(results[0], results[1], atol=1e-4, rtol=1e-4)
