"""Discovery by DNS: names are looked up again and again, by the system's resolver.

gRPC's own resolver asks again only when a connection fails, so that what is added stays idle (grpc/grpc#12295).

The system's resolver, and none of our own that would know of lifetimes (TTLs): what it finds is what `getent ahosts
NAME` prints in the same container, after /etc/hosts, nsswitch.conf, search domains and ndots. Asking every few seconds
is no more than a lifetime of 5 s, which CoreDNS gives its answers, would allow. What it costs is a thread for each
look-up, and those are our own: while name servers are away a look-up takes half a minute, and neither the threads that
all else shares nor the end of the process may wait for that.
"""

from __future__ import annotations

import asyncio
import logging
import random
import socket
import threading
from typing import TYPE_CHECKING

from retinue_server.runtime import addresses

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

log = logging.getLogger(__name__)

_AT_ONCE = 16
"""Look-ups that are under way at a time."""
_NOTHING = {socket.EAI_NONAME, getattr(socket, "EAI_NODATA", socket.EAI_NONAME)}
"""Answers, and no failures: there is no such name, or it has no addresses."""


class DnsDiscovery:
    """A part; a name is NAME:PORT, and each of its addresses (A and AAAA) is an endpoint."""

    def __init__(self, poll_s: float) -> None:
        self._poll_s = poll_s
        self._room = asyncio.Semaphore(_AT_ONCE)
        self._tasks: set[asyncio.Task[None]] = set()

    def watch(
        self, name: str, found: Callable[[Sequence[str]], None], poll_s: float | None = None
    ) -> Callable[[], None]:
        task = asyncio.create_task(self._watch(name, found, poll_s or self._poll_s))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

        def unwatch() -> None:
            task.cancel()

        return unwatch

    async def _watch(self, name: str, found: Callable[[Sequence[str]], None], poll_s: float) -> None:
        known: Sequence[str] | None = None
        failing = False
        while True:
            try:
                async with self._room:
                    now = await _look_up(name)
            except Exception as error:  # noqa: BLE001 - whatever fails, what was found stands, and is asked for again
                if not failing:
                    why = getattr(error, "strerror", None) or error
                    log.warning("cannot look up %s: %s; what was found last stands", name, why)
                failing = True
            else:
                if failing:
                    log.info("%s can be looked up again", name)
                failing = False
                if now != known:
                    known = now
                    found(now)
            await asyncio.sleep(poll_s * random.uniform(0.9, 1.1))  # noqa: S311 - so that names don't go in step

    async def start(self) -> None:
        """Ready as it is."""

    async def stop(self) -> None:
        for task in list(self._tasks):
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)


async def _look_up(name: str) -> Sequence[str]:
    """HOST:PORT of all addresses, sorted; none if the name has none. Raises OSError, ValueError for no name."""
    address = addresses.parse(name)
    if not isinstance(address, addresses.Tcp):
        raise ValueError("it is no NAME:PORT")  # noqa: TRY004 - it was read from a file
    loop = asyncio.get_running_loop()
    answer: asyncio.Future[set[str]] = loop.create_future()
    threading.Thread(target=_ask, args=(address.host, loop, answer), name="dns", daemon=True).start()
    return sorted(str(addresses.Tcp(host, address.port)) for host in await answer)


def _ask(host: str, loop: asyncio.AbstractEventLoop, answer: asyncio.Future[set[str]]) -> None:
    """On a thread of its own."""

    def tell(found: set[str] | Exception) -> None:
        if answer.cancelled():
            return
        if isinstance(found, Exception):
            answer.set_exception(found)
        else:
            answer.set_result(found)

    try:
        found: set[str] | Exception = _addresses(host)
    except Exception as error:  # noqa: BLE001 - it is for whoever asked
        found = error
    try:
        loop.call_soon_threadsafe(tell, found)
    except RuntimeError:
        return  # the loop has ended, and nobody waits


def _addresses(host: str) -> set[str]:
    try:
        return {str(entry[4][0]) for entry in socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)}
    except socket.gaierror as error:
        if error.errno in _NOTHING:
            return set()
        raise
