"""One file of a repository on the Hugging Face hub; where the hub cannot be reached, that is known at once."""

from __future__ import annotations

from pathlib import Path

PATIENCE = 10.0
"""Seconds that the hub has for its first word."""


def fetch_file(repository: str, filename: str, revision: str | None = None, *, dataset: bool = False) -> Path:
    """The local copy of a file, fetched unless it is in the cache.

    A hub that it cannot reach, the client asks five times more, for half a minute, with a line for each. So a question
    without repeats goes ahead, where the answer is not in the cache.

    Args:
        repository: `owner/name`.
        filename: in the repository.
        revision: branch, tag or commit; None: the main branch.
        dataset: a repository of data, not of a model.

    Raises:
        Exception: of the client, which has many kinds: offline, not found, gated, refused.
    """
    from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url, try_to_load_from_cache
    from huggingface_hub.errors import HfHubHTTPError

    kind = "dataset" if dataset else "model"
    if not isinstance(try_to_load_from_cache(repository, filename, revision=revision, repo_type=kind), str):
        try:
            url = hf_hub_url(repository, filename, revision=revision, repo_type=kind)
            get_hf_file_metadata(url, timeout=PATIENCE)
        except HfHubHTTPError:
            pass  # It is reached. A refusal that may pass is for the client to repeat; the others it tells again.
    return Path(hf_hub_download(repository, filename, revision=revision, repo_type=kind))
