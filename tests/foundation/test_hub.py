"""A file of the hub: from the cache, from the hub, or refused at once where there is no connection."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from longspan.foundation.hub import fetch_file

COMMIT = "0123456789abcdef0123456789abcdef01234567"
CONTENT = b'{"kind": "made up"}'


class SmallHub(BaseHTTPRequestHandler):
    """Answers as the hub does, for one file of one repository."""

    def do_HEAD(self) -> None:
        known = self.path.endswith("/owner/name/resolve/main/file.json")
        self.send_response(200 if known else 404)
        headers = {"ETag": '"abc"', "X-Repo-Commit": COMMIT, "Content-Length": str(len(CONTENT))}
        for header, value in (headers if known else {"X-Error-Code": "EntryNotFound"}).items():
            self.send_header(header, value)
        self.end_headers()

    def do_GET(self) -> None:
        self.do_HEAD()
        self.wfile.write(CONTENT)

    def log_message(self, format: str, *arguments: object) -> None:
        pass


@pytest.fixture
def online(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    constants = "huggingface_hub.constants"
    monkeypatch.setattr(f"{constants}.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(f"{constants}.HF_HUB_OFFLINE", False)
    return monkeypatch


def at(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub stands there."""
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", place)
    template = place + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)


@pytest.fixture
def hub(online: pytest.MonkeyPatch) -> Iterator[HTTPServer]:
    server = HTTPServer(("127.0.0.1", 0), SmallHub)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    at(f"http://127.0.0.1:{server.server_port}", online)
    yield server
    server.shutdown()
    server.server_close()


def test_a_file_is_fetched_once_and_found_without_the_hub(hub: HTTPServer, online: pytest.MonkeyPatch) -> None:
    path = fetch_file("owner/name", "file.json")
    assert path.read_bytes() == CONTENT
    at("http://127.0.0.1:9", online)
    assert fetch_file("owner/name", "file.json") == path


def test_what_the_hub_does_not_have_is_told_in_its_words(hub: HTTPServer) -> None:
    with pytest.raises(Exception, match="Entry Not Found"):
        fetch_file("owner/name", "other.json")


def test_a_hub_out_of_reach_is_asked_once(online: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    at("http://127.0.0.1:9", online)
    online.setattr("time.sleep", lambda seconds: pytest.fail(f"it waits for {seconds} s"))
    with caplog.at_level(logging.WARNING), pytest.raises(Exception, match="refused"):
        fetch_file("owner/name", "file.json")
    assert "Retry" not in caplog.text
