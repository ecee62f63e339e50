"""Fetching a dump from a server that stops, resumes, lies or is not there."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from longspan.corpus.sources import WikipediaSource
from longspan.corpus.sources.wikimedia_download import DumpFile, download, resolve
from longspan.foundation.errors import DataError, Stopped, UserError
from longspan.foundation.progress import Progress, silent

DATE = "20261101"
FILE = "pages-articles-multistream.xml.bz2"
NAME = f"testwiki-{DATE}-{FILE}"
CONTENT = bytes(range(256)) * 4000


@dataclass
class Mirror:
    """A Wikimedia mirror on loopback: `files` by path, `cuts` = bytes after which the next answers break off."""

    files: dict[str, bytes] = field(default_factory=dict)
    cuts: list[int] = field(default_factory=list)
    ranges: bool = True
    failures: list[int] = field(default_factory=list)
    log: list[tuple[str, str | None]] = field(default_factory=list)
    url: str = ""

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        wanted = request.headers.get("Range")
        self.log.append((request.path, wanted))
        content = self.files.get(request.path)
        is_list = request.path.endswith("sums.txt")
        if content is None or (self.failures and not is_list):
            request.send_error(404 if content is None else self.failures.pop(0))
            return
        start = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted and self.ranges else 0
        if start >= len(content):
            request.send_response(416)
            request.send_header("Content-Range", f"bytes */{len(content)}")
            request.end_headers()
            return
        request.send_response(206 if start else 200)
        request.send_header("Content-Length", str(len(content) - start))
        request.end_headers()
        cut = self.cuts.pop(0) if self.cuts and not is_list else len(content)
        request.wfile.write(content[start : start + cut])


@pytest.fixture
def mirror() -> Iterator[Mirror]:
    state = Mirror()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            state.answer(self)

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    state.url = f"http://127.0.0.1:{server.server_port}"
    publish(state, CONTENT)
    yield state
    server.shutdown()
    thread.join()
    server.server_close()


def publish(mirror: Mirror, content: bytes, algorithm: str = "sha1") -> None:
    """Put a run of the dump on the mirror as Wikimedia lays it out: dated folder, and lists also under `latest`."""
    checksum = hashlib.new(algorithm, content, usedforsecurity=False).hexdigest()
    listing = f"{'0' * len(checksum)}  testwiki-{DATE}-pages-articles.xml.bz2\n{checksum}  {NAME}\n".encode()
    mirror.files = {
        f"/testwiki/{DATE}/{NAME}": content,
        f"/testwiki/{DATE}/testwiki-{DATE}-{algorithm}sums.txt": listing,
        f"/testwiki/latest/testwiki-latest-{algorithm}sums.txt": listing,
    }


def fetch(mirror: Mirror, folder: Path, date: str = DATE) -> Path:
    return download(resolve(mirror.url, "testwiki", date, FILE), folder, silent, wait_seconds=0)


@pytest.mark.parametrize("date", [DATE, "latest"])
@pytest.mark.parametrize("algorithm", ["sha1", "md5"])
def test_a_dump_is_found_in_the_published_list_and_verified(
    mirror: Mirror, tmp_path: Path, date: str, algorithm: str
) -> None:
    publish(mirror, CONTENT, algorithm)
    path = fetch(mirror, tmp_path, date)
    assert (path.name, path.read_bytes()) == (NAME, CONTENT)
    assert sorted(file.name for file in tmp_path.iterdir()) == [NAME, f"{NAME}.json"]
    requests = len(mirror.log)
    assert fetch(mirror, tmp_path, date) == path
    assert not any(name.endswith(".bz2") for name, _ in mirror.log[requests:])


def test_a_transfer_that_breaks_off_goes_on_where_it_stopped(mirror: Mirror, tmp_path: Path) -> None:
    mirror.cuts = [300_000, 1, 500_000]
    mirror.failures = [503]
    assert fetch(mirror, tmp_path).read_bytes() == CONTENT
    ranges = [wanted for name, wanted in mirror.log if name.endswith(".bz2")]
    assert ranges == [None, None, "bytes=300000-", "bytes=300001-", "bytes=800001-"]


def test_a_server_without_ranges_starts_anew(mirror: Mirror, tmp_path: Path) -> None:
    mirror.ranges, mirror.cuts = False, [700_000]
    assert fetch(mirror, tmp_path).read_bytes() == CONTENT


def test_a_server_that_always_breaks_off_is_named_and_the_next_run_goes_on(mirror: Mirror, tmp_path: Path) -> None:
    mirror.cuts = [100] * 6
    with pytest.raises(DataError, match=rf"{NAME} could not be fetched[\s\S]*600 bytes are in"):
        fetch(mirror, tmp_path)
    assert fetch(mirror, tmp_path).read_bytes() == CONTENT
    assert mirror.log[-1] == (f"/testwiki/{DATE}/{NAME}", "bytes=600-")


def test_a_stopped_download_goes_on(mirror: Mirror, tmp_path: Path) -> None:
    def stop(progress: Progress) -> None:
        if progress.done > 0:
            raise Stopped("stopped")

    file = resolve(mirror.url, "testwiki", DATE, FILE)
    with pytest.raises(Stopped):
        download(file, tmp_path, stop)
    assert not (tmp_path / NAME).exists()
    assert 0 < (tmp_path / f"{NAME}.part").stat().st_size < len(CONTENT)
    assert fetch(mirror, tmp_path).read_bytes() == CONTENT
    assert mirror.log[-1][1] is not None


def test_a_wrong_checksum_is_refused_by_name_and_costs_no_second_download(mirror: Mirror, tmp_path: Path) -> None:
    publish(mirror, CONTENT)
    mirror.files[f"/testwiki/{DATE}/{NAME}"] = CONTENT[:-1] + b"!"
    for _ in range(2):
        with pytest.raises(DataError, match=rf"{NAME}\.part has the sha1 [\s\S]*remove"):
            fetch(mirror, tmp_path)
    assert not (tmp_path / NAME).exists()
    transfers = [wanted for name, wanted in mirror.log if name.endswith(".bz2")]
    assert transfers == [None, f"bytes={len(CONTENT)}-"]
    # The list is mended: what was fetched is right after all.
    publish(mirror, CONTENT[:-1] + b"!")
    assert fetch(mirror, tmp_path).read_bytes()[-1:] == b"!"


def test_a_truncated_file_under_the_final_name_is_not_trusted(mirror: Mirror, tmp_path: Path) -> None:
    path = fetch(mirror, tmp_path)
    path.write_bytes(CONTENT[:1000])
    assert fetch(mirror, tmp_path).read_bytes() == CONTENT


def test_a_part_that_is_too_long_is_fetched_anew(mirror: Mirror, tmp_path: Path) -> None:
    (tmp_path / f"{NAME}.part").write_bytes(CONTENT + b"more")
    assert fetch(mirror, tmp_path).read_bytes() == CONTENT


def test_an_unknown_date_or_an_unfinished_run_is_refused(mirror: Mirror, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no file testwiki-20200101-pages[\s\S]*finished"):
        fetch(mirror, tmp_path, "20200101")
    with pytest.raises(UserError, match="otherwiki"):
        resolve(mirror.url, "otherwiki", "latest", FILE)


def test_a_mirror_that_does_not_answer_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"127\.0\.0\.1:1/.* does not answer"):
        resolve("http://127.0.0.1:1", "testwiki", DATE, FILE)
    file = DumpFile("x", "http://127.0.0.1:1/x", "sha1", "0")
    with pytest.raises(DataError, match="could not be fetched"):
        download(file, tmp_path, silent, wait_seconds=0)
    with pytest.raises(UserError, match="mirror"):
        resolve("file:///etc", "testwiki", DATE, FILE)


def test_latest_is_resolved_once_and_a_fetched_dump_needs_no_network(mirror: Mirror, tmp_path: Path) -> None:
    source = WikipediaSource(wiki="testwiki", mirror=mirror.url)
    before = source.fingerprint(tmp_path)
    path = source.dump(tmp_path)
    mirror.files.clear()
    assert source.fingerprint(tmp_path) == before
    assert source.dump(tmp_path) == path
    checksum = hashlib.sha1(CONTENT, usedforsecurity=False).hexdigest()
    assert before["inputs"]["dump"] == {"name": NAME, "sha1": checksum}
    assert json.loads(path.with_name(f"{NAME}.json").read_text())["bytes"] == len(CONTENT)
