"""Servers that stand behind an ambassador, for tests that know only the contract: threads of the test's own process."""

from __future__ import annotations

import contextlib
import http.server
import json
import socket
import socketserver
import threading
from typing import Any, Self, TextIO

PATIENCE = 20.0


class _Threads(socketserver.ThreadingTCPServer):
    daemon_threads = True
    request_queue_size = 64


class _Server:
    """Serves on a port of loopback while it is entered."""

    def __init__(self, name: str, handler: type[socketserver.BaseRequestHandler]) -> None:
        self.name = name
        self._server = _Threads(("127.0.0.1", 0), type("Handler", (handler,), {"owner": self}))
        self.address = f"127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, args=[0.02], daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()


class Lines(_Server):
    """Answers each line with its name and the line."""

    def __init__(self, name: str) -> None:
        super().__init__(name, _LineHandler)


class _LineHandler(socketserver.StreamRequestHandler):
    owner: Lines

    def handle(self) -> None:
        for line in self.rfile:
            self.wfile.write(f"{self.owner.name} ".encode() + line)


class Web(_Server):
    """HTTP/1.1: `/status/N` answers so, `/size/N` with N bytes, `/held` once `release` is set; others say what came."""

    def __init__(self, name: str) -> None:
        self.held = threading.Event()
        """Set when a request is being held."""
        self.release = threading.Event()
        super().__init__(name, _WebHandler)


class _WebHandler(http.server.BaseHTTPRequestHandler):
    owner: Web
    protocol_version = "HTTP/1.1"

    def _answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("content-length") or 0))
        kind, _, argument = self.path.removeprefix("/").partition("/")
        if kind == "held":
            self.owner.held.set()
            self.owner.release.wait(PATIENCE)
        said = {"name": self.owner.name, "method": self.command, "path": self.path, "body": body.decode("latin-1")}
        content = json.dumps(said | {"headers": {k.lower(): v for k, v in self.headers.items()}}).encode()
        if kind == "size":
            content = b"x" * int(argument)
        with contextlib.suppress(OSError):  # who asked may have gone
            self.send_response(int(argument) if kind == "status" else 200)
            self.send_header("content-length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

    do_GET = do_POST = do_PUT = do_DELETE = _answer  # noqa: N815 - the library's names

    def log_message(self, *_: Any) -> None:
        """Says nothing."""


def port(address: str) -> int:
    """Of `127.0.0.1:PORT`."""
    return int(address.rpartition(":")[2])


def dial(address: str) -> socket.socket:
    """A connection to `127.0.0.1:PORT` or `unix:PATH`."""
    if address.startswith("unix:"):
        found = socket.socket(socket.AF_UNIX)
        found.settimeout(PATIENCE)
        found.connect(address.removeprefix("unix:"))
        return found
    return socket.create_connection(("127.0.0.1", port(address)), timeout=PATIENCE)


def say(address: str, line: str = "x") -> str:
    """A line over a connection of its own, and the answer of a Lines; empty where it was closed."""
    with dial(address) as connection:
        connection.sendall(f"{line}\n".encode())
        with connection.makefile() as answers:
            return heard(answers)


def heard(answers: TextIO) -> str:
    """The next line; empty where the connection was closed or cut."""
    try:
        return answers.readline().strip()
    except ConnectionError:
        return ""


def is_refused(address: str) -> bool:
    """Whether nobody accepts there."""
    try:
        dial(address).close()
    except (ConnectionRefusedError, FileNotFoundError):
        return True
    return False
