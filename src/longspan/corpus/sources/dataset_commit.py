"""Which commit a data set on the hub is taken at: the one it had at first use, so that a study never mixes two."""

from __future__ import annotations

from pathlib import Path

from longspan.foundation.extras import require
from longspan.foundation.files import digest, read_json, write_json


def commit_at_first_use(dataset: str, revision: str | None, downloads: Path) -> str:
    """The commit of a data set, written down when it is asked for the first time.

    Where the hub cannot be reached, what its client has in its cache counts.

    Args:
        dataset: `owner/name`.
        revision: branch, tag or commit; None: the main branch.
        downloads: where notes are kept, the runs folder's own.

    Raises:
        MissingExtra: the hub's client is not installed.
        Exception: of the client, which has many kinds: offline and not in the cache, not found, gated, refused.
    """
    note = downloads / "huggingface" / f"{digest([dataset, revision])[:16]}.resolved.json"
    if note.is_file():
        return str(read_json(note)["commit"])
    hub = require("hub", "huggingface_hub")
    try:
        commit = str(hub.HfApi().dataset_info(dataset, revision=revision).sha)
    except Exception:
        cached = _cached(dataset, revision)
        if cached is None:
            raise
        commit = cached
    write_json(note, {"dataset": dataset, "revision": revision, "commit": commit})
    return commit


def _cached(dataset: str, revision: str | None) -> str | None:
    cache = Path(require("hub", "huggingface_hub.constants").HF_HUB_CACHE)
    reference = cache / f"datasets--{dataset.replace('/', '--')}" / "refs" / (revision or "main")
    return reference.read_text(encoding="utf-8").strip() if reference.is_file() else None
