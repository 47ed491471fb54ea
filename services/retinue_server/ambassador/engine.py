"""The ports: what carries the bytes, and who finds endpoints. Neither knows of declarations, etags or files."""

from __future__ import annotations

from enum import IntEnum
from typing import TYPE_CHECKING, Protocol

import msgspec

from retinue_server.ambassador.core.spec import Dns, Endpoint, File, Kubernetes, Spec

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from retinue_server.ambassador.core.spec import Protocol as Speaks


Found = Dns | File | Kubernetes
"""Where endpoints are found."""


class PlaneKind(IntEnum):
    """As in the contract."""

    NATIVE = 1
    ENVOY_CHILD = 2
    ENVOY_ATTACHED = 3


class Refused(Exception):
    """The data plane does not take an assignment; the message is in its own words, for people."""


class Assignment(msgspec.Struct, frozen=True):
    """What is to be served of one upstream."""

    spec: Spec
    """Its `listen` has the port that was chosen, never 0."""
    endpoints: tuple[Endpoint, ...]
    """Whom discovery found and the endpoint policy lets through; may be none."""
    generation: int
    """Grows with each change of either."""


class EndpointHealth(msgspec.Struct, frozen=True):
    """An endpoint as the data plane sees it."""

    address: str
    healthy: bool
    reason: str = ""
    """Why not: ejected, unhealthy, unreachable …"""


class EndpointCounts(msgspec.Struct):
    """Of one endpoint; see EndpointStats of the contract."""

    requests: int = 0
    errors: int = 0
    active_connections: int = 0
    healthy: bool = True


class Counts(msgspec.Struct):
    """Of one upstream; see UpstreamStats of the contract. They only grow while `since_ms` stays."""

    since_ms: int
    """Milliseconds since the epoch."""
    requests: int = 0
    errors: int = 0
    retries: int = 0
    retries_denied: int = 0
    timeouts: int = 0
    overflows: int = 0
    rate_limited: int = 0
    ejections: int = 0
    received_bytes: int = 0
    sent_bytes: int = 0
    active_connections: int = 0
    active_requests: int = 0
    bounds_s: tuple[float, ...] = ()
    """Upper bounds of the histogram's buckets; empty = it has none."""
    buckets: Sequence[int] = ()
    """One more than bounds, not cumulative."""
    sum_s: float = 0.0
    endpoints: Mapping[str, EndpointCounts] = msgspec.field(default_factory=dict)


class State(msgspec.Struct, frozen=True):
    """Whether a data plane works."""

    live: bool
    reason: str = ""
    version: str = ""


class DataPlane(Protocol):
    """Carries the bytes of upstreams. A part of the process: between `start` and `stop`; on the event loop only."""

    kind: PlaneKind
    state: State

    def capabilities(self, protocol: Speaks) -> frozenset[str]:
        """What it can do for a protocol, as paths of fields (`policy.retry`, `policy.load_balancing.balancer=MAGLEV`).

        Empty for a protocol that it does not speak; for others it has at least `tcp`, `http`, `grpc`, `redis` or
        `memcached`. The same until the process ends.
        """

    def listen(self, changed: Callable[[], None]) -> None:
        """`changed` is called when `state` or the health of an endpoint has changed; never within a call."""

    async def put(self, wanted: Assignment) -> None:
        """Serves this from now on: a new upstream, or one that is there, without losing a request.

        Returns when it is served: the listener accepts and every part is taken. Raises Refused, and then what was
        served before still is. While the data plane is away it waits, and so does what is put meanwhile; on its return
        the latest of each upstream is served. To cancel it leaves open which of both is; another `put` settles it.
        """

    async def drain(self, upstream_id: str) -> None:
        """Accepts no new connections for it; the open ones go on. `put` ends the drain."""

    async def remove(self, upstream_id: str) -> None:
        """Ends its listener and what connections are open. Removing what is not there does nothing.

        An Envoy that is attached ends connections of raw TCP when its own drain time is over.
        """

    def may_serve(self, upstream_id: str) -> bool:
        """Whether it may listen for this one already, though nobody has put it: for a server before this one."""

    def connections(self, upstream_id: str) -> int:
        """From apps, open now, as far as is known."""

    def health(self, upstream_id: str) -> Sequence[EndpointHealth]:
        """Of the endpoints of the latest assignment that is served."""

    async def counts(self) -> Mapping[str, Counts]:
        """Of every upstream that is served; raises Unavailable while the data plane can't be asked."""

    async def validate(self, wanted: Assignment) -> None:
        """Raises Refused for what `put` would refuse, as far as that can be told without serving it."""

    async def start(self) -> None:
        """Ready to serve, or on its way to it: whoever waits for `put` waits for that too."""

    async def stop(self) -> None:
        """Ends every listener that is its own."""


class Finder(Protocol):
    """Finds who serves an upstream, again and again."""

    def watch(self, where: Found, found: Callable[[Sequence[Endpoint]], None]) -> Callable[[], None]:
        """Calls `found` with all endpoints at first and whenever they changed; gives what ends it.

        While nothing can be found out, what was found last stands, and the log says so once. `found` is called on the
        event loop and never within `watch`.
        """
