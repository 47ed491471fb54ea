"""Discovery by DNS: names are looked up again and again, by the system's resolver.

gRPC's own resolver asks again only when a connection fails, so that what is added stays idle (grpc/grpc#12295).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from typing import TYPE_CHECKING

from retinue_server.runtime import addresses

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

log = logging.getLogger(__name__)


class DnsDiscovery:
    """A part; a name is NAME:PORT, and each of its addresses (A and AAAA) is an endpoint."""

    def __init__(self, poll_s: float) -> None:
        self._poll_s = poll_s
        self._tasks: set[asyncio.Task[None]] = set()

    def watch(self, name: str, found: Callable[[Sequence[str]], None]) -> Callable[[], None]:
        task = asyncio.create_task(self._watch(name, found))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

        def unwatch() -> None:
            task.cancel()

        return unwatch

    async def _watch(self, name: str, found: Callable[[Sequence[str]], None]) -> None:
        known: list[str] | None = None
        failing = False
        while True:
            try:
                now = await _look_up(name)
            except (OSError, UnicodeError) as error:  # the latter for what can be no name
                if not failing:
                    why = getattr(error, "strerror", None) or error
                    log.warning("cannot look up %s: %s; what was found last stands", name, why)
                failing = True
            else:
                failing = False
                if now != known:
                    known = now
                    found(now)
            await asyncio.sleep(self._poll_s)

    async def start(self) -> None:
        """Ready as it is."""

    async def stop(self) -> None:
        for task in list(self._tasks):
            task.cancel()
        if self._tasks:
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.wait(self._tasks)


async def _look_up(name: str) -> list[str]:
    address = addresses.parse(name)
    assert isinstance(address, addresses.Tcp)
    loop = asyncio.get_running_loop()
    found = await loop.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM)
    return sorted({str(addresses.Tcp(str(entry[4][0]), address.port)) for entry in found})
