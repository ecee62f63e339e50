"""When layers are compiled, and where what was compiled is kept, so that a run of the same shape starts sooner.

The compiler fuses norms, activations, rotations, residuals and casts; matrix products and kernels of Longspan's own
stay what they are. It compiles each kind of layer once, at the first step of a process.

The compiler knows an op by its name and what goes in. Where the same op gives other results in another version of
Longspan, as many or of other shapes, what was compiled for one must not be found by the other: the source of the ops is
part of the key.
"""

from __future__ import annotations

import hashlib
import os
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch

from longspan import ops
from longspan.foundation.errors import MachineError, UserError, first_line
from longspan.ops import kernels

if TYPE_CHECKING:
    from longspan.models.language_model import LanguageModel

CACHE = "TORCHINDUCTOR_CACHE_DIR"
# Kinds of layers that one process may compile: letters, widths and shapes of all its runs together.
MOST_KINDS = 256


def resolve_compile(choice: Literal["auto"] | bool, device: torch.device) -> bool:
    """What `training.compile` means on this device: `auto` compiles on CUDA where kernels run, and nowhere else."""
    if choice == "auto":
        return device.type == "cuda" and kernels.wanted(device)
    return choice


def check_compiler(device: torch.device) -> None:
    """Refuse to compile for a CPU where nothing compiles C++; torch would find that out at the first step.

    Raises:
        UserError: with what to do.
    """
    if device.type != "cpu":
        return
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        raise UserError(
            "training.compile = true without a C++ compiler",
            "g++ or clang++ on the PATH, or the one that the environment variable CXX names",
            "install one, or set training.compile to auto or false",
        ) from None


def compile_layers(model: LanguageModel) -> Path:
    """Have the layers of `model` compiled when they are first trained; returns the folder that keeps the outcome."""
    folder = keep_compiled()
    import torch._dynamo

    tag_cache(Path(ops.__path__[0]))
    # Past its limit the compiler would stop the run: a layer is never silently left as it is.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, MOST_KINDS)
    torch._dynamo.config.accumulated_recompile_limit = max(
        torch._dynamo.config.accumulated_recompile_limit, 8 * MOST_KINDS
    )
    model.compile_layers()
    return folder


def keep_compiled() -> Path:
    """Choose the folder that keeps what is compiled in this process and in those that it starts.

    It is `~/.cache/longspan/compiled` (under XDG_CACHE_HOME where that is set), or what TORCHINDUCTOR_CACHE_DIR names.
    torch sets the variable itself, to a folder for temporary files, as soon as anything imports its compiler: building
    a model does. That is nobody's choice.

    Raises:
        MachineError: the folder cannot be made or written.
    """
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    if os.environ.get(CACHE) in (None, "", default_cache_dir()):
        os.environ[CACHE] = str(caches / "longspan" / "compiled")
    folder = Path(os.environ[CACHE])
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _no_folder(folder, first_line(error)) from None
    if not os.access(folder, os.W_OK):
        raise _no_folder(folder, "no right to write there")
    return folder


def _no_folder(folder: Path, reason: str) -> MachineError:
    return MachineError(
        f"{folder}, for compiled layers: {reason}",
        "a folder that can be made and written",
        f"set {CACHE} to one, or `training.compile` to false",
    )


def tag_cache(folder: Path) -> None:
    """From now on this process finds and keeps only what was compiled for ops of this source."""
    import torch.compiler.config

    tag = source_digest(folder)
    if tag not in torch.compiler.config.cache_key_tag:
        torch.compiler.config.cache_key_tag += tag


@cache
def source_digest(folder: Path) -> str:
    """Of all Python files in a folder and the folders in it, their names included."""
    digest = hashlib.sha256()
    for file in sorted(folder.rglob("*.py")):
        for part in (str(file.relative_to(folder)).encode(), file.read_bytes()):
            digest.update(len(part).to_bytes(8, "big") + part)
    return digest.hexdigest()
