"""Claims about the commit of a data set: from the cache without a hub, and never against the hub's word."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from longspan.corpus.sources.dataset_commit import commit_at_first_use

hub = pytest.importorskip("huggingface_hub")
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A data set in the client's cache, `main` at the only commit."""
    repository = tmp_path / "hub" / "datasets--owner--name"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(COMMIT)
    (repository / "snapshots" / COMMIT).mkdir(parents=True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    return repository


def answers(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def info(*arguments: Any, **settings: Any) -> None:
        raise error

    monkeypatch.setattr(hub.HfApi, "dataset_info", info)


@pytest.mark.parametrize("revision", [None, COMMIT])
def test_without_a_hub_the_cache_counts(
    revision: str | None, cached: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers(ConnectionError("no network"), monkeypatch)
    assert commit_at_first_use("owner/name", revision, tmp_path) == COMMIT
    with pytest.raises(ConnectionError):
        commit_at_first_use("owner/name", "other", tmp_path)


def test_what_the_hub_refuses_is_not_taken_from_the_cache(
    cached: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind = hub.errors.RepositoryNotFoundError
    refused = kind.__new__(kind)
    answers(refused, monkeypatch)
    with pytest.raises(kind):
        commit_at_first_use("owner/name", None, tmp_path)
    assert not list(tmp_path.glob("huggingface/*"))
