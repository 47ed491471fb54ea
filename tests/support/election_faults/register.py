"""What a leader protects: a register that keeps the highest token it has seen and refuses lower ones.

It is a thread of the harness behind a Unix socket, so that no app that is stopped can hold it up.
"""

from __future__ import annotations

import contextlib
import socket
import socketserver
import threading
from collections import defaultdict
from pathlib import Path
from typing import Self

import msgspec
from msgspec import Struct

from support.election_faults.history import Write
from support.history.recorder import boot_ns


class Ask(Struct, frozen=True):
    """A write, as it is sent: one line."""

    who: str
    domain: str
    token: int
    decided: int


class Register:
    """Listens until the context ends."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.writes: list[Write] = []
        self._highest: dict[str, int] = defaultdict(int)
        self._deciding = threading.Lock()
        take = self._take

        class Handler(socketserver.StreamRequestHandler):
            def handle(self) -> None:
                with contextlib.suppress(ConnectionError):  # apps are killed
                    for line in self.rfile:
                        self.wfile.write(b"1\n" if take(msgspec.json.decode(line, type=Ask)) else b"0\n")

        self._server = socketserver.ThreadingUnixStreamServer(str(path), Handler)
        self._server.daemon_threads = True
        self._server.block_on_close = False
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05})

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def _take(self, ask: Ask) -> bool:
        with self._deciding:
            accepted = ask.token >= self._highest[ask.domain]
            if accepted:
                self._highest[ask.domain] = ask.token
            self.writes.append(Write(boot_ns(), ask.who, ask.domain, ask.token, ask.decided, accepted))
        return accepted


class Client:
    """An app's connection to it; one thread's."""

    def __init__(self, path: Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.connect(str(path))
        self._answers = self._socket.makefile("rb")

    def write(self, ask: Ask) -> bool:
        """Whether it was accepted."""
        self._socket.sendall(msgspec.json.encode(ask) + b"\n")
        return self._answers.readline() == b"1\n"
