"""A hub id without a commit stays at the one that it had when it was first asked, so that a study never mixes two."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from longspan.corpus.sources.dataset_commit import commit_at_first_use
from longspan.engines.source import ModelSource
from longspan.foundation.errors import DataError, UserError, first_line
from longspan.foundation.extras import MissingExtra
from longspan.foundation.files import digest, read_json, write_json
from longspan.models.interchange import DESCRIPTIONS, resolve
from longspan.probes.base import Probe

_COMMIT = re.compile(r"[0-9a-f]{40}")


def pinned(source: ModelSource, downloads: Path) -> ModelSource:
    """The source with the commit of its hub id as revision; a folder, a run or a server as it is.

    The commit is written down at first use, beside what is downloaded, and holds from then on for every study with the
    same runs folder, wherever branch or tag have gone since.

    Args:
        source: of a study.
        downloads: where notes are kept, the runs folder's own.

    Raises:
        UserError: the commit of before cannot be had any more.
    """
    name, revision = source.pretrained, source.revision
    if name is None or Path(name).expanduser().is_dir() or (revision and _COMMIT.fullmatch(revision)):
        return source
    note = downloads / "models" / f"{digest([name, revision])[:16]}.resolved.json"
    if note.is_file():
        commit = str(read_json(note)["commit"])
        _check(name, revision, commit, note)
    else:
        folder = resolve(name, revision, fetched=DESCRIPTIONS)
        if not _COMMIT.fullmatch(folder.name):
            raise UserError(
                f"{name} at {folder}, which names no commit",
                "the hub's cache, whose folders are named after commits",
                "name that folder as `pretrained:`",
            )
        commit = folder.name
        write_json(note, {"model": name, "revision": revision, "commit": commit})
    return source.model_copy(update={"revision": commit})


def pinned_probes(probes: Mapping[str, Probe], downloads: Path) -> dict[str, Any]:
    """The settings of each probe, with the commit of the data set on the hub that it asks as revision.

    Args:
        probes: name in the study → probe.
        downloads: where notes are kept, the runs folder's own; a corpus of the same data set has the same commit.

    Raises:
        MissingExtra: the hub's client is not installed.
        DataError: the hub cannot be reached, or has no such data set or revision.
    """
    return {name: _pinned_probe(probe, downloads).model_dump(mode="json") for name, probe in probes.items()}


def _pinned_probe(probe: Probe, downloads: Path) -> Probe:
    dataset = probe.hub_dataset()
    revision: str | None = getattr(probe, "revision", None)
    if dataset is None or (revision and _COMMIT.fullmatch(revision)):
        return probe
    try:
        commit = commit_at_first_use(dataset, revision, downloads)
    except MissingExtra:
        raise
    except Exception as error:  # the client raises many kinds: offline, not found, gated, refused
        raise DataError(
            f"which commit the data set {dataset} is at cannot be asked ({first_line(error)})",
            "a reachable hub, a commit as `revision:`, or a local copy of the data",
            "check the network, or name a local copy with `data: PATH`",
        ) from error
    return probe.model_copy(update={"revision": commit})


def _check(name: str, revision: str | None, commit: str, note: Path) -> None:
    """Refuse to go on where the commit cannot be had: answers of another would stand beside those of this one."""
    try:
        found = resolve(name, commit, fetched=DESCRIPTIONS).name
    except UserError as error:
        raise UserError(
            f"{name} was asked at commit {commit}, which cannot be had now ({error.given})",
            f"the same commit, so that answers of two do not stand beside each other (noted in {note})",
            f"make it reachable; or name another one as `revision:`, or run with another --runs folder, to ask "
            f"{revision or 'the main branch'} as it is now",
        ) from None
    if found != commit:
        raise UserError(
            f"{name} was asked at commit {commit}, and is {found} now",
            f"the same commit (noted in {note})",
            "name the commit that you mean as `revision:`",
        )
