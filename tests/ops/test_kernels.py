"""One setting decides what runs as a kernel, says what it comes to, and never falls back unsaid."""

from __future__ import annotations

import re
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
    kernels._Setting.choice = None
    yield
    kernels._Setting.choice = before


def test_a_cpu_runs_plain_torch_unless_told_otherwise(monkeypatch):
    monkeypatch.delenv(kernels.VARIABLE, raising=False)
    monkeypatch.setattr(kernels, "_triton_version", lambda: "3.6.0")
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


def test_the_environment_gives_the_first_setting(monkeypatch):
    monkeypatch.setenv(kernels.VARIABLE, "plain")
    assert kernels.choice() == "plain"


def test_an_unknown_setting_is_refused(monkeypatch):
    monkeypatch.setenv(kernels.VARIABLE, "fast")
    with pytest.raises(UserError, match="auto, triton, plain"):
        kernels.choice()


def test_a_missing_triton_stops_and_names_the_way_out(monkeypatch):
    monkeypatch.setattr(kernels.importlib.util, "find_spec", lambda name: None)
    kernels._triton_version.cache_clear()
    kernels.choose("triton")
    with pytest.raises(UserError, match=f"{kernels.VARIABLE}=plain"):
        kernels.serve(torch.zeros(2))


def test_the_page_shows_what_works(monkeypatch, capsys):
    monkeypatch.setattr(kernels, "_triton_version", lambda: "3.6.0")
    page = (Path(__file__).parents[2] / "docs" / "kernels.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", page, re.S)
    exec(code, {})
    assert "kernels (auto)" in capsys.readouterr().out
    assert kernels.choice() == "plain"
