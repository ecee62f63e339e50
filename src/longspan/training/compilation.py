"""When layers are compiled, and where what was compiled is kept, so that a run of the same shape starts sooner.

The compiler fuses norms, activations, rotations, residuals and casts; matrix products and kernels of Longspan's own
stay what they are. It compiles each kind of layer once, at the first step of a process.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch

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


def compile_layers(model: LanguageModel) -> Path:
    """Have the layers of `model` compiled when they are first trained; returns the folder that keeps the outcome.

    It is `~/.cache/longspan/compiled` (under XDG_CACHE_HOME where that is set), or what TORCHINDUCTOR_CACHE_DIR names.
    """
    caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = os.environ.setdefault(CACHE, str(caches / "longspan" / "compiled"))
    import torch._dynamo

    # Past its limit the compiler would stop the run: a layer is never silently left as it is.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, MOST_KINDS)
    torch._dynamo.config.accumulated_recompile_limit = max(
        torch._dynamo.config.accumulated_recompile_limit, 8 * MOST_KINDS
    )
    model.compile_layers()
    return Path(folder)
