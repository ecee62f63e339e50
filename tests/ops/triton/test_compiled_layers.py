"""Layers whose mixers run as kernels are one graph for a compiler, which sees the kernels as ops."""

from __future__ import annotations

import pytest
import torch
import torch._dynamo

from longspan.models.language_model import LanguageModel, ModelConfig
from longspan.ops import kernels

SIZES = {"width": 16, "heads": 2, "state": 16, "mamba_head_dim": 16, "mlp_width": 32}


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize(("letter", "mlp"), [("M", "swiglu"), ("m", "none")])
@pytest.mark.usefixtures("served", "small_chunks")
def test_a_layer_with_kernels(device: torch.device, letter: str, mlp: str, bf16: bool) -> None:
    """From the normed stream to the normed stream: in bf16 sums and norms are one op; as plain layers."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model = LanguageModel(
        ModelConfig.parse({"pattern": letter * 2, "mlp": mlp, **SIZES}, "model"), 29, 0, device=device
    )
    tokens = torch.randint(0, 29, (1, 5), generator=torch.Generator().manual_seed(0)).to(device)
    doc = (torch.arange(5)[None] > 2).int()
    results = []
    for backend, ops in ((None, "plain"), ("aot_eager", "triton")):
        kernels.choose(ops)
        for block in model.blocks:
            block.compiled = backend
        assert model.blocks[0].chains(device) == (backend is not None)
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            nll, _ = model.loss(tokens, tokens, doc)
        results.append([nll, *torch.autograd.grad(nll, list(model.parameters()))])
    for found, plain in zip(results[1], results[0], strict=True):
        # The gradient of a layer's decays is a sum of parts that cancel: 1e-5 of parts of about 1e-2.
        bound = 4e-2 * plain.norm() + 1e-4 if bf16 else 1e-4 * plain.norm() + 1e-7
        assert (found - plain).norm() <= bound
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert not torch._dynamo.utils.counters["graph_break"]
