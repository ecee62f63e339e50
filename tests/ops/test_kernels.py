"""One setting decides what runs as a kernel, says what it comes to, and never falls back unsaid."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from longspan.foundation.errors import UserError
from longspan.ops import kernels

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture(autouse=True)
def as_it_was() -> Iterator[None]:
    before = kernels._Setting.choice
    kernels._Setting.choice = "auto"
    yield
    kernels._Setting.choice = before


@pytest.fixture
def triton_is_there(monkeypatch):
    monkeypatch.setattr(kernels._Setting, "triton", True)
    monkeypatch.setattr(kernels._Setting, "interpreted", True)
    monkeypatch.setattr(kernels.importlib.metadata, "version", lambda name: "3.6.0")


def test_a_cpu_runs_plain_torch_unless_told_otherwise(triton_is_there):
    x = torch.zeros(2)
    assert not kernels.serve(x)
    assert kernels.described(CPU) == "plain torch (auto)"
    assert kernels.described(CUDA) == "Triton 3.6.0 kernels (auto)"
    assert kernels.choose("triton") == "auto"
    assert kernels.serve(x)
    assert not kernels.serve(x.double()), "no kernel takes fp64"
    kernels.choose("plain")
    assert not kernels.serve(x)
    assert kernels.described(CUDA) == "plain torch (plain)"


@pytest.mark.parametrize(
    ("given", "said"), [("plain", "plain torch (plain)"), ("fast", "allowed: auto, triton, plain")]
)
def test_the_environment_gives_the_first_setting(given, said):
    code = "import torch\nfrom longspan.ops import kernels\nprint(kernels.described(torch.device('cpu')))"
    environment = {**os.environ, kernels.VARIABLE: given}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert said in result.stdout + result.stderr


def test_an_unknown_setting_is_refused():
    with pytest.raises(UserError, match="auto, triton, plain"):
        kernels.choose("fast")
    assert kernels.choice() == "auto"


def test_a_missing_triton_stops_and_names_the_way_out(monkeypatch):
    monkeypatch.setattr(kernels._Setting, "triton", False)
    kernels.choose("triton")
    with pytest.raises(UserError, match=f"{kernels.VARIABLE}=plain"):
        kernels.serve(torch.zeros(2))


def test_kernels_on_a_cpu_that_nothing_interprets_are_refused(triton_is_there, monkeypatch):
    monkeypatch.setattr(kernels._Setting, "interpreted", False)
    kernels.choose("triton")
    with pytest.raises(UserError, match=r"on a CPU\n.*\n.*auto or plain, or TRITON_INTERPRET=1"):
        kernels.described(CPU)
    assert kernels.described(CUDA) == "Triton 3.6.0 kernels (triton)"


def test_the_page_shows_what_works(triton_is_there, capsys):
    page = (Path(__file__).parents[2] / "docs" / "kernels.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", page, re.S)
    exec(code, {})
    assert "kernels (auto)" in capsys.readouterr().out
    assert kernels.choice() == "plain"


def test_an_op_is_called_through_torch_only_where_something_has_to_see_it():
    @torch.library.custom_op("longspan_tests::twice", mutates_args=())
    def twice(x: torch.Tensor) -> torch.Tensor:
        return 2 * x

    through_torch = []
    twice.register_autograd(lambda ctx, dy: 2 * dy, setup_context=lambda ctx, inputs, output: through_torch.append(1))
    x = torch.ones(2, requires_grad=True)
    (gradient,) = torch.autograd.grad(kernels.called(twice)(x).sum(), x)
    assert gradient.tolist() == [2.0, 2.0]
    assert through_torch == [1]
    with torch.no_grad():
        assert kernels.called(twice)(x).tolist() == [2.0, 2.0]
        assert kernels.called(twice) is not twice
