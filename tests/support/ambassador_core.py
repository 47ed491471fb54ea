"""The core of the ambassador over a data plane and a discovery that the test plays."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from retinue_server.ambassador.core import limits
from retinue_server.ambassador.core.spec import (
    Balancer,
    Discovery,
    Endpoint,
    Listen,
    LoadBalancing,
    Policy,
    Protocol,
    Spec,
    Static,
)
from retinue_server.ambassador.core.upstreams import Upstreams
from retinue_server.ambassador.engine import Assignment, Counts, EndpointHealth, Found, PlaneKind, Refused, State
from retinue_server.runtime.endpoints import EndpointPolicy, parse_rule

_TURNS = 25
"""More turns of the loop than anything here takes to come to rest."""


async def rest() -> None:
    """Returns when nothing more happens at this time."""
    for _ in range(_TURNS):
        await asyncio.sleep(0)


class PlayedPlane:
    """Takes what it is given, refuses it, or lets it wait; has everything unless the test says otherwise."""

    kind = PlaneKind.ENVOY_CHILD

    def __init__(self) -> None:
        self.state = State(live=True, version="played")
        self.lacks: set[str] = set()
        self.refusal = ""
        self.holds = False
        """Whether `put` waits until `release`."""
        self.served: dict[str, Assignment] = {}
        self.puts: list[Assignment] = []
        self.inherited: set[str] = set()
        """What it may serve already, for a server before this one."""
        self.draining: set[str] = set()
        self.open: dict[str, int] = {}
        """Connections from apps."""
        self._release = asyncio.Event()
        self._changed: Callable[[], None] = lambda: None

    def capabilities(self, protocol: Protocol) -> frozenset[str]:
        everything = {protocol.name.lower(), *_EVERYTHING, *(f"{_BALANCER}{one.name}" for one in Balancer)}
        return frozenset(everything - self.lacks)

    def listen(self, changed: Callable[[], None]) -> None:
        self._changed = changed

    async def put(self, wanted: Assignment) -> None:
        self.puts.append(wanted)
        if self.holds:
            await self._release.wait()
        if self.refusal:
            raise Refused(self.refusal)
        self.served[wanted.spec.upstream_id] = wanted
        self.draining.discard(wanted.spec.upstream_id)

    def release(self) -> None:
        self.holds = False
        self._release.set()

    def comes_and_goes(self, *, live: bool) -> None:
        self.state = State(live=live, reason="" if live else "it is away")
        self._changed()

    async def drain(self, upstream_id: str) -> None:
        self.draining.add(upstream_id)

    async def remove(self, upstream_id: str) -> None:
        self.served.pop(upstream_id, None)
        self.open.pop(upstream_id, None)

    def may_serve(self, upstream_id: str) -> bool:
        return upstream_id in self.inherited

    def connections(self, upstream_id: str) -> int:
        return self.open.get(upstream_id, 0)

    def health(self, upstream_id: str) -> Sequence[EndpointHealth]:
        return ()

    async def counts(self) -> Mapping[str, Counts]:
        return {name: Counts(0) for name in self.served}

    async def validate(self, wanted: Assignment) -> None:
        if self.refusal:
            raise Refused(self.refusal)

    async def start(self) -> None: ...

    async def stop(self) -> None: ...


_BALANCER = "policy.load_balancing.balancer="
_EVERYTHING = [
    "listen.unix_socket",
    "tls",
    "tls.subject_alt_names",
    "redis_auth",
    "policy.timeouts.request_duration",
    "policy.timeouts.per_try_duration",
    "policy.timeouts.idle_duration",
    "policy.retry",
    "policy.hedge",
    "policy.outlier_detection",
    "policy.health_check",
    "policy.splits",
    "policy.mirror",
    "policy.rate_limit",
    "policy.fault",
    "policy.circuit_breaker.max_connections",
    "policy.circuit_breaker.max_pending_requests",
    "policy.circuit_breaker.max_requests",
]


class Told:
    """Discovery: the test says what is found."""

    def __init__(self) -> None:
        self.watched: dict[Found, Callable[[Sequence[Endpoint]], None]] = {}

    def watch(self, where: Found, found: Callable[[Sequence[Endpoint]], None]) -> Callable[[], None]:
        self.watched[where] = found
        return lambda: self.watched.pop(where, None) and None


@dataclass
class PlayedPorts:
    """All are free but those that are taken."""

    taken: dict[int, str] = field(default_factory=dict)
    next: int = 20_000

    def pick(self) -> int:
        self.next += 1
        return self.next

    def objection(self, listen: Listen) -> str:
        return self.taken.get(listen.port, "")


@dataclass
class Played:
    """Upstreams over a played data plane."""

    plane: PlayedPlane
    told: Told
    ports: PlayedPorts
    upstreams: Upstreams


async def played(**options: Any) -> Played:
    """Within a running loop; 10.0.0.0/8 may be dialled, and of loopback port 7."""
    plane, told, ports = PlayedPlane(), Told(), PlayedPorts()
    policy = EndpointPolicy([parse_rule("127.0.0.1:7")])
    upstreams = Upstreams([plane], told, policy, ports, **options)
    await upstreams.start()
    return Played(plane, told, ports, upstreams)


def spec(upstream_id: str = "it", protocol: Protocol = Protocol.HTTP, **fields: Any) -> Spec:
    """A declaration; of one endpoint, unless another discovery is given. It is one that may be declared."""
    discovery: Discovery = fields.pop("discovery", Static((Endpoint("10.0.0.1:80"),)))
    listen = fields.pop("listen", Listen())
    policy = fields.pop("policy", None) or Policy(LoadBalancing(Balancer.ROUND_ROBIN), **fields)
    made = Spec(upstream_id, protocol, listen, discovery, policy)
    violations: list[Any] = []
    limits.check(made, violations)
    assert not violations
    return made
