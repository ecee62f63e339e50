"""From a name to a folder: a local one, or a repository of the Hugging Face hub."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from longspan.foundation.errors import UserError, first_line
from longspan.foundation.extras import MissingExtra

# Weights as pickles, and copies for other frameworks, are never fetched.
WEIGHTS = "*.safetensors"
DESCRIPTIONS = ("*.json", "*.model", "*.txt", "*.jinja")
FETCHED = (*DESCRIPTIONS, WEIGHTS)
ALLOWED = "a folder, or a hub id like `state-spaces/mamba-130m-hf`"


def resolve(name: str | Path, revision: str | None = None, *, fetched: Sequence[str] = FETCHED) -> Path:
    """The folder behind a path or a hub id; a hub id is fetched unless it is in the cache.

    Args:
        name: a folder, or `owner/name`.
        revision: branch, tag or commit of a hub id.
        fetched: patterns of the files that are fetched.

    Raises:
        UserError: neither; or it cannot be fetched.
        MissingExtra: the hub's client is not installed.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        if revision is not None:
            raise UserError(
                f"revision {revision!r} for the folder {folder}", "revisions of hub ids only", "leave it out"
            )
        return folder
    text = str(name)
    if text.count("/") != 1 or text.startswith((".", "~", "/")) or text.endswith("/") or folder.exists():
        raise UserError(f"{text} is not there", ALLOWED, "check the path")
    try:
        from huggingface_hub import snapshot_download
    except ModuleNotFoundError:
        raise MissingExtra("hub") from None
    try:
        return Path(snapshot_download(text, revision=revision, allow_patterns=list(fetched)))
    except Exception as error:  # the hub client raises many kinds: offline, not found, gated, refused
        raise UserError(
            f"{text} is no folder, and cannot be fetched from the hub ({first_line(error)})",
            ALLOWED,
            "check the name and the connection (HF_HUB_OFFLINE, HF_TOKEN for gated models)",
        ) from error
