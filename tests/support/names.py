"""A name server for tests, in namespaces of their own: there it has port 53, and the system's resolver asks it.

A test runs a second pytest there (`run_there`), which then has the fixture `names` and the tests that need it.
"""

from __future__ import annotations

import contextlib
import fcntl
import ipaddress
import os
import shutil
import socket
import struct
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import Any

from dnslib import AAAA, QTYPE, RCODE, RR, A, DNSError, DNSRecord
from dnslib.server import DNSHandler, DNSLogger, DNSServer

_HERE = "RETINUE_TEST_NAMES"
_DATAGRAM = 512
_UP, _GET_FLAGS, _SET_FLAGS = 1, 0x8913, 0x8914
"""IFF_UP, SIOCGIFFLAGS, SIOCSIFFLAGS."""
_SETUP = """
set -e
for file in resolv.conf hosts nsswitch.conf; do
  if [ -e "/etc/$file" ]; then mount --bind "$0/$file" "/etc/$file"; fi
done
exec "$@"
"""
_FILES = {
    "resolv.conf": "nameserver 127.0.0.1\noptions timeout:5 attempts:1\n",
    "hosts": "127.0.0.1 localhost\n::1 localhost\n10.0.0.9 of-hosts.example\n",
    "nsswitch.conf": "hosts: files dns\n",
}


def are_here() -> bool:
    """Whether this process runs where the name server is asked."""
    return _HERE in os.environ


def can_be() -> bool:
    """Whether this machine lets us have such a place."""
    return (
        shutil.which("unshare") is not None
        and not subprocess.run(["unshare", "-rnm", "true"], check=False, capture_output=True).returncode
    )


def run_there(directory: Path, *files: Path) -> subprocess.CompletedProcess[str]:
    """Runs what needs the name server of these files of tests."""
    for name, text in _FILES.items():
        (directory / name).write_text(text)
    pytest = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *map(str, files)]
    command = ["unshare", "-rnm", "sh", "-c", _SETUP, str(directory), *pytest]
    environment = {name: text for name, text in os.environ.items() if not name.startswith("PYTEST_")}
    return subprocess.run(command, check=False, capture_output=True, text=True, env=environment | {_HERE: "1"})


class Mode(Enum):
    """How it answers."""

    ANSWER = "answer"
    FAIL = "fail"
    """SERVFAIL."""
    SILENT = "silent"


class Names:
    """Answers for the names that it has; others do not exist."""

    def __init__(self) -> None:
        self.mode = Mode.ANSWER
        self.hosts: dict[str, Sequence[str]] = {}
        """IP addresses by name."""
        self.failed = 0
        """How many questions got a SERVFAIL."""

    def resolve(self, request: Any, handler: DNSHandler) -> Any:
        """For dnslib."""
        reply = request.reply()
        hosts = self.hosts.get(str(request.q.qname).rstrip("."))
        if self.mode is Mode.SILENT:
            raise DNSError  # and no answer
        if self.mode is Mode.FAIL:
            self.failed += 1
            reply.header.rcode = RCODE.SERVFAIL
        elif hosts is None:
            reply.header.rcode = RCODE.NXDOMAIN
        else:
            reply.add_answer(*_records(request.q, hosts))
        return reply


def _records(question: Any, hosts: Sequence[str]) -> Iterator[Any]:
    kinds: Mapping[int, tuple[int, Any]] = {4: (QTYPE.A, A), 6: (QTYPE.AAAA, AAAA)}
    for host in hosts:
        kind, data = kinds[ipaddress.ip_address(host).version]
        if question.qtype == kind:
            yield RR(question.qname, kind, rdata=data(host), ttl=5)


class _Handler(DNSHandler):  # type: ignore[misc] # it has no types
    """dnslib's own takes one question for each TCP connection, and leaves the question out of what it cuts short."""

    def handle(self) -> None:
        if self.server.socket_type == socket.SOCK_DGRAM:
            super().handle()
            return
        self.protocol = "tcp"
        with self.request.makefile("rb") as questions, contextlib.suppress(DNSError):
            while len(length := questions.read(2)) == 2:
                reply = self.get_reply(questions.read(*struct.unpack("!H", length)))
                self.request.sendall(struct.pack("!H", len(reply)) + reply)

    def get_reply(self, data: bytes) -> bytes:
        request = DNSRecord.parse(data)
        reply: bytes = self.server.resolver.resolve(request, self).pack()
        if self.protocol == "udp" and len(reply) > _DATAGRAM:
            cut = request.reply()
            cut.header.tc = 1
            reply = cut.pack()
        return reply


@contextlib.contextmanager
def serving() -> Iterator[Names]:
    """The name server of these namespaces, over UDP and TCP."""
    _raise_loopback()
    names, silent = Names(), DNSLogger("-request,-reply,-truncated,-error")
    servers = [
        DNSServer(names, address="127.0.0.1", port=53, tcp=tcp, handler=_Handler, logger=silent)
        for tcp in (False, True)
    ]
    for server in servers:
        server.start_thread()
    try:
        yield names
    finally:
        for server in servers:
            server.stop()
            server.server.server_close()


def _raise_loopback() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        known = fcntl.ioctl(any_socket, _GET_FLAGS, struct.pack("16sH14s", b"lo", 0, b""))
        flags = struct.unpack("16sH14s", known)[1]
        fcntl.ioctl(any_socket, _SET_FLAGS, struct.pack("16sH14s", b"lo", flags | _UP, b""))
