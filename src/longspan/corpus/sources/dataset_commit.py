"""Which commit a data set on the hub is taken at: the one it had at first use, so that a study never mixes two."""

from __future__ import annotations

from pathlib import Path

from longspan.foundation.extras import require
from longspan.foundation.files import digest, read_json, write_json


def commit_at_first_use(dataset: str, revision: str | None, downloads: Path) -> str:
    """The commit of a data set, written down when it is asked for the first time.

    Where the hub does not answer, what its client has in its cache counts; where it refuses, nothing does.

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
    hub, refusals = require("hub", "huggingface_hub"), require("hub", "huggingface_hub.errors")
    try:
        commit = str(hub.HfApi().dataset_info(dataset, revision=revision).sha)
    except (refusals.RepositoryNotFoundError, refusals.RevisionNotFoundError):
        # The hub's word on what it does not have, or does not show to whoever asks.
        raise
    except Exception:
        cached = _cached(dataset, revision)
        if cached is None:
            raise
        commit = cached
    write_json(note, {"dataset": dataset, "revision": revision, "commit": commit})
    return commit


def _cached(dataset: str, revision: str | None) -> str | None:
    cache = Path(require("hub", "huggingface_hub.constants").HF_HUB_CACHE)
    repository = cache / f"datasets--{dataset.replace('/', '--')}"
    if revision and (repository / "snapshots" / revision).is_dir():
        return revision
    reference = repository / "refs" / (revision or "main")
    return reference.read_text(encoding="utf-8").strip() if reference.is_file() else None
