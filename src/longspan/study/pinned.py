"""A hub id without a commit stays at the one that it had when it was first asked, so that a study never mixes two."""

from __future__ import annotations

import re
from pathlib import Path

from longspan.engines.source import ModelSource
from longspan.foundation.errors import UserError
from longspan.foundation.files import digest, read_json, write_json
from longspan.models.interchange import DESCRIPTIONS, resolve

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
