"""The data plane native: assignments in, listeners of our own out."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING

from retinue_server import __version__
from retinue_server.ambassador.core.spec import Balancer, Protocol
from retinue_server.ambassador.engine import Assignment, Counts, EndpointHealth, PlaneKind, Refused, State
from retinue_server.ambassador.engines import tls
from retinue_server.ambassador.engines.native import memcached, tcp
from retinue_server.ambassador.engines.native.listening import Served

if TYPE_CHECKING:
    import ssl
    from collections.abc import Callable, Mapping, Sequence

log = logging.getLogger(__name__)

_FILES_S = 1.0
"""How often certificates are looked at."""
_CAPABILITIES: Mapping[Protocol, frozenset[str]] = {
    Protocol.TCP: frozenset(
        {
            "tcp",
            "listen.unix_socket",
            "tls",
            "policy.timeouts.idle_duration",
            "policy.outlier_detection",
            "policy.rate_limit",
            "policy.circuit_breaker.max_connections",
            *(
                f"policy.load_balancing.balancer={one.name}"
                for one in (Balancer.ROUND_ROBIN, Balancer.LEAST_REQUEST, Balancer.RANDOM)
            ),
        }
    ),
    Protocol.MEMCACHED: frozenset(
        {
            "memcached",
            "listen.unix_socket",
            "tls",
            "policy.timeouts.request_duration",
            "policy.timeouts.idle_duration",
            "policy.outlier_detection",
            "policy.load_balancing.balancer=KETAMA",
        }
    ),
}


class _Upstream:
    """What is served of one upstream, and by which certificates."""

    def __init__(self, changed: Callable[[], None]) -> None:
        self.served = Served(changed)
        self.context: ssl.SSLContext | None = None
        self.stamp: tls.Stamp = ()
        self.cluster: memcached.Cluster | None = None
        """Of memcached."""

    def update(self, wanted: Assignment) -> None:
        """What is served from now on."""
        self.served.update(wanted)
        if wanted.spec.protocol is Protocol.MEMCACHED:
            self.cluster = self.cluster or memcached.Cluster(self.served, lambda: self.context)
            self.cluster.update()

    def front(self) -> asyncio.Protocol:
        """For a connection from an app."""
        return memcached.Front(self.cluster) if self.cluster else tcp.Front(self.served, lambda: self.context)

    def close(self) -> None:
        """Ends all of it."""
        self.served.close()
        self.served.cut()
        if self.cluster is not None:
            self.cluster.close()


class NativePlane:
    """See the port; on the event loop only."""

    kind = PlaneKind.NATIVE
    state = State(live=True, version=__version__)

    def __init__(self) -> None:
        self._changed: Callable[[], None] = lambda: None
        self._upstreams: dict[str, _Upstream] = {}
        self._looking: asyncio.Task[None] | None = None

    def capabilities(self, protocol: Protocol) -> frozenset[str]:
        return _CAPABILITIES.get(protocol, frozenset())

    def listen(self, changed: Callable[[], None]) -> None:
        self._changed = changed

    async def put(self, wanted: Assignment) -> None:
        name = wanted.spec.upstream_id
        upstream = self._upstreams.get(name) or _Upstream(self._tell)
        if wanted.spec.tls is not None:
            upstream.context = await asyncio.to_thread(tls.context, wanted.spec.tls)
            upstream.stamp = await asyncio.to_thread(tls.stamp, wanted.spec.tls)
        else:
            upstream.context = None
        upstream.update(wanted)
        await upstream.served.listen(upstream.front)
        self._upstreams[name] = upstream

    def _tell(self) -> None:
        self._changed()

    async def drain(self, upstream_id: str) -> None:
        if (upstream := self._upstreams.get(upstream_id)) is not None:
            upstream.served.close()

    async def remove(self, upstream_id: str) -> None:
        if (upstream := self._upstreams.pop(upstream_id, None)) is not None:
            upstream.close()

    def may_serve(self, upstream_id: str) -> bool:  # noqa: ARG002 - it ends with its server
        return False

    def connections(self, upstream_id: str) -> int:
        upstream = self._upstreams.get(upstream_id)
        return len(upstream.served.open) if upstream else 0

    def health(self, upstream_id: str) -> Sequence[EndpointHealth]:
        upstream = self._upstreams.get(upstream_id)
        return upstream.served.backends.health() if upstream else ()

    async def counts(self) -> Mapping[str, Counts]:
        return {name: upstream.served.counts() for name, upstream in self._upstreams.items()}

    async def validate(self, wanted: Assignment) -> None:
        if wanted.spec.tls is not None:
            await asyncio.to_thread(tls.context, wanted.spec.tls)

    async def start(self) -> None:
        if self._looking is None:
            self._looking = asyncio.create_task(self._keep_files())

    async def stop(self) -> None:
        looking, self._looking = self._looking, None
        if looking is None:
            return
        looking.cancel()
        await asyncio.wait({looking})
        for name in list(self._upstreams):
            await self.remove(name)

    async def _keep_files(self) -> None:
        """New connections are made by certificates that have changed."""
        while True:
            await asyncio.sleep(_FILES_S)
            for name, upstream in list(self._upstreams.items()):
                said = upstream.served.assignment.spec.tls
                if said is None:
                    continue
                stamp = await asyncio.to_thread(tls.stamp, said)
                if stamp == upstream.stamp:
                    continue
                try:
                    upstream.context, upstream.stamp = await asyncio.to_thread(tls.context, said), stamp
                except Refused as error:
                    log.warning("upstream %s: %s; the former go on", name, error)
