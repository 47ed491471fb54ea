"""Ends connections of a listener that has gone: Envoy leaves those of raw TCP alone until its drain time is over.

Nothing that Envoy can be told ends them: not the end of their cluster, nor of its endpoints. Its parent may take hold
of the sockets (pidfd_getfd, where the kernel lets one process look into another) and shut them down.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import socket
from pathlib import Path
from typing import TYPE_CHECKING

from retinue_server.ambassador.engines.envoy.accepting import LISTENING, name

if TYPE_CHECKING:
    from collections.abc import Iterator

    from retinue_server.ambassador.core.spec import Listen

_PIDFD_GETFD = 438
"""The number of the system call, the same on all architectures; Python has no name for it."""
_TCP_INODE, _UNIX_INODE = 9, 6
"""Columns of the kernel's tables."""


def cut(pid: int, listen: Listen) -> None:
    """Shuts down what apps have open; blocks. Raises OSError where that is not allowed, or there is no such process."""
    inodes = set(_inodes(listen))
    with contextlib.closing(_Holder(pid)) as holder:
        for entry in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(FileNotFoundError):
                if str(entry.readlink()) in inodes:
                    holder.shut(int(entry.name))


class _Holder:
    """Of another process."""

    def __init__(self, pid: int) -> None:
        self._pidfd = os.pidfd_open(pid)
        self._libc = ctypes.CDLL(None, use_errno=True)

    def shut(self, fd: int) -> None:
        """Ends a connection of its, both ways."""
        ours = self._libc.syscall(_PIDFD_GETFD, self._pidfd, fd, 0)
        if ours < 0:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
        with socket.socket(fileno=ours) as taken, contextlib.suppress(OSError):  # it has just ended by itself
            taken.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        os.close(self._pidfd)


def _inodes(listen: Listen) -> Iterator[str]:
    """Of the connections to a listener, as links in /proc have them."""
    table, column, inode = ("unix", -1, _UNIX_INODE) if listen.path else ("tcp", 1, _TCP_INODE)
    for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
        row = line.split()
        if row[column] == name(listen) and (listen.path or row[3] != LISTENING):
            yield f"socket:[{row[inode]}]"
