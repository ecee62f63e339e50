"""`torch.compile` takes a model with any of the scans and changes nothing: they stay as they are written."""

from __future__ import annotations

import shutil

import pytest
import torch

DOC = torch.tensor([[0] * 8 + [1] + [2] * 7 + [3] * 5, [0] * 21], dtype=torch.int32)


@pytest.mark.slow
@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="torch.compile needs a C++ compiler")
@pytest.mark.parametrize("letter", ["M", "D", "C"])
def test_a_compiled_loss_has_the_same_value_and_gradients(letter, tiny, tokens):
    model, batch = tiny(letter), tokens(2, 21)
    parameters = list(model.parameters())
    results = []
    for loss in (model.loss, torch.compile(model.loss, dynamic=False)):
        nll, _ = loss(batch, batch, DOC)
        results.append((nll, torch.autograd.grad(nll, parameters)))
    torch.testing.assert_close(results[0], results[1], atol=1e-4, rtol=1e-4)
