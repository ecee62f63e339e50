"""JSON that comes with Hugging Face weights: others wrote it, so it is checked where it is read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from longspan.foundation.errors import DataError


def read_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file that is there.

    Raises:
        DataError: it is no JSON, or no object.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise DataError(f"{path} is not readable JSON ({error})", "a JSON object", "fetch it again") from None
    if not isinstance(found, dict):
        raise DataError(f"{path} holds {type(found).__name__}", "a JSON object", "fetch it again")
    return found
