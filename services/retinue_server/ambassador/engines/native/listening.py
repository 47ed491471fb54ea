"""What every upstream of the native data plane has: a listener, limits, counts."""

from __future__ import annotations

import asyncio
import time
from bisect import bisect_left
from pathlib import Path
from typing import TYPE_CHECKING

from retinue_server.ambassador.engine import Counts, Refused
from retinue_server.ambassador.engines.native.backends import Backends

if TYPE_CHECKING:
    from collections.abc import Callable

    from retinue_server.ambassador.core.spec import Listen, RateLimit
    from retinue_server.ambassador.engine import Assignment

_BOUNDS_S = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
_BACKLOG = 1024


class Bucket:
    """A token bucket: so many in a time, and so many at once."""

    def __init__(self, said: RateLimit, now: float) -> None:
        self._rate, self._burst = said.requests / said.per_s, float(said.burst)
        self._level, self._at = self._burst, now

    def take(self, now: float) -> bool:
        """Whether there is one, and then there is one less."""
        self._level = min(self._burst, self._level + (now - self._at) * self._rate)
        self._at = now
        if self._level < 1:
            return False
        self._level -= 1
        return True


class Served:
    """One upstream: its listener and what connections share."""

    def __init__(self, changed: Callable[[], None]) -> None:
        loop = asyncio.get_running_loop()
        self.loop, self.now = loop, time.monotonic
        """The clock is the system's, since uvloop's has milliseconds, in which most requests take none."""
        self.backends = Backends(loop.time, changed)
        self.count = Counts(time.time_ns() // 1_000_000, bounds_s=_BOUNDS_S)
        self._buckets = [0] * (len(_BOUNDS_S) + 1)
        self.wanted: Assignment | None = None
        self.bucket: Bucket | None = None
        self.open: set[asyncio.Transport] = set()
        """From apps."""
        self._server: asyncio.AbstractServer | None = None

    def update(self, wanted: Assignment) -> None:
        """What counts from now on; connections that are open go on."""
        policy = wanted.spec.policy
        before = self.wanted.spec.policy.rate_limit if self.wanted else None
        if policy.rate_limit != before or self.bucket is None:
            self.bucket = Bucket(policy.rate_limit, self.now()) if policy.rate_limit else None
        self.wanted = wanted
        self.backends.update(wanted.endpoints, policy.load_balancing.balancer, policy.outlier_detection)

    @property
    def assignment(self) -> Assignment:
        """What is served."""
        assert self.wanted is not None
        return self.wanted

    async def listen(self, protocol: Callable[[], asyncio.Protocol]) -> None:
        """Accepts, if it does not yet; raises Refused."""
        if self._server is not None:
            return
        listen = self.assignment.spec.listen
        try:
            self._server = await self._bind(listen, protocol)
        except OSError as error:
            raise Refused(f"it cannot listen: {error.strerror or error}") from error

    async def _bind(self, listen: Listen, protocol: Callable[[], asyncio.Protocol]) -> asyncio.AbstractServer:
        if not listen.path:
            return await self.loop.create_server(protocol, "127.0.0.1", listen.port, backlog=_BACKLOG)
        path = Path(listen.path)
        await asyncio.to_thread(path.unlink, missing_ok=True)
        server = await self.loop.create_unix_server(protocol, listen.path, backlog=_BACKLOG)
        await asyncio.to_thread(path.chmod, listen.mode)
        return server

    def close(self) -> None:
        """Accepts no more."""
        server, self._server = self._server, None
        if server is not None:
            server.close()

    def cut(self) -> None:
        """Ends what is open."""
        for transport in list(self.open):
            transport.abort()

    def took(self, seconds: float) -> None:
        """A request, of TCP a connection, took so long."""
        self._buckets[bisect_left(_BOUNDS_S, seconds)] += 1
        self.count.sum_s += seconds

    def counts(self) -> Counts:
        """As they are now."""
        found = self.count
        found.buckets = tuple(self._buckets)
        found.active_connections = len(self.open)
        found.ejections = self.backends.ejections
        found.endpoints = self.backends.counts()
        return found
