"""What one version of the ops had compiled is never run with another."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch.compiler.config

from longspan.foundation.errors import MachineError
from longspan.training.compilation import keep_compiled, source_digest, tag_cache

OP = """
import sys
from pathlib import Path

import torch
from torch import Tensor

from longspan.training.compilation import tag_cache

def op(x: Tensor) -> tuple[{types}]:
    return {values}

op = torch.library.custom_op("versions::op", op, mutates_args=())
op.register_fake(lambda x: tuple(torch.empty_like(x) for _ in range({count})))

def save(ctx, inputs, output):
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output[1:])

op.register_autograd(lambda ctx, d, *_: d * ctx.saved_tensors[-1], setup_context=save)
tag_cache(Path(__file__).parent)
x = torch.ones(4, requires_grad=True)
torch.compile(lambda x: op(x * 2)[0], fullgraph=True)(x).sum().backward()
assert x.grad.tolist() == [2.0 * {count}] * 4, x.grad
"""


def version(folder: Path, count: int) -> Path:
    """A program with an op that keeps so many results, one of which its gradient is."""
    values = ", ".join(f"x * {i / 2}" for i in range(1, count + 1))
    folder.mkdir()
    file = folder / "op.py"
    file.write_text(OP.format(types=", ".join(["Tensor"] * count), values=values, count=count))
    return file


@pytest.mark.slow
@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="torch.compile needs a C++ compiler")
@pytest.mark.timeout(600)
def test_an_op_that_gives_more_in_another_version_finds_nothing_compiled_for_that(tmp_path: Path) -> None:
    """Without the tag the second program ends in an IndexError: the compiler takes the first one's layer."""
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "compiled")}
    for count in (3, 2):
        subprocess.run([sys.executable, version(tmp_path / str(count), count)], env=environment, check=True)


def test_what_is_compiled_is_kept_where_the_next_boot_finds_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "chosen"))
    assert keep_compiled() == tmp_path / "chosen"
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    cache_dir()
    assert "TORCHINDUCTOR_CACHE_DIR" in os.environ
    assert keep_compiled() == tmp_path / "longspan" / "compiled" == Path(cache_dir())


def test_a_folder_that_cannot_be_made_names_the_variable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "file" / "inner"))
    with pytest.raises(MachineError, match="set TORCHINDUCTOR_CACHE_DIR to one"):
        keep_compiled()


def test_the_source_and_its_names_are_in_the_digest(tmp_path: Path) -> None:
    digests = set()
    for number, (name, text) in enumerate([("a", "x"), ("a", "y"), ("b", "x"), ("ax", "")]):
        folder = tmp_path / str(number) / "inner"
        folder.mkdir(parents=True)
        (folder / f"{name}.py").write_text(text)
        digests.add(source_digest(folder.parent))
    assert len(digests) == 4


def test_a_process_tags_its_cache_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.compiler.config, "cache_key_tag", "mine")
    for _ in range(2):
        tag_cache(tmp_path)
    assert torch.compiler.config.cache_key_tag == "mine" + source_digest(tmp_path)
