"""Requests to a server that may be slow, busy, gone or wrong: each ends in a reply, a cause, or a stop that resumes."""

from __future__ import annotations

import json
import os
import random
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

from longspan.engines.base import Failure
from longspan.engines.source import EndpointArguments
from longspan.foundation.errors import MachineError, UserError
from longspan.foundation.extras import require

FIRST_PAUSE, LONGEST_PAUSE = 0.5, 30.0
"""Seconds before the first repetition of a request, doubled with each, and at most."""
_CONNECT_SECONDS = 10.0
_TOO_LONG = re.compile(
    r"context[ _]length|maximum context|max_model_len|context window|too (many|long)|longer than the maximum|"
    r"exceeds? the (maximum|context)",
    re.I,
)
_BUSY = {429, 500, 502, 503, 504}
_DENIED = {401, 403, 404}
Result = TypeVar("Result")


class ServerGone(MachineError):
    """A server cannot be reached, or refuses all for now: what was answered is kept, the same command goes on."""

    exit_code = 3


class RequestFailed(Exception):
    """One request has no answer, and why; others may."""

    def __init__(self, cause: Failure, detail: str) -> None:
        super().__init__(f"{cause}: {detail}")
        self.cause: Failure = cause
        self.detail = detail


@dataclass
class _Again(Exception):
    """An attempt failed in a way that the next may not."""

    cause: Failure
    detail: str
    pause: float | None = None
    status: int | None = None


