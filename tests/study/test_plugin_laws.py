"""A mixer of one's own is tried before a study relies on it, and refused by the law that it breaks."""

from __future__ import annotations

from pathlib import Path

import pytest

from longspan.foundation.errors import UserError
from longspan.foundation.plugins import load_file
from longspan.models.config import ModelConfig
from longspan.study.plugin_laws import check_own_mixers

EXAMPLE = Path(__file__).parents[2] / "docs/examples/mixer.py"
MIXER = """
from dataclasses import dataclass
import torch
from torch import Tensor, nn
from longspan.foundation.config import Config
from longspan.models.mixers.base import Mixer, MixerState, init_linear, register

@dataclass(frozen=True)
class Last(MixerState):
    sum: Tensor | None = None

@register("{letter}")
class Own(Mixer):
    name = "own_{letter}"
    Settings = Config

    def __init__(self, width, settings):
        super().__init__()
        self.width, self.out_proj = width, nn.Linear(width, width, bias=False)

    def init_weights(self, generator):
        init_linear(self.out_proj, generator)

    def initial_state(self):
        return Last()

    def forward(self, x, segments, state):
        {body}

    def flops(self, context):
        return 2.0 * self.width**2

    def state_bytes(self, context, element_bytes):
        return {bytes}
"""
# The sum over all earlier tokens: causal and exact in chunks, but it knows no documents.
SUM = """y = x.cumsum(1)
        y = y if state is None or state.sum is None else y + state.sum[:, None]
        return self.out_proj(y), None if state is None else Last(y[:, -1])"""
BROKEN = {
    "N": ("return self.out_proj(x) * float('nan'), state", "NaN or infinity"),
    "O": ("return self.out_proj(x)[:, :-1], state", "turns an input of shape"),
    "P": ("return self.out_proj(x)", "returns a Tensor"),
    "Q": ("raise ValueError('boom')", "ValueError: boom"),
    "R": ("return self.out_proj(x.flip(1)), state", "looks ahead"),
    "T": (SUM, "lets one document change another"),
    "U": ("return self.out_proj(x) + x.shape[1], state", "in chunks than in one pass"),
    "V": ("return self.out_proj(x), Last(x[:, -1])", "a state where it was given none"),
}


def config(letter: str) -> ModelConfig:
    return ModelConfig(pattern=f"{letter}A", width=16, heads=2, mlp="none")


def plugin(folder: Path, letter: str, body: str, held: str = "0") -> Path:
    path = folder / f"own_{letter}.py"
    path.write_text(MIXER.replace("{letter}", letter).replace("{body}", body).replace("{bytes}", held))
    return path


@pytest.mark.usefixtures("plugins_forgotten")
@pytest.mark.parametrize("letter", sorted(BROKEN))
def test_a_mixer_that_breaks_a_law_is_refused_by_it(tmp_path: Path, letter: str) -> None:
    body, law = BROKEN[letter]
    load_file(plugin(tmp_path, letter, body))
    with pytest.raises(UserError) as caught:
        check_own_mixers([config(letter)])
    assert law in caught.value.given
    assert f"`own_{letter}`" in caught.value.given
    assert "docs/add-a-mixer.md" in caught.value.fix


@pytest.mark.usefixtures("plugins_forgotten")
def test_state_bytes_are_measured(tmp_path: Path) -> None:
    body = "return self.out_proj(x), None if state is None else Last(x[:, -1])"
    load_file(plugin(tmp_path, "W", body, held="8"))
    with pytest.raises(UserError, match="says 8 bytes after 24 tokens, its state has 64"):
        check_own_mixers([config("W")])


@pytest.mark.usefixtures("plugins_forgotten")
def test_weights_that_write_the_output_must_be_there(tmp_path: Path) -> None:
    path = plugin(tmp_path, "Y", "return self.projection(x), state")
    path.write_text(path.read_text().replace("out_proj", "projection"))
    load_file(path)
    with pytest.raises(UserError, match=r"`residual_outputs` of .* names `out_proj\.weight`") as caught:
        check_own_mixers([config("Y")])
    assert "`projection.weight`" in caught.value.allowed


@pytest.mark.usefixtures("plugins_forgotten")
def test_a_mixer_without_its_methods_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "bare.py"
    path.write_text(
        "from longspan.models.mixers import base\n@base.register('Z')\nclass Bare(base.Mixer):\n    name = 'bare'\n"
    )
    load_file(path)
    with pytest.raises(UserError, match="abstract"):
        check_own_mixers([config("Z")])


@pytest.mark.usefixtures("plugins_forgotten")
def test_the_documented_example_passes() -> None:
    load_file(EXAMPLE)
    check_own_mixers([config("E")])
