"""Which listeners the kernel has: Envoy does not tell when one accepts, and a connection to try it would be counted."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from retinue_server.ambassador.core.spec import Listen

_LOOK_S = 0.005
LISTENING = "0A"
"""A state of TCP, as the kernel has it."""


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
    tcp = (line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:])
    unix = (line.split() for line in Path("/proc/net/unix").read_text().splitlines()[1:])
    return {row[1] for row in tcp if row[3] == LISTENING} | {row[-1] for row in unix}
