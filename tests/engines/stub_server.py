"""A server of our own that answers as it is told, so that every way in which one can fail is met."""

from __future__ import annotations

import itertools
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Reply = tuple[int, Any, dict[str, str]]
"""Status, body (JSON, or text as it is), headers."""


class Stub:
    """What the server was asked, and how it answers.

    Attributes:
        asked: (path, body) of every request, in order.
        behave: answers a request to /v1/completions or /v1/chat/completions; None: as a good server.
        limit: tokens that it takes.
        model, metrics: what it serves, and what it says at /metrics.
        listed: the status of its list of models.
        ids, echo: whether it takes token ids, and gives likelihoods of a prompt.
    """

    def __init__(self) -> None:
        self.asked: list[tuple[str, dict[str, Any]]] = []
        self.behave: Callable[[dict[str, Any]], Reply | None] | None = None
        self.limit = 512
        self.model, self.metrics, self.listed = "m", "", 200
        self.ids = self.echo = True
        self.under_way = self.most_under_way = self.connections = 0
        self.lock = threading.Lock()
        self.url = ""

    def answer(self, path: str, body: dict[str, Any]) -> Reply:
        if self.behave is not None and (special := self.behave(body)) is not None:
            return special
        prompt = body.get("prompt", "")
        if isinstance(prompt, list) and not self.ids:
            return 422, {"detail": "prompt must be a string"}, {}
        if len(prompt) + body["max_tokens"] > self.limit and isinstance(prompt, list):
            text = f"This model's maximum context length is {self.limit} tokens."
            return 400, {"error": {"message": text}}, {}
        if body.get("echo"):
            if not self.echo:
                return 400, {"error": {"message": "echo is not supported"}}, {}
            # The likelihood of a token is a function of it and of the one before.
            values = [None, *(-(a + 2 * b) / 100 for a, b in itertools.pairwise(prompt)), -0.5]
            return 200, {"choices": [{"text": "", "logprobs": {"token_logprobs": values}}]}, {}
        length = len(prompt) if isinstance(prompt, list) else 3
        usage = {"prompt_tokens": length, "completion_tokens": body["max_tokens"]}
        words = [f" {number}" for number in range(body["max_tokens"])]
        chat = path.endswith("chat/completions")
        if not body.get("stream"):
            return 200, {"choices": [{"text": "".join(words), "finish_reason": "length"}], "usage": usage}, {}
        events: list[Any] = []
        for number, word in enumerate(words):
            choice: dict[str, Any] = {"delta": {"content": word}} if chat else {"text": word}
            if "return_token_ids" in body:
                choice["token_ids"] = [number]
            events.append({"choices": [choice]})
        events[-1]["choices"][0]["finish_reason"] = "length"
        return 200, [*events, {"choices": [], "usage": usage}], {}


@contextmanager
def serving(port: int = 0) -> Iterator[Stub]:
    """A stub at an address of its own."""
    stub = Stub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *arguments: Any) -> None:
            """Say nothing."""

        def setup(self) -> None:
            super().setup()
            stub.connections += 1

        def do_GET(self) -> None:
            known = {
                "/v1/models": {"data": [{"id": stub.model, "max_model_len": stub.limit}]},
                "/health": "",
                "/version": {"version": "0.0"},
                "/metrics": stub.metrics,
            }
            status = stub.listed if self.path == "/v1/models" else 200 if self.path in known else 404
            self._send(status, known.get(self.path, ""), {})

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with stub.lock:
                stub.asked.append((self.path, body))
                stub.under_way += 1
                stub.most_under_way = max(stub.most_under_way, stub.under_way)
            try:
                self._send(*stub.answer(self.path, body))
            except (BrokenPipeError, ConnectionResetError):
                pass
            finally:
                with stub.lock:
                    stub.under_way -= 1

        def _send(self, status: int, body: Any, headers: dict[str, str]) -> None:
            if headers.pop("slow", None):
                time.sleep(0.5)
            if isinstance(body, list):
                text = "".join(f"data: {each if isinstance(each, str) else json.dumps(each)}\n\n" for each in body)
                text += "" if headers.pop("cut", None) else "data: [DONE]\n\n"
                kind = "text/event-stream"
            else:
                text, kind = body if isinstance(body, str) else json.dumps(body), "application/json"
            content = text.encode()
            self.send_response(status)
            for name, value in {"Content-Type": kind, "Content-Length": str(len(content)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(content)

    server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
    stub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield stub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
