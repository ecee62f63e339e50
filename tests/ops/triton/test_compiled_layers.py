"""Layers whose mixers run as kernels are one graph for a compiler, which sees the kernels as ops."""

from __future__ import annotations

import copy

import pytest
import torch
import torch._dynamo

from longspan.models.language_model import LanguageModel, ModelConfig
from longspan.ops import kernels

SIZES = {"width": 32, "heads": 2, "state": 16, "mamba_head_dim": 16, "delta_head_dim": 8, "mlp_width": 32}
# In bf16. Of a head that answers with small numbers the norm after the delta rule makes large ones, roundings included.
BOUNDS = {"M": 2e-2, "m": 2e-2, "D": 1e-1}
# In fp32.
FINE_BOUNDS = {"M": 1e-5, "m": 1e-5, "D": 1e-4}


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize(("letter", "mlp"), [("M", "swiglu"), ("m", "none"), ("D", "swiglu")])
@pytest.mark.usefixtures("served", "small_chunks")
def test_a_layer_with_kernels(device: torch.device, letter: str, mlp: str, bf16: bool) -> None:
    """From the normed stream to the normed stream: sums and norms are one op. In fp32 it is plain ops in fp64, too."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model = LanguageModel(
        ModelConfig.parse({"pattern": letter * 2, "mlp": mlp, **SIZES}, "model"), 29, 0, device=device
    )
    tokens = torch.randint(0, 29, (1, 8), generator=torch.Generator().manual_seed(0)).to(device)
    doc = (torch.arange(8)[None] > 4).int()
    results = []
    others = [(None, "triton", model)]
    if not bf16:
        others.append((None, "plain", copy.deepcopy(model).double()))
    for backend, ops, same in (("aot_eager", "triton", model), *others):
        kernels.choose(ops)
        for block in same.blocks:
            block.compiled = backend
        assert same.blocks[0].chains(device) == (backend is not None)
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            nll, _ = same.loss(tokens, tokens, doc)
        results.append([nll, *torch.autograd.grad(nll, list(same.parameters()))])
    for other in results[1:]:
        for found, expected in zip(results[0], other, strict=True):
            assert (found - expected).norm() <= (BOUNDS if bf16 else FINE_BOUNDS)[letter] * expected.norm()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert not torch._dynamo.utils.counters["graph_break"]
