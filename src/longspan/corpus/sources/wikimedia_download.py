"""Fetch a Wikimedia dump: resumable, and verified against the checksum lists that Wikimedia publishes beside it."""

from __future__ import annotations

import hashlib
import http.client
import re
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path

from longspan.foundation.errors import DataError, UserError
from longspan.foundation.files import disk_errors, read_json, write_json
from longspan.foundation.progress import Progress, Report

_CHUNK_BYTES = 1 << 18
_TIMEOUT_SECONDS = 60.0
_ATTEMPTS = 6
_HEADERS = {"User-Agent": "longspan/0.1 (language-model research; https://github.com/longspan/longspan)"}
# Wikimedia publishes sha1 and md5 lists per run, named after the run: enwiki-20261101-sha1sums.txt.
_LISTS = ("sha1", "md5")


@dataclass(frozen=True, slots=True)
class DumpFile:
    """One file of a dump, as its checksum list names it."""

    name: str
    url: str
    algorithm: str
    checksum: str


def resolve(mirror: str, wiki: str, date: str, ending: str) -> DumpFile:
    """Find a dump file in the checksum lists.

    The folder `latest` mirrors the newest run of each file; its lists name the files of that run, so `latest` becomes
    a date here and the file is fetched from the dated folder, which never changes.

    Args:
        mirror: e.g. `https://dumps.wikimedia.org`.
        wiki: the wiki's database name, e.g. `enwiki`.
        date: `YYYYMMDD` or `latest`.
        ending: what follows the date in the file's name, e.g. `pages-articles-multistream.xml.bz2`.

    Raises:
        UserError: no such wiki or date, or the list (of a run still in the making) does not name the file.
        DataError: the server does not answer.
    """
    folder = f"{mirror.rstrip('/')}/{wiki}/{date}"
    pattern = re.compile(rf"([0-9a-f]+)\s+\*?({re.escape(wiki)}-(\d{{8}})-{re.escape(ending)})")
    for algorithm in _LISTS:
        listing = _get_text(f"{folder}/{wiki}-{date}-{algorithm}sums.txt")
        for line in (listing or "").splitlines():
            if match := pattern.fullmatch(line.strip()):
                checksum, name, run = match.groups()
                return DumpFile(name, f"{mirror.rstrip('/')}/{wiki}/{run}/{name}", algorithm, checksum)
    raise UserError(
        f"no file {wiki}-{date}-{ending} in the checksum lists of {folder}/",
        "a wiki and a date whose dump is finished (about a week after its date)",
        f"look at {mirror.rstrip('/')}/{wiki}/ and change `wiki`, `date` or `file`",
    )


def download(file: DumpFile, folder: Path, report: Report, *, wait_seconds: float = 2.0) -> Path:
    """Fetch and verify `file`; what was fetched before, by this or an earlier run, is not fetched again.

    While incomplete the file is called `NAME.part`; it gets its name when its checksum is right, and `NAME.json` then
    records that. A wrong checksum leaves `NAME.part`, so that a list that was wrong costs no second download.

    Args:
        file: from `resolve`.
        folder: where the file goes.
        report: takes progress in bytes; it may raise `Stopped`, and the next call goes on from there.
        wait_seconds: pause before the second attempt, doubled for each further one.

    Raises:
        DataError: wrong checksum, a transfer that ends early again and again, or no disk space; by name.
    """
    folder.mkdir(parents=True, exist_ok=True)
    target, part = folder / file.name, folder / f"{file.name}.part"
    if is_verified(target, file):
        return target
    for attempt in range(_ATTEMPTS):
        try:
            if _fetch(file.url, part, report):
                break
            cause: object = "the transfer ended early"
        except (http.client.HTTPException, TimeoutError, ConnectionError, urllib.error.URLError) as error:
            cause = error
        if attempt == _ATTEMPTS - 1:
            got = part.stat().st_size if part.exists() else 0
            raise DataError(
                f"{file.url} could not be fetched ({cause}); {got:,} bytes are in {part}",
                "a whole transfer",
                "run the same command again: it goes on from there",
            )
        report(Progress("download", message=f"{file.name}: {cause}; trying again"))
        time.sleep(wait_seconds * 2**attempt)
    found = _checksum(part, file.algorithm, report)
    if found != file.checksum:
        raise DataError(
            f"{part} has the {file.algorithm} {found}, but the published list says {file.checksum}",
            "the file as published",
            f"remove {part} and run again to fetch it anew",
        )
    part.replace(target)
    write_json(_record_path(target), _record(target, file))
    return target


