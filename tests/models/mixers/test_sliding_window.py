"""Sliding-window attention: the reach of a window, a bounded cache, and attention itself where the window is long."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from longspan.foundation.errors import UserError
from longspan.foundation.randomness import torch_generator
from longspan.models import budget
from longspan.models.language_model import LanguageModel, ModelConfig
from longspan.ops import attention as op

T = 40
DOC = torch.tensor([0] * 9 + [1] + [2] * 19 + [3] * 11, dtype=torch.int32)
ISOLATIONS = ("full", "attention", "state", "none")
WINDOWS = [1, 3, 8, T, 2 * T]


@pytest.fixture(params=["blocks", "masked"], autouse=True)
def way(request, monkeypatch):
    """Short blocks of queries wherever the window allows, and none."""
    monkeypatch.setattr(op, "CALL_COST_PAIRS", 10**9)
    monkeypatch.setattr(op, "GATHER_COST_PAIRS", 0 if request.param == "blocks" else 10**9)
    monkeypatch.setattr(op, "SMALLEST_BLOCK", 4)


def difference(model, before, after, **rules):
    with torch.no_grad():
        return (model(before, **rules)[0] - model(after, **rules)[0]).abs().amax((0, 2))


def run(model, batch, doc, state, lengths, isolation="full"):
    """Hidden states of chunks of these lengths, one after the other, and the last state."""
    parts = []
    with torch.no_grad():
        for part, ids in zip(batch.split(lengths, 1), doc.split(lengths, 1), strict=True):
            hidden, state = model(part, ids, state, isolation=isolation)
            parts.append(hidden)
    return torch.cat(parts, 1), state


@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("window", [1, 3, 8])
def test_a_layer_reaches_exactly_window_minus_one_tokens_back(window, layers, tiny, tokens):
    model, before = tiny("S" * layers, window=window), tokens(1, T)
    after = torch.where(torch.arange(T) == 5, (before + 7) % 29, before)
    felt = difference(model, before, after) > 0
    reach = layers * (window - 1)
    assert felt.tolist() == [5 <= t <= 5 + reach for t in range(T)]


@pytest.mark.parametrize("window", WINDOWS)
def test_neither_the_future_nor_another_document_changes_a_bit(window, tiny, tokens):
    model, before = tiny("SS", window=window), tokens(1, T)
    later = torch.arange(T) >= 17
    after = torch.where(later, (before + 7) % 29, before)
    assert not difference(model, before, after)[~later].any()
    inside = DOC == 2
    gradients = []
    for batch in (before, torch.where(inside, (before + 7) % 29, before)):
        model.embedding.weight.grad = None
        embedded = model.embedding(batch).detach().requires_grad_()
        x = embedded
        for block in model.blocks:
            x, _ = block(x, model.segments(batch, DOC[None]), None)
        slope = torch.randn(x.shape, generator=torch_generator(0, "slope"))
        gradients.append((x.detach(), torch.autograd.grad(x, embedded, slope)[0]))
    for one, other in zip(*gradients, strict=True):
        assert torch.equal(one[:, ~inside], other[:, ~inside])
        assert not torch.equal(one[:, inside], other[:, inside])


@pytest.mark.parametrize("window", [T, T + 1, 5 * T])
@pytest.mark.parametrize("positions", ["rope", "alibi"])
def test_a_window_as_long_as_the_row_is_attention(window, positions, tokens):
    settings = {"width": 16, "heads": 2, "mlp_width": 16, "positions": positions, "window": window}
    ours, full = (LanguageModel(ModelConfig.parse({"pattern": p, **settings}, "model"), 29) for p in ("SS", "AA"))
    ours.load_state_dict(full.state_dict())
    batch = tokens(2, T)
    results = []
    for model in (ours, full):
        nll, _ = model.loss(batch, batch, DOC.expand(2, -1))
        results.append([nll, *torch.autograd.grad(nll, list(model.parameters()))])
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)
    assert budget.forward_flops_per_token(ours.config, 29, T) == budget.forward_flops_per_token(full.config, 29, T)
    for context in range(1, window):
        assert budget.state_bytes(ours.config, context) == budget.state_bytes(full.config, context)


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("positions", ["rope", "nope", "alibi", "learned"])
def test_any_chunked_prefill_and_decode_equal_one_pass(window, positions, tiny, tokens):
    model = tiny("SS", window=window, positions=positions, max_positions=T, kv_heads=1)
    doc, batch = torch.stack([DOC, DOC.flip(0) + 10]), tokens(2, T)
    for isolation, lengths in itertools.product(ISOLATIONS, ([T - 9] + [1] * 9, [7, 1, 12, 2, 18], [1] * T)):
        with torch.no_grad():
            whole, _ = model(batch, doc, isolation=isolation)
        parts, _ = run(model, batch, doc, model.initial_state(), lengths, isolation)
        assert (parts - whole).abs().max() <= 1e-5, (isolation, lengths)


@pytest.mark.parametrize("window", WINDOWS)
def test_attention_and_windows_of_other_lengths_share_a_stream_of_documents(window, tokens):
    """Each layer caches another number of keys of the same documents."""
    other = {"B": {"mixer": "sliding_window_attention", "window": 5}}
    # As in `tiny`: embeddings of 0.02 alone would let every norm magnify rounding errors.
    config = ModelConfig(pattern="SAB", width=16, heads=2, window=window, mixers=other, embedding_multiplier=16.0)
    model = LanguageModel(config, 29)
    doc, batch = torch.stack([DOC, DOC.flip(0) + 10]), tokens(2, T)
    with torch.no_grad():
        whole, _ = model(batch, doc)
    parts, state = run(model, batch, doc, model.initial_state(), [11, 1, 1, 9, 18])
    assert (parts - whole).abs().max() <= 1e-5
    kept = state.past.num_keys
    assert [layer.live()[0].shape[1] for layer in state.layers] == [min(window - 1, kept), kept, min(4, kept)]


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("lengths", [[33], [20, 1, 12], [1] * 33])
def test_state_bytes_equal_what_a_state_holds(window, lengths, tiny, tokens):
    model = tiny("SS", window=window, kv_heads=1)
    one_document = torch.zeros(1, 33, dtype=torch.int32)
    _, state = run(model, tokens(1, 33), one_document, model.initial_state(), lengths)
    keys = min(33, window - 1)
    assert state.bytes() == budget.state_bytes(model.config, 33) == 2 * 2 * keys * 8 * 4
    assert state.expand(3).bytes() == 3 * state.bytes()


def test_the_room_of_a_cache_stops_growing(tiny, tokens):
    model = tiny("S", window=100)
    state, batch = model.initial_state(), tokens(1, 1200)
    for lengths in ([700], [1] * 500):
        _, state = run(model, batch[:, : sum(lengths)], torch.zeros(1, sum(lengths)), state, lengths)
        (layer,) = state.layers
        assert layer.live()[0].shape[1] == 99
        assert layer.cache.k_BSGP.shape[1] <= 2 * (99 + 64)


@pytest.mark.parametrize("window", [1, 3, 100])
def test_a_state_stays_valid_for_several_continuations(window, tiny, tokens):
    model, prefix, ends = tiny("SS", window=window), tokens(1, 13), tokens(3, 9, name="ends")
    zeros = torch.zeros(3, 13, dtype=torch.int32)
    with torch.no_grad():
        whole, _ = model(torch.cat([prefix.expand(3, -1), ends], 1))
    _, start = run(model, prefix, zeros[:1], model.initial_state(), [12, 1])
    states = [start] * 3
    outputs = [[], [], []]
    for t, i in itertools.product(range(9), range(3)):
        hidden, states[i] = run(model, ends[i : i + 1, t : t + 1], zeros[:1, :1], states[i], [1])
        outputs[i].append(hidden)
    together, _ = run(model, ends, zeros[:, :9], start.expand(3), [4, 5])
    for continued in (torch.cat([torch.cat(output, 1) for output in outputs]), together):
        assert (continued - whole[:, 13:]).abs().max() <= 1e-5


def test_gradients_flow_through_a_state(tiny, tokens):
    model, batch = tiny("SS", window=4), tokens(1, 12)
    whole = torch.autograd.grad(model(batch)[0][:, 6:].sum(), model.embedding.weight)[0]
    _, state = model(batch[:, :6], None, model.initial_state())
    carried, _ = model(batch[:, 6:], None, state)
    gradient = torch.autograd.grad(carried.sum(), model.embedding.weight)[0]
    assert (gradient - whole).abs().max() <= 1e-5 * whole.abs().max()


@pytest.mark.parametrize(("context", "window"), [(256, 16), (256, 100), (300, 500)])
def test_flops_are_those_of_the_mean_number_of_keys(context, window):
    config = ModelConfig(pattern="S", width=64, heads=4, kv_heads=2, window=window)
    without = budget.forward_flops_per_token(config, 50, 1) - 2 * 64
    keys = sum(min(t, window) for t in range(1, context + 1)) / context
    assert budget.forward_flops_per_token(config, 50, context) == pytest.approx(without + 4 * 64 * keys, rel=0.005)


def test_flops_equal_the_counter_up_to_the_masked_part_of_the_blocks(way):
    context, window, vocab = 256, 16, 50
    config = ModelConfig(pattern="S", width=64, heads=4, kv_heads=2, window=window)
    model = LanguageModel(config, vocab)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad():
        model.logits(model(torch.zeros(1, context, dtype=torch.long))[0])
    blocks = op.GATHER_COST_PAIRS == 0
    computed = op.block_size(window) + window - 1 if blocks else context
    masked = 4 * 64 * (computed - (window - window**2 / (2 * context)))
    assert counter.get_total_flops() / context == budget.forward_flops_per_token(config, vocab, context) + masked


def test_decoding_reads_the_window_and_no_more():
    def at(context: int) -> int:
        return budget.decode_bytes_per_token(config, 50, context, torch.float32)

    config = ModelConfig(pattern="S", width=64, heads=4, window=100)
    assert at(50) - at(49) == 2 * 64 * 4
    assert at(99) == at(100_000)


@pytest.mark.parametrize("given", [{"window": 0}, {"mixers": {"S": {"window": -1}}}, {"mixers": {"A": {"window": 4}}}])
def test_what_is_no_window_is_refused(given):
    with pytest.raises(UserError, match="window"):
        ModelConfig.parse({"pattern": "SA", "width": 16, "heads": 2, **given}, "model")


def test_the_window_is_a_setting_of_the_model_and_of_a_letter():
    config = ModelConfig(pattern="ST", width=16, heads=2, window=7, mixers={"T": {"mixer": "sliding_window_attention"}})
    assert [config.mixer(letter)[1].window for letter in "ST"] == [7, 7]
    assert config.describe_mixers() == "2 sliding_window_attention"
    assert ModelConfig(pattern="S", width=16, heads=2).mixer("S")[1].window == 128
