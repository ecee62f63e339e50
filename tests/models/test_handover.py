"""A state that is handed over in b bits a number: what later tokens can know is counted to the bit."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from longspan.foundation.errors import UserError
from longspan.foundation.randomness import torch_generator
from longspan.models.budget import count_parameters
from longspan.models.handover import rounded
from longspan.models.language_model import LanguageModel, ModelConfig
from longspan.models.mixers import registered

VOCAB = 29
AT, T = 10, 21
TINY = {"width": 16, "heads": 2, "state": 4, "mamba_head_dim": 4, "delta_head_dim": 4, "window": 5, "mlp": "none"}
CARRYING = [letter for letter, mixer in sorted(registered().items()) if mixer.carried]


def build(pattern: str, bits: int = 2, at: int = AT, **settings: object) -> LanguageModel:
    config = ModelConfig.parse({"pattern": pattern, **TINY, "state_bits": bits, "handover": at, **settings}, "model")
    return LanguageModel(config, VOCAB)


def drawn(*shape: int, name: object = 0) -> Tensor:
    return torch.randint(0, VOCAB, shape, generator=torch_generator(0, "handover", name))


@pytest.mark.parametrize("bits", [1, 2, 3])
def test_a_number_becomes_the_nearest_of_so_many_levels(bits: int) -> None:
    values, largest = torch.linspace(-4, 4, 4001), torch.tensor(2.0)
    found = rounded(values, largest=largest, bits=bits)
    levels = found.unique()
    assert len(levels) == 2**bits
    torch.testing.assert_close(levels, -levels.flip(0))
    distance = (values.clamp(-2, 2)[:, None] - levels).abs().min(1).values
    torch.testing.assert_close((values.clamp(-2, 2) - found).abs(), distance)


def test_gradients_pass_the_rounding_as_if_it_were_clipping() -> None:
    values, largest = torch.tensor([-3.0, -0.3, 0.4, 5.0]).requires_grad_(), torch.tensor(2.0).requires_grad_()
    found = rounded(values, largest=largest, bits=2)
    assert found.tolist() == [-1.5, -0.5, 0.5, 1.5]
    found.sum().backward()
    assert values.grad is not None
    assert largest.grad is not None
    assert values.grad.tolist() == [0, 1, 1, 0]
    # Of what is clipped its level; of the others the rounding, in units of the range.
    assert largest.grad.item() == pytest.approx(-0.75 + 0.75 + (-0.25 + 0.15) + (0.25 - 0.2))


@pytest.mark.parametrize("pattern", [letter for letter in CARRYING if letter not in "AS"])
def test_later_tokens_see_no_more_of_earlier_ones_than_the_bits(pattern: str) -> None:
    """All that 600 beginnings leave behind for one end are as many outcomes as the bits can tell apart."""
    settings = {"width": 4, "state": 1, "expand": 1, "mamba_head_dim": 4, "mixers": {
        "m": {"mamba1_state": 1}, "D": {"delta_heads": 1, "delta_head_dim": 2, "expand_v": 1}}}  # fmt: skip
    model = build(pattern, bits=1, **settings)
    bits = model.handed_over_bits()
    assert bits in (4, 8)
    rows = 600
    tokens = torch.cat([drawn(rows, AT), drawn(1, T - AT, name="end").expand(rows, -1)], dim=1)
    with torch.no_grad():
        hidden_BTD = model(tokens)[0][:, AT:]
    outcomes = len(torch.unique(hidden_BTD.flatten(1).round(decimals=4), dim=0))
    assert 1 < outcomes <= 2**bits


def test_attention_hands_over_every_key_and_value_rounded() -> None:
    model = build("A", bits=1, at=1, width=2, heads=1)
    assert model.handed_over_bits() == 4
    tokens = torch.stack([torch.arange(VOCAB), torch.full((VOCAB,), 3)], dim=1)
    with torch.no_grad():
        later_BD = model(tokens)[0][:, 1]
    assert 1 < len(torch.unique(later_BD.round(decimals=5), dim=0)) <= 2**4


@pytest.mark.parametrize("pattern", [*CARRYING, "CM", "[AM]", "AMD"])
def test_decoding_and_prefill_cut_anywhere_equal_one_pass(pattern: str) -> None:
    model, tokens = build(pattern), drawn(3, T)
    with torch.no_grad():
        whole, _ = model(tokens)
        for cuts in ([0, 4, 12, 13, T], [0, AT, T], [0, AT - 1, AT, AT + 1, T], list(range(T + 1))):
            state, parts = model.initial_state(), []
            for start, end in itertools.pairwise(cuts):
                part, state = model(tokens[:, start:end], None, state)
                parts.append(part)
            torch.testing.assert_close(torch.cat(parts, 1), whole, atol=2e-5, rtol=0)


@pytest.mark.parametrize("pattern", CARRYING)
def test_ids_of_one_document_change_nothing(pattern: str) -> None:
    model, tokens = build(pattern), drawn(3, T)
    segments = model.segments(tokens, torch.zeros(3, T, dtype=torch.int32), keep_ids=True)
    with torch.no_grad():
        torch.testing.assert_close(model(tokens, segments)[0], model(tokens)[0], atol=2e-5, rtol=0)


@pytest.mark.parametrize("pattern", [*CARRYING, "AMD"])
@pytest.mark.parametrize("begins", [AT - 3, AT, AT + 3])
def test_a_document_of_its_own_sees_what_it_would_alone(pattern: str, begins: int) -> None:
    """Its first tokens may be handed over, those of the document before it never reach it."""
    model, tokens = build(pattern, at=AT), drawn(2, T)
    doc_BT = (torch.arange(T) >= begins).int().expand(2, T)
    other = torch.where(doc_BT == 0, (tokens + 7) % VOCAB, tokens)
    with torch.no_grad():
        first, second = model(tokens, doc_BT)[0], model(other, doc_BT)[0]
        assert torch.equal(first[:, begins:], second[:, begins:])
        if begins >= AT:
            alone = LanguageModel(ModelConfig.parse({"pattern": pattern, **TINY}, "model"), VOCAB)
            expected = alone(tokens[:, begins:])[0]
            torch.testing.assert_close(first[:, begins:], expected, atol=2e-5, rtol=0)


@pytest.mark.parametrize("pattern", CARRYING)
def test_what_comes_after_teaches_what_stood_before(pattern: str) -> None:
    model, tokens = build(pattern), drawn(2, T) % 14
    # Tokens of their own before the handover: their embeddings learn through the state alone.
    tokens[:, :AT] += 14
    model(tokens)[0][:, AT + 2 :].square().sum().backward()
    learned = model.embedding.weight.grad
    assert learned is not None
    assert learned[14:].abs().sum() > 0
    assert model.handover is not None
    assert model.handover.log_range.grad is not None


def test_the_rounding_is_what_changes_the_answers() -> None:
    """With many bits the rounded state is the state, before the handover nothing is rounded."""
    fine, exact = build("G", bits=16), LanguageModel(ModelConfig.parse({"pattern": "G", **TINY}, "model"), VOCAB)
    tokens = drawn(2, T)
    with torch.no_grad():
        fine.handover.log_range.fill_(math.log(2.0))  # type: ignore[union-attr]
        torch.testing.assert_close(fine(tokens)[0], exact(tokens)[0], atol=1e-3, rtol=0)
        coarse = build("G", bits=1)(tokens)[0]
    assert torch.equal(coarse[:, :AT], exact(tokens)[0][:, :AT])
    assert (coarse - exact(tokens)[0])[:, AT:].abs().max() > 1e-2


@pytest.mark.parametrize(
    ("pattern", "bits"), [("M", 3 * 32 * 4), ("A", 3 * 2 * AT * 16), ("S", 3 * 2 * 4 * 16), ("CM", 3 * 32 * 4)]
)
def test_the_bits_are_those_of_every_number_but_the_convolutions(pattern: str, bits: int) -> None:
    assert build(pattern, bits=3).handed_over_bits() == bits


def test_its_ranges_are_parameters_that_are_counted_and_drawn_from_the_seed() -> None:
    model = build("AM")
    counted = count_parameters(model.config, VOCAB)
    assert counted.total == sum(parameter.numel() for parameter in model.parameters())
    # Keys, values, and the state.
    assert counted.ranges == 3
    assert model.handover is not None
    other = build("AM").handover
    assert other is not None
    assert torch.equal(model.handover.log_range, other.log_range)
    _, spared = model.parameter_groups(0.1)
    assert any(each is model.handover.log_range for each in spared["params"])


def test_a_mixer_that_miscounts_its_state_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registered()["L"], "carried", 1)
    with pytest.raises(UserError, match=r"states of 2 tensors where mixers say 1\n.*\n.*set `carried`"):
        build("L")


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"state_bits": 0}, "model.state_bits = 0"),
        ({"handover": None}, "`state_bits` without `handover`"),
        ({"state_bits": None}, "`handover` without `state_bits`"),
        ({"pattern": "CC"}, "state_bits = 2 with the pattern CC"),
    ],
)
def test_what_has_no_meaning_is_refused(given: dict[str, object], words: str) -> None:
    with pytest.raises(UserError, match=words):
        ModelConfig.parse({"pattern": "M", **TINY, "state_bits": 2, "handover": AT, **given}, "model")
