"""Which ops run as Triton kernels: one setting for all of them, and words for what it comes to on a device.

`auto` is Triton on CUDA and plain torch elsewhere; `plain` is plain torch everywhere; `triton` refuses to do without
(on a CPU it needs Triton's interpreter, TRITON_INTERPRET=1, which is slow and meant for tests). The environment
variable LONGSPAN_KERNELS gives the setting a process starts with.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
from collections.abc import Callable
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch._library.custom_ops import CustomOpDef

from longspan.foundation.errors import UserError

Choice = Literal["auto", "triton", "plain"]
CHOICES = get_args(Choice)
VARIABLE = "LONGSPAN_KERNELS"
SERVED = (torch.float32, torch.bfloat16)
WIDEST_ROW = 16_384
"""Numbers of a row that one program takes at once, as a norm does: they have to fit its registers."""


class _Setting:
    """Found at import, so that `serve` holds nothing that a compiler could not trace."""

    choice: str = os.environ.get(VARIABLE, "auto")
    triton: bool = importlib.util.find_spec("triton") is not None
    interpreted: bool = os.environ.get("TRITON_INTERPRET") == "1"


def choice() -> Choice:
    """The setting in force.

    Raises:
        UserError: LONGSPAN_KERNELS names something else.
    """
    if _Setting.choice not in CHOICES:
        given = f"{VARIABLE} = {_Setting.choice!r}"
        raise UserError(given, ", ".join(CHOICES), f"set {VARIABLE} to one of these")
    return _Setting.choice  # type: ignore[return-value]


def choose(new: Choice) -> Choice:
    """Sets it for this process; returns what it was."""
    before = choice()
    _Setting.choice = new
    try:
        choice()
    except UserError:
        _Setting.choice = before
        raise
    return before


def serve(x: Tensor) -> bool:
    """Whether an op on `x` runs as a kernel, as far as the setting, the device and the dtype (fp32, bf16) decide.

    Raises:
        UserError: it should, and cannot.
    """
    return x.dtype in SERVED and wanted(x.device)


def serve_eagerly(x: Tensor) -> bool:
    """`serve` for kernels that are launched past torch's dispatcher, where no compiler could follow."""
    return not torch.compiler.is_compiling() and serve(x)


def wanted(device: torch.device) -> bool:
    """Whether ops run as kernels there, as far as the setting and the device decide.

    Raises:
        UserError: they should, and Triton is not installed or compiles nothing for this device.
    """
    setting = choice()
    if setting == "plain" or (setting == "auto" and device.type != "cuda"):
        return False
    _need_triton()
    if device.type == "cpu" and not _Setting.interpreted:
        raise UserError(
            f"{VARIABLE} = {setting!r} on a CPU",
            "a CUDA device; on a CPU only Triton's interpreter, slow and meant for tests",
            f"set {VARIABLE} to auto or plain, or TRITON_INTERPRET=1 beside it",
        )
    return True


def called(op: CustomOpDef) -> Callable[..., Any]:
    """`op`, or the function behind it where neither autograd nor a compiler has to see it.

    torch's way to a custom op cost the host of an H200 0.2 ms a call (docs/LOG.md), more than a short prompt's kernels
    take: four of them a Mamba-2 layer made its first token wait for the host.
    """
    seen = torch.is_grad_enabled() or torch.compiler.is_compiling()
    function: Callable[..., Any] = op if seen else op._init_fn
    return function


def _need_triton() -> None:
    if not _Setting.triton:
        raise UserError(
            f"{VARIABLE} = {choice()!r} without Triton",
            "Triton, which comes with torch on Linux",
            f"install `triton`, or set {VARIABLE}=plain and accept plain torch, many times slower on a GPU",
        )


def described(device: torch.device) -> str:
    """What the setting comes to on `device`, for people: to be printed wherever a run says how it computes."""
    if wanted(device):
        return f"Triton {importlib.metadata.version('triton')} kernels ({choice()})"
    return f"plain torch ({choice()})"
