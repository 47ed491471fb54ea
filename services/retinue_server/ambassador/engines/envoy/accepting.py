"""Which listeners the kernel has: Envoy does not tell when one accepts, and a connection to try it would be counted."""

from __future__ import annotations

import asyncio
import socket
import struct
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterator

    from retinue_server.ambassador.core.spec import Listen

_LOOK_S = 0.005
_PATIENCE_S = 1.0
"""For a kernel that answers at once, or is not the one that it seems to be."""
LISTENING = "0A"
"""A state of TCP, as the kernel has it."""
_SOCK_DIAG, _BY_FAMILY, _DUMP = 4, 20, 0x301
_DONE, _ERROR = 3, 2
_HEADER = 16
_ASKED = struct.Struct("=BBxxI48x")
"""Family, protocol and states, of inet_diag_req_v2."""
_TOLD = struct.Struct("=4x2s2xI")
"""Port, as the network has it, and address, of inet_diag_msg."""


class _Waiting(NamedTuple):
    where: str
    accepts: bool
    future: asyncio.Future[None]


class Accepting:
    """One look serves all who wait; on the event loop only."""

    def __init__(self) -> None:
        self._waiting: list[_Waiting] = []
        self._looking: asyncio.Task[None] | None = None

    async def until(self, listen: Listen, seconds: float, *, accepts: bool) -> None:
        """Returns when it accepts, or no more; raises TimeoutError."""
        waiting = _Waiting(name(listen), accepts, asyncio.get_running_loop().create_future())
        self._waiting.append(waiting)
        if self._looking is None or self._looking.done():
            self._looking = asyncio.create_task(self._look())
        async with asyncio.timeout(seconds):
            await waiting.future

    async def _look(self) -> None:
        while self._waiting:
            known = await asyncio.to_thread(_known)
            for one in self._waiting:
                if not one.future.done() and (one.where in known) == one.accepts:
                    one.future.set_result(None)
            self._waiting = [one for one in self._waiting if not one.future.done()]
            await asyncio.sleep(_LOOK_S)


def name(listen: Listen) -> str:
    """How the kernel's tables name it."""
    return listen.path or f"0100007F:{listen.port:04X}"


def _known() -> set[str]:
    unix = {line.split()[-1] for line in Path("/proc/net/unix").read_text().splitlines()[1:]}
    try:
        return unix | set(listeners())
    except OSError:  # a sandbox that has no netlink
        tcp = (line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:])
        return unix | {row[1] for row in tcp if row[3] == LISTENING}


def listeners() -> Iterator[str]:
    """Those of TCP, by sock_diag(7): the table in /proc has room for all connections, and is slow to read."""
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _SOCK_DIAG) as kernel:
        kernel.settimeout(_PATIENCE_S)
        header = struct.pack("=IHHII", _HEADER + _ASKED.size, _BY_FAMILY, _DUMP, 0, 0)
        kernel.send(header + _ASKED.pack(socket.AF_INET, socket.IPPROTO_TCP, 1 << int(LISTENING, 16)))
        while True:
            data, at = kernel.recv(1 << 16), 0
            while at < len(data):
                size, kind = struct.unpack_from("=IH", data, at)
                if kind == _DONE:
                    return
                if kind == _ERROR:
                    raise OSError("the kernel does not tell its listeners")
                port, address = _TOLD.unpack_from(data, at + _HEADER)
                yield f"{address:08X}:{port.hex().upper()}"
                at += size + -size % 4