def is_verified(target: Path, file: DumpFile) -> bool:
    """Whether `target` is the file that an earlier `download` verified, by its record and size."""
    record = _record_path(target)
    return target.is_file() and record.is_file() and bool(read_json(record) == _record(target, file))


def _record_path(target: Path) -> Path:
    return target.with_name(f"{target.name}.json")


def _record(target: Path, file: DumpFile) -> dict[str, object]:
    return {"url": file.url, file.algorithm: file.checksum, "bytes": target.stat().st_size}


def _open(url: str, headers: dict[str, str]) -> http.client.HTTPResponse:
    if not url.startswith(("http://", "https://")):
        raise UserError(f"mirror {url}", "an http:// or https:// address", "change corpus.mirror")
    request = urllib.request.Request(url, headers=_HEADERS | headers)
    response: http.client.HTTPResponse = urllib.request.urlopen(request, timeout=_TIMEOUT_SECONDS)
    return response


def _get_text(url: str) -> str | None:
    try:
        with _open(url, {}) as response:
            return response.read().decode()
    except urllib.error.HTTPError as error:
        if error.code == HTTPStatus.NOT_FOUND:
            return None
        raise _unreachable(url, error) from None
    except (urllib.error.URLError, http.client.HTTPException, OSError) as error:
        raise _unreachable(url, error) from None


def _unreachable(url: str, error: Exception) -> DataError:
    return DataError(f"{url} does not answer ({error})", "a reachable mirror", "check the network or set `mirror`")


def _fetch(url: str, part: Path, report: Report) -> bool:
    """Append what is missing to `part`; True when it is whole."""
    have = part.stat().st_size if part.exists() else 0
    try:
        response = _open(url, {"Range": f"bytes={have}-"} if have else {})
    except urllib.error.HTTPError as error:
        if error.code == HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE and have:
            # The part is as long as the file (its checksum will tell) or longer (then it is of no use).
            if int((error.headers.get("Content-Range") or "").rpartition("/")[2] or 0) == have:
                return True
            part.unlink()
            return False
        if error.code < HTTPStatus.INTERNAL_SERVER_ERROR and error.code != HTTPStatus.TOO_MANY_REQUESTS:
            raise _unreachable(url, error) from None
        raise
    with response, disk_errors(part):
        if response.status != HTTPStatus.PARTIAL_CONTENT:
            have = 0
        length = response.headers.get("Content-Length")
        total = have + int(length) if length else None
        with part.open("ab" if have else "wb") as out:
            _copy(response.read, out.write, have, total, report)
        return total is None or part.stat().st_size == total


def _copy(
    read: Callable[[int], bytes], write: Callable[[bytes], int], have: int, total: int | None, report: Report
) -> None:
    report(Progress("download", have, total, "B"))
    while chunk := read(_CHUNK_BYTES):
        write(chunk)
        have += len(chunk)
        report(Progress("download", have, total, "B"))


def _checksum(path: Path, algorithm: str, report: Report) -> str:
    hasher = hashlib.new(algorithm, usedforsecurity=False)
    done, total = 0, path.stat().st_size
    with path.open("rb") as file:
        while chunk := file.read(1 << 22):
            hasher.update(chunk)
            done += len(chunk)
            report(Progress("verify", done, total, "B"))
    return hasher.hexdigest()
