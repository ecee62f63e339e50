"""Notices that another rank has gone where no error of torch reaches this one: while it waits for it on the device.

Where hosts talk through gloo the connection to a process that was killed breaks, and torch says so. A process that
replays a CUDA graph in which NCCL waits for a lost one hears nothing, and waits for ever inside a call into CUDA. So
every process holds a connection to rank 0, and a thread at each end waits for a last word: a process that is killed
says none, and its machine, if that goes too, answers no more (TCP's keepalive).

Sockets of Python, not of gloo: a thread that waits inside torch when a process ends would bring it down.
"""

from __future__ import annotations

import os
import secrets
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress

import torch.distributed as dist

GRACE = 15.0
"""Seconds: after so long a process that still trains with a lost one is ended."""
CHECKED_EVERY = 0.1
"""Seconds."""
CONNECTING = 5.0
"""Seconds for one address of rank 0."""
KEEPALIVE = {"TCP_KEEPIDLE": 60, "TCP_KEEPINTVL": 10, "TCP_KEEPCNT": 6}
"""Seconds without a word, seconds between questions, questions without an answer: two minutes."""
TOGETHER, ALONE = b"t", b"a"
"""Last words: all ranks left for the same reason; or this one failed by itself, and the others may still wait."""


class LossWatch:
    """Listens as long as a group of ranks exists; ends this process where it waits in vain, and says why.

    Args:
        rank: of this process.
        size: processes in all, which have met; all of them make their watch at the same time.
        host: where rank 0 may be reached, besides its own name.
        say: the message in which this process ends.
        tell: hears where rank 0 cannot be reached: then nothing is noticed here but what torch notices.
    """

    def __init__(self, rank: int, size: int, host: str, say: Callable[[], str], tell: Callable[[str], None]) -> None:
        self._say = say
        self._left = threading.Event()
        self._waiting_since: float | None = None
        self._connections = _accepted(size) if rank == 0 else _connected(rank, size, host, tell)
        self._threads = [
            threading.Thread(target=self._listen, args=(connection,), name="hears of lost ranks", daemon=True)
            for connection in self._connections
        ]
        for thread in self._threads:
            thread.start()

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Around work that cannot go on without the other ranks."""
        self._waiting_since = time.monotonic()
        try:
            yield
        finally:
            self._waiting_since = None

    def leave(self, *, alone: bool) -> None:
        """Say the last word; nothing happens to this process any more.

        Args:
            alone: whether it leaves for a reason that the others do not share.
        """
        self._left.set()
        for connection in self._connections:
            # It may have gone itself. What was sent arrives before the end of the connection does.
            with suppress(OSError):
                connection.sendall(ALONE if alone else TOGETHER)
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        for thread, connection in zip(self._threads, self._connections, strict=True):
            thread.join()
            connection.close()

    def _listen(self, connection: socket.socket) -> None:
        try:
            word = connection.recv(1)
        except OSError:
            word = b""
        if word == TOGETHER:
            return
        lost = time.monotonic()
        while not self._left.wait(CHECKED_EVERY):
            since = self._waiting_since
            if since is not None and time.monotonic() - max(since, lost) > GRACE:
                sys.stderr.write(f"error: {self._say()}\n")
                sys.stderr.flush()
                # The main thread is inside a call that does not return.
                os._exit(1)


def _accepted(size: int) -> list[socket.socket]:
    """Rank 0's connections: it tells the others where it listens, and hears who has come."""
    with socket.create_server(("", 0), backlog=max(size, 16)) as server:
        secret = secrets.token_bytes(16)
        dist.broadcast_object_list([(server.getsockname()[1], secret, (socket.gethostname(), socket.getfqdn()))])
        came: list[bool] = [True] * size
        dist.all_gather_object(came, True)
        connections: list[socket.socket] = []
        while len(connections) < sum(came) - 1:
            connection, _ = server.accept()
            connection.settimeout(CONNECTING)
            try:
                known = connection.recv(len(secret), socket.MSG_WAITALL) == secret
            except OSError:
                known = False
            if known:
                connections.append(_kept_alive(connection))
            else:
                connection.close()
        return connections


def _connected(rank: int, size: int, host: str, tell: Callable[[str], None]) -> list[socket.socket]:
    """The connection to rank 0, if one of its addresses answers."""
    told: list[tuple[int, bytes, Sequence[str]]] = [(0, b"", ())]
    dist.broadcast_object_list(told)
    port, secret, names = told[0]
    connections: list[socket.socket] = []
    for address in (host, *names):
        with suppress(OSError):
            connection = socket.create_connection((address, port), CONNECTING)
            connection.sendall(secret)
            connections.append(_kept_alive(connection))
            break
    dist.all_gather_object([False] * size, bool(connections))
    if not connections:
        tried = f"none of {', '.join((host, *names))}, port {port}"
        tell(
            f"process {rank} of {size} reaches process 0 at {tried}: the loss of another one is not noticed here while "
            "this one waits on its GPU"
        )
    return connections


def _kept_alive(connection: socket.socket) -> socket.socket:
    connection.settimeout(None)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in KEEPALIVE.items():
        if hasattr(socket, name):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
    return connection
