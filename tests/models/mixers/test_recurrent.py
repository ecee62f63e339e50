"""GRU and LSTM are torch's, started afresh at every document; the LSTM starts out remembering."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from longspan.foundation.errors import UserError
from longspan.models import budget
from longspan.models.language_model import LanguageModel, ModelConfig
from longspan.models.mixers.recurrent import GRU, LSTM, RecurrentSettings
from longspan.models.segments import Segments
from longspan.ops.gru import gru
from longspan.ops.lstm import lstm

WIDTH = 16
DOC = torch.tensor([[0] * 8 + [1] * 1 + [2] * 7 + [3] * 5], dtype=torch.int32)
KINDS = {"G": (GRU, torch.nn.GRU, gru), "L": (LSTM, torch.nn.LSTM, lstm)}


def mixer(letter: str, **settings: bool):
    built = KINDS[letter][0](WIDTH, RecurrentSettings(**settings))
    built.init_weights(torch.Generator().manual_seed(0))
    return built


def torchs_own(letter: str, ours):
    theirs = KINDS[letter][1](WIDTH, WIDTH, batch_first=True)
    with torch.no_grad():
        for parameter, name in zip(
            theirs.parameters(), ("weight_input", "weight_hidden", "bias_input", "bias_hidden"), strict=True
        ):
            parameter.copy_(getattr(ours, name))
    return theirs


@pytest.mark.parametrize("letter", KINDS)
@pytest.mark.parametrize(("inside", "outside"), [(False, False), (True, True)])
def test_every_document_is_one_run_of_torchs_own_layer(letter, inside, outside):
    ours = mixer(letter, in_projection=inside, out_projection=outside)
    theirs = torchs_own(letter, ours)
    x = torch.randn(1, DOC.shape[1], WIDTH, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        y, state = ours(x, Segments.build(DOC, "full"), None)
        assert state is None
        for document in range(4):
            own = x[:, DOC[0] == document]
            if inside:
                own = ours.in_proj(own)
            expected, _ = theirs(own)
            if outside:
                expected = ours.out_proj(expected)
            assert (y[:, DOC[0] == document] - expected).abs().max() <= 1e-6


@pytest.mark.parametrize("letter", KINDS)
def test_a_state_is_torchs_state(letter):
    ours = mixer(letter)
    x = torch.randn(2, 9, WIDTH, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        _, state = ours(x, Segments.build(None, shape=(2, 9)), ours.initial_state())
        _, expected = torchs_own(letter, ours)(x)
    expected = expected if letter == "L" else (expected,)
    for name, value in zip(("hidden", "cell"), expected, strict=False):
        assert (getattr(state, name) - value[0]).abs().max() <= 1e-6
        assert getattr(state, name).untyped_storage().nbytes() == 2 * WIDTH * 4


def test_weights_start_as_in_torch_but_the_forget_gate_is_open():
    lstm_mixer, gru_mixer = mixer("L"), mixer("G")
    bound = WIDTH**-0.5
    forget = slice(WIDTH, 2 * WIDTH)
    assert torch.all(lstm_mixer.bias_input[forget] + lstm_mixer.bias_hidden[forget] == 1.0)
    rest = [lstm_mixer.weight_input, lstm_mixer.weight_hidden]
    for bias in (lstm_mixer.bias_input, lstm_mixer.bias_hidden):
        rest += [bias[:WIDTH], bias[2 * WIDTH :]]
    rest += [gru_mixer.weight_input, gru_mixer.weight_hidden, gru_mixer.bias_input, gru_mixer.bias_hidden]
    for values in rest:
        assert 0.6 * bound < values.abs().max() <= bound
        assert values.std().item() == pytest.approx(bound / 3**0.5, rel=0.35)


@pytest.mark.parametrize("init", ["scaled", "normal"])
def test_a_whole_model_starts_with_an_open_forget_gate(init):
    block = LanguageModel(ModelConfig(pattern="L", width=WIDTH, init=init), 29).blocks[0]
    assert torch.all(block.mixer.bias_input[WIDTH : 2 * WIDTH] == 1.0)


@pytest.mark.parametrize("letter", KINDS)
@pytest.mark.parametrize("inside", [False, True])
def test_flops_equal_the_counter(letter, inside):
    ours = mixer(letter, in_projection=inside)
    x = torch.randn(1, 12, WIDTH)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        if inside:
            x = ours.in_proj(x)
        # Step by step in products that the counter knows.
        weights = (ours.weight_input, ours.weight_hidden, ours.bias_input, ours.bias_hidden)
        ours.out_proj(KINDS[letter][2](x, *weights, backend="reference")[0])
    assert ours.flops(12) == counter.get_total_flops() / 12


@pytest.mark.parametrize(("letter", "vectors"), [("G", 1), ("L", 2)])
@pytest.mark.parametrize("context", [1, 40])
def test_state_bytes_are_the_same_at_every_context(letter, vectors, context, tiny, tokens):
    model = tiny(letter)
    with torch.no_grad():
        _, state = model(tokens(3, context), None, model.initial_state())
    assert state.bytes() == 3 * budget.state_bytes(model.config, context) == 3 * vectors * WIDTH * 4


@pytest.mark.parametrize("letter", KINDS)
def test_the_output_projection_writes_into_the_residual_stream_where_there_is_one(letter):
    assert mixer(letter).residual_outputs == ("out_proj.weight",)
    assert mixer(letter, out_projection=False).residual_outputs == ()


@pytest.mark.parametrize("letter", KINDS)
def test_an_unknown_setting_is_refused(letter):
    with pytest.raises(UserError, match="gates"):
        ModelConfig.parse({"pattern": letter, "width": WIDTH, "mixers": {letter: {"gates": 5}}}, "model")
