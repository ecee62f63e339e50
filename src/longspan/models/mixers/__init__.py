"""The mixers, one file each; importing this package registers the ones Longspan ships."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

from longspan.foundation.errors import UserError
from longspan.foundation.files import digest
from longspan.models.mixers import attention, mamba2, recurrent
from longspan.models.mixers.base import Mixer, MixerState, register, registered

__all__ = ["Mixer", "MixerState", "attention", "load_mixer_file", "mamba2", "recurrent", "register", "registered"]


def load_mixer_file(path: Path | str) -> list[str]:
    """Register the mixers of a Python file; loading the same file again changes nothing.

    Returns:
        The letters that the file registered, sorted.

    Raises:
        UserError: no such file, it cannot be run, or it registers no mixer.
    """
    file = Path(path).resolve()
    if not file.is_file():
        raise UserError(f"mixer file {path} does not exist", "a Python file", "check the path")
    module_name = f"longspan_mixer_{digest(str(file))[:16]}"
    if module_name not in sys.modules:
        spec = importlib.util.spec_from_file_location(module_name, file)
        if spec is None or spec.loader is None:
            raise UserError(f"mixer file {path} is not a Python file", "a file that ends in .py", "rename it")
        module = importlib.util.module_from_spec(spec)
        sys.modules[module_name] = module
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[module_name]
            raise
    letters = sorted(letter for letter, mixer in registered().items() if mixer.__module__ == module_name)
    if not letters:
        raise UserError(
            f"mixer file {path} registers no mixer",
            "a subclass of `Mixer` decorated with `@register(letter)`",
            "add the decorator from longspan.models.mixers.base",
        )
    return letters