class Server:
    """A connection to one server.

    Attributes:
        url: its address.
        last_words: what is known of why it is gone; empty where nothing is.
    """

    def __init__(
        self, url: str, arguments: EndpointArguments, *, sleep: Callable[[float], None] = time.sleep, what: str = ""
    ) -> None:
        """Open nothing yet.

        Args:
            url: without `/v1`.
            arguments: how it is asked.
            sleep: waits so many seconds.
            what: the subject, for errors.

        Raises:
            MissingExtra: the HTTP client is not installed.
        """
        self._http: Any = require("endpoint")
        self.url = url.rstrip("/").removesuffix("/v1")
        self._arguments, self._sleep, self._what = arguments, sleep, what or url
        key = os.environ.get(arguments.key)
        self._client: Any = self._http.Client(
            base_url=self.url,
            timeout=self._http.Timeout(arguments.timeout, connect=min(_CONNECT_SECONDS, arguments.timeout), pool=None),
            limits=self._http.Limits(
                max_connections=arguments.concurrency, max_keepalive_connections=arguments.concurrency
            ),
            headers={"Authorization": f"Bearer {key}"} if key else {},
        )
        self._jitter = random.Random(0)
        self.last_words: Callable[[], str] = str

    def close(self) -> None:
        """Close the connections."""
        self._client.close()

    def get(self, path: str) -> Any:
        """The JSON at a path, or the text where it is none; None where there is nothing (404).

        Raises:
            ServerGone, RequestFailed, UserError: as `post`.
        """

        def once() -> Any:
            response = self._client.get(path)
            if response.status_code == 404:
                return None
            self._check(response.status_code, lambda: response.text, response.headers)
            try:
                return response.json()
            except ValueError:
                return response.text

        return self._persist(once)

    def post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """The JSON object that answers a request.

        Raises:
            RequestFailed: this request has no answer: too long, refused, malformed or too late, time and again.
            ServerGone: the server is not there, or busy after all repetitions.
            UserError: the key, the model or the address is wrong.
        """

        def once() -> dict[str, Any]:
            response = self._client.post(path, json=body)
            self._check(response.status_code, lambda: response.text, response.headers)
            return _object(response.text)

        return self._persist(once)

    def stream(self, path: str, body: dict[str, Any]) -> list[tuple[float, dict[str, Any]]]:
        """The events that answer a request, each with the seconds since it was sent; see `post`.

        A reply that is no stream of events is one event.
        """

        def once() -> list[tuple[float, dict[str, Any]]]:
            began = time.perf_counter()
            with self._client.stream("POST", path, json=body) as response:
                self._check(response.status_code, lambda: response.read().decode(errors="replace"), response.headers)
                if "event-stream" not in response.headers.get("content-type", ""):
                    text = response.read().decode(errors="replace")
                    return [(time.perf_counter() - began, _object(text))]
                return list(self._events(response.iter_lines(), began))

        return self._persist(once)

    def _events(self, lines: Iterator[str], began: float) -> Iterator[tuple[float, dict[str, Any]]]:
        ended = done = False
        # Read to the very end, also after the end was said: only then can the connection be used again.
        for line in lines:
            if done or not line.startswith("data:"):
                continue
            data = line.removeprefix("data:").strip()
            if data == "[DONE]":
                ended = done = True
                continue
            event = _object(data)
            if error := event.get("error"):
                raise self._refused(str(error))
            # Some servers end with the last choice and never say so.
            ended = ended or any(
                isinstance(choice, dict) and choice.get("finish_reason") for choice in event.get("choices") or []
            )
            yield time.perf_counter() - began, event
        if not ended:
            raise _Again("malformed reply", "the stream ended before its end was said")

    def _persist(self, once: Callable[[], Result]) -> Result:
        """Try, and try again with growing pauses what may succeed later."""
        for attempt in range(self._arguments.retries + 1):
            try:
                return self._attempt(once)
            except _Again as error:
                last = error
            if attempt < self._arguments.retries:
                pause = min(LONGEST_PAUSE, FIRST_PAUSE * 2**attempt)
                # Jitter, so that many clients do not come back together.
                self._sleep(last.pause if last.pause is not None else pause * (0.5 + self._jitter.random() / 2))
        raise self._gave_up(last)

    def _attempt(self, once: Callable[[], Result]) -> Result:
        http = self._http
        try:
            return once()
        except http.TimeoutException as error:
            raise _Again("timeout", f"no byte for {self._arguments.timeout:g} s ({type(error).__name__})") from None
        except (http.TransportError, http.StreamError) as error:
            raise _Again("transport error", f"{type(error).__name__}: {error}") from None
        except http.DecodingError as error:
            raise _Again("malformed reply", str(error)) from None

    def _gave_up(self, last: _Again) -> Exception:
        tries = f"after {self._arguments.retries + 1} tries"
        if last.status == 429:
            return ServerGone(
                f"{self._what} is rate-limited at {self.url} {tries}: {last.detail}",
                "as many requests as the server allows",
                "run the same command again later: it goes on from here; or lower `arguments.concurrency`",
            )
        if last.status in (502, 503, 504) or (last.cause in ("timeout", "transport error") and not self.is_alive()):
            return ServerGone(
                f"{self._what} cannot be reached at {self.url} {tries}: {last.detail}{self.last_words()}",
                "a server that answers",
                "start it, then run the same command again: it goes on from here",
            )
        return RequestFailed(last.cause, last.detail)

    def is_alive(self) -> bool:
        """Whether anything answers at the address now."""
        try:
            self._client.get("/v1/models", timeout=_CONNECT_SECONDS)
        except self._http.HTTPError:
            return False
        return True

    def is_healthy(self) -> bool:
        """Whether the server says that it is ready."""
        try:
            return int(self._client.get("/health", timeout=_CONNECT_SECONDS).status_code) == 200
        except self._http.HTTPError:
            return False

    def _check(self, status: int, text: Callable[[], str], headers: Any) -> None:
        if status < 300:
            return
        if status < 400:
            # Not followed: the key is for this address alone.
            raise UserError(
                f"{self._what} at {self.url} answers HTTP {status} and points to {headers.get('location')}",
                "the address that answers itself",
                "change `base_url`",
            )
        detail = f"HTTP {status}: {_message(text())}"
        if status in _BUSY:
            raise _Again("refused request", detail, _seconds(headers.get("retry-after")), status)
        if status in _DENIED:
            raise UserError(
                f"{self._what} at {self.url} answers {detail}",
                "a model that is served there, and a key that it takes",
                f"check `base_url` and `model`, and the environment variable {self._arguments.key}",
            )
        raise self._refused(detail)

    def _refused(self, detail: str) -> RequestFailed:
        return RequestFailed("context overflow" if _TOO_LONG.search(detail) else "refused request", detail)


def _object(text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except ValueError:
        raise _Again("malformed reply", f"not JSON: {text[:200]!r}") from None
    if not isinstance(found, dict):
        raise _Again("malformed reply", f"no JSON object: {text[:200]!r}")
    return found


def _message(text: str) -> str:
    """What the server says went wrong."""
    try:
        found = json.loads(text)
    except ValueError:
        return " ".join(text.split())[:300]
    for key in ("error", "detail", "message"):
        if isinstance(found, dict) and key in found:
            found = found[key]
    return str(found)[:300]


def _seconds(text: str | None) -> float | None:
    try:
        return min(float(text), 600.0) if text is not None else None
    except ValueError:
        return None
