"""Who holds a port or a socket, as far as this user may see it in /proc."""

from __future__ import annotations

import re
import socket
import struct
from pathlib import Path

_LISTEN = "0A"
"""The state TCP_LISTEN in /proc/net/tcp."""
_COMMAND_CHARS = 120


def of_port(port: int) -> str:
    """`pid 17 (retinue-server workqueue)`, or that the owner can't be seen."""
    sockets = _listening(port)
    for pid in _pids():
        if any(link in sockets for link in _open_sockets(pid)):
            return describe(pid)
    return "a process that this user can't see"


def of_unix_socket(connected: socket.socket) -> str:
    """The process at the other end of a Unix socket, by its credentials."""
    credentials = connected.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    return describe(struct.unpack("3i", credentials)[0])


def describe(pid: int) -> str:
    """A pid with its command line."""
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return f"pid {pid}"
    command = b" ".join(word for word in words if word).decode(errors="replace")
    return f"pid {pid} ({command[:_COMMAND_CHARS]})" if command else f"pid {pid}"


def _listening(port: int) -> set[str]:
    """`socket:[inode]` of each TCP socket that listens on a port, of both families."""
    found = set()
    for table in (Path("/proc/net/tcp"), Path("/proc/net/tcp6")):
        try:
            lines = table.read_text().splitlines()[1:]
        except OSError:
            continue
        for columns in map(str.split, lines):
            if columns[3] == _LISTEN and int(columns[1].rpartition(":")[2], 16) == port:
                found.add(f"socket:[{columns[9]}]")
    return found


def _pids() -> list[int]:
    return [int(entry.name) for entry in Path("/proc").glob("[0-9]*") if re.fullmatch(r"\d+", entry.name)]


def _open_sockets(pid: int) -> list[str]:
    try:
        return [link for entry in Path(f"/proc/{pid}/fd").iterdir() if (link := _target(entry))]
    except OSError:  # gone, or another user's
        return []


def _target(entry: Path) -> str:
    try:
        return str(entry.readlink())
    except OSError:  # closed in between
        return ""
