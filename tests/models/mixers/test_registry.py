"""A stranger adds a mixer with one file, and gets pattern, matching, FLOPs, state bytes and isolation."""

from __future__ import annotations

import pytest
import torch

from longspan.foundation.errors import UserError
from longspan.foundation.plugins import load_file
from longspan.models import budget
from longspan.models.language_model import LanguageModel, ModelConfig
from longspan.models.matching import MatchConfig, match
from longspan.models.mixers import base, registered

AVERAGE = '''
"""The running mean of a document: the smallest mixer there is."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from longspan.foundation.config import Config
from longspan.models.mixers.base import Mixer, MixerState, init_linear, register


class Settings(Config):
    inner: int = 8


@dataclass(frozen=True)
class State(MixerState):
    total: Tensor | None = None


@register("Q")
class RunningSum(Mixer):
    name = "running_sum"
    Settings = Settings

    def __init__(self, width, settings):
        super().__init__()
        self.inner = settings.inner
        self.in_proj = nn.Linear(width, settings.inner, bias=False)
        self.out_proj = nn.Linear(settings.inner, width, bias=False)

    def init_weights(self, generator):
        init_linear(self.in_proj, generator)
        init_linear(self.out_proj, generator)

    def initial_state(self):
        return State()

    def forward(self, x, segments, state):
        x = self.in_proj(x)
        time = torch.arange(x.shape[1])
        mask = (time[:, None] >= time).expand(x.shape[0], -1, -1)
        doc = segments.state_doc
        carry = 0.0 if state is None or state.total is None else state.total[:, None]
        if doc is not None:
            mask = mask & (doc[:, :, None] == doc[:, None, :])
            if segments.previous_doc is not None:
                carry = carry * (doc == segments.previous_doc[:, None])[..., None]
        y = mask.to(x.dtype) @ x + carry
        return self.out_proj(y), None if state is None else State(y[:, -1])

    def flops(self, context):
        return 4.0 * self.in_proj.weight.numel() + 2 * self.inner

    def state_bytes(self, context, element_bytes):
        return self.inner * element_bytes
'''


@pytest.fixture
def stranger(tmp_path, plugins_forgotten):
    file = tmp_path / "running_sum.py"
    file.write_text(AVERAGE)
    load_file(file)
    load_file(file)
    assert "Q" in registered()
    return file


def test_a_stranger_s_mixer_gets_everything_else_for_free(stranger, tokens):
    config = ModelConfig.parse({"pattern": "QAQ", "width": 16, "heads": 2, "mixers": {"Q": {"inner": 4}}}, "model")
    model, batch, doc = LanguageModel(config, 29), tokens(1, 9), torch.tensor([[0] * 4 + [1] * 5])
    assert model.blocks[0].mixer.inner == 4
    with torch.no_grad():
        whole, _ = model(batch, doc)
        state, parts = model.initial_state(), []
        for part, ids in zip(batch.split(2, 1), doc.split(2, 1), strict=True):
            hidden, state = model(part, ids, state)
            parts.append(hidden)
    assert (torch.cat(parts, 1) - whole).abs().max() <= 1e-5
    assert budget.forward_flops_per_token(config, 29, 64) > 0
    assert budget.state_bytes(config, 10) == 2 * 4 * 4 + 2 * 10 * 16 * 4
    matched = match(config, MatchConfig(non_embedding_parameters="AAA", tolerance=0.02), 29)
    assert abs(matched.residual) <= 0.02


def test_a_taken_letter_is_refused_with_the_free_ones(tmp_path):
    file = tmp_path / "other.py"
    file.write_text(AVERAGE.replace('"Q"', '"A"'))
    with pytest.raises(
        UserError, match=r"second mixer called 'A'(.|\n)*B, E(.|\n)* Z, a, b(.|\n)*'A' is .*attention\.Attention"
    ):
        load_file(file)
    assert registered()["A"].name == "attention"


@pytest.mark.parametrize("letter", ["", "AB", "1", "é"])
def test_a_letter_is_one_ascii_letter(letter):
    with pytest.raises(UserError, match="mixer letter"):
        base.register(letter)


def test_a_parameter_that_its_mixer_forgot_to_fill_is_found(tmp_path, stranger):
    config = ModelConfig.parse({"pattern": "Q", "width": 16}, "model")
    forgetful = registered()["Q"]
    original = forgetful.init_weights
    forgetful.init_weights = lambda self, generator: None
    try:
        with pytest.raises(UserError, match=r"layers\.0\.mixer\.in_proj\.weight` has no value"):
            LanguageModel(config, 29)
    finally:
        forgetful.init_weights = original
