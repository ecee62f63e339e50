"""Layers compiled for training: no graph breaks, one compilation a kind, and what plain layers give."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
import torch._dynamo

from longspan.models.language_model import LanguageModel
from longspan.models.mixers import attention as mixer
from longspan.ops import attention as ops

DOC = torch.tensor([[0] * 8 + [1] + [2] * 7 + [3] * 5, [0] * 21], dtype=torch.int32)
LETTERS = ["A", "S", "M", "m", "G", "L", "D", "C", "[AM]"]


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


def gradients(
    model: LanguageModel, batch: torch.Tensor, doc: torch.Tensor, autocast: bool = False
) -> list[torch.Tensor]:
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        nll, _ = model.loss(batch, batch, doc)
    return [nll, *torch.autograd.grad(nll, list(model.parameters()))]


def compiled(model: LanguageModel, on: bool) -> LanguageModel:
    for block in model.blocks:
        block.compiled = "aot_eager" if on else None
    return model


def assert_compiled_alike(
    model: LanguageModel, batches: list[torch.Tensor], docs: list[torch.Tensor], autocast: bool = False
) -> None:
    plain = [gradients(model, *each, autocast) for each in zip(batches, docs, strict=True)]
    try:
        compiled(model, True)
        fused = [gradients(model, *each, autocast) for each in zip(batches, docs, strict=True)]
    finally:
        compiled(model, False)
    torch.testing.assert_close(fused, plain, atol=1e-5, rtol=1e-4)
    assert not torch._dynamo.utils.counters["graph_break"]


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("letter", LETTERS)
def test_every_mixer(letter: str, autocast: bool, tiny: Callable[..., LanguageModel], tokens) -> None:
    assert_compiled_alike(tiny(letter), [tokens(2, 21)], [DOC], autocast)


@pytest.mark.parametrize("settings", [{"mlp": "none"}, {"mlp": "gelu", "norm": "layernorm"}])
def test_other_layers(settings: dict[str, object], tiny: Callable[..., LanguageModel], tokens) -> None:
    assert_compiled_alike(tiny("AM", **settings), [tokens(2, 21)], [DOC])


def test_layers_of_one_kind_share_a_compilation_and_batches_too(tiny: Callable[..., LanguageModel], tokens) -> None:
    batches = [tokens(2, 21, name=i) for i in range(3)]
    assert_compiled_alike(tiny("AAMMA"), batches, [DOC, DOC.flip(0), torch.zeros_like(DOC)])
    # On a CPU what stands before and after the mixer, which is the same for A and M.
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2


def attend_as_on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """FlexAttention, in the form that the compiler uses where it has no kernel."""
    import torch.nn.attention.flex_attention as flex

    monkeypatch.setattr(flex, "_validate_device", lambda *tensors: None)
    monkeypatch.setattr(ops, "_check", lambda *arguments: None)
    monkeypatch.setattr(mixer.Attention, "traceable", lambda self, device: True)
    monkeypatch.setattr(mixer, "flex_serves", lambda q, dropout: True)


@pytest.mark.parametrize(("letter", "settings"), [("A", {}), ("A", {"positions": "alibi"}), ("S", {"window": 40})])
def test_attention_with_a_block_mask_is_one_graph_for_every_batch(
    letter: str, settings: dict[str, object], tiny: Callable[..., LanguageModel], tokens, monkeypatch
) -> None:
    model = tiny(letter, **settings)
    batches = [tokens(1, 150, name=i) for i in range(3)]
    docs = [(torch.arange(150)[None] > 20 * i + 10).int() for i in range(3)]
    plain = [gradients(model, *each) for each in zip(batches, docs, strict=True)]
    attend_as_on_cuda(monkeypatch)
    try:
        compiled(model, True)
        fused = [gradients(model, *each) for each in zip(batches, docs, strict=True)]
    finally:
        compiled(model, False)
    torch.testing.assert_close(fused, plain, atol=1e-4, rtol=1e-4)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_only_training_is_compiled(tiny: Callable[..., LanguageModel], tokens) -> None:
    model = compiled(tiny("AM"), True)
    try:
        with torch.no_grad():
            model.loss(tokens(2, 21), tokens(2, 21), DOC)
        model.next_logits(tokens(2, 3), model.initial_state())
    finally:
        compiled(model, False)
    assert not torch._dynamo.utils.counters["stats"]["unique_graphs"]
