"""A user's own Python file, loaded once: what it registers (mixers, probes) can be named from then on."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

from longspan.foundation.errors import UserError
from longspan.foundation.files import sha256_file

_PREFIX = "longspan_plugin_"


def is_plugin(module: str) -> bool:
    """Whether a module's name is that of a user's own file."""
    return module.startswith(_PREFIX)


def load_file(path: Path | str) -> ModuleType:
    """Import a Python file by its path; loading the same file or a copy of it again changes nothing.

    Raises:
        UserError: the file is missing, is not Python, or fails while it runs.
    """
    file = Path(path).resolve()
    if not file.is_file() or file.suffix != ".py":
        raise UserError(f"plugin file {path} is not there", "a Python file that ends in .py", "check the path")
    name = f"{_PREFIX}{sha256_file(file)[:16]}"
    if name in sys.modules:
        return sys.modules[name]
    specification = importlib.util.spec_from_file_location(name, file)
    assert specification is not None, "a .py path always has a loader"
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    sys.modules[name] = module
    try:
        specification.loader.exec_module(module)
    except BaseException as error:
        del sys.modules[name]
        if isinstance(error, UserError) or not isinstance(error, Exception):
            raise
        problem = f"plugin file {path} does not load: {type(error).__name__}: {error}"
        raise UserError(problem, "a module that imports", "mend it") from error
    return module
