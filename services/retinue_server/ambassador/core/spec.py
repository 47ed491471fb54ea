"""What is declared of an upstream, as plain records with their defaults filled in. Durations are in seconds."""

from __future__ import annotations

from enum import IntEnum

import msgspec


class Protocol(IntEnum):
    """As in the contract."""

    TCP = 1
    HTTP = 2
    GRPC = 3
    REDIS = 4
    MEMCACHED = 5


HTTP_LIKE = frozenset({Protocol.HTTP, Protocol.GRPC})
SHARDED = frozenset({Protocol.REDIS, Protocol.MEMCACHED})


class Balancer(IntEnum):
    """As in the contract."""

    ROUND_ROBIN = 1
    LEAST_REQUEST = 2
    RANDOM = 3
    RING_HASH = 4
    MAGLEV = 5
    KETAMA = 6


HASHING = frozenset({Balancer.RING_HASH, Balancer.MAGLEV, Balancer.KETAMA})


class RetryCondition(IntEnum):
    """As in the contract."""

    SERVER_ERROR = 1
    GATEWAY_ERROR = 2
    CONNECT_FAILURE = 3
    RESET = 4
    REFUSED_STREAM = 5
    GRPC_UNAVAILABLE = 6
    GRPC_RESOURCE_EXHAUSTED = 7
    GRPC_CANCELLED = 8
    GRPC_DEADLINE_EXCEEDED = 9
    GRPC_INTERNAL = 10


class Endpoint(msgspec.Struct, frozen=True):
    """One server."""

    address: str
    """`IP:PORT`, `[IPV6]:PORT` or `unix:PATH`."""
    weight: int = 1
    zone: str = ""
    shard_name: str = ""

    @property
    def hashed_name(self) -> str:
        """What stands for it in consistent hashing."""
        return self.shard_name or self.address


class Listen(msgspec.Struct, frozen=True):
    """Where the app dials: a port of 127.0.0.1, or the path of a Unix socket."""

    port: int = 0
    """0 = any free one."""
    path: str = ""
    mode: int = 0o660


class Dns(msgspec.Struct, frozen=True, tag="dns"):
    """Names that are looked up."""

    hostname: str
    port: int
    refresh_s: float = 5.0


class File(msgspec.Struct, frozen=True, tag="file"):
    """A file of endpoints."""

    path: str


class Kubernetes(msgspec.Struct, frozen=True, tag="kubernetes"):
    """A Service's EndpointSlices."""

    service: str
    port: str
    namespace: str = ""


class Static(msgspec.Struct, frozen=True, tag="static"):
    """Given endpoints."""

    endpoints: tuple[Endpoint, ...] = ()


class Pushed(msgspec.Struct, frozen=True, tag="pushed"):
    """Endpoints come by SetEndpoints."""


Discovery = Dns | File | Kubernetes | Static | Pushed


class Timeouts(msgspec.Struct, frozen=True):
    """None = no such limit."""

    connect_s: float = 5.0
    request_s: float | None = None
    per_try_s: float | None = None
    idle_s: float | None = None


class Retry(msgspec.Struct, frozen=True):
    """See the contract."""

    on: tuple[RetryCondition, ...]
    attempts: int = 1
    backoff_base_s: float = 0.025
    backoff_max_s: float = 0.25
    budget_percent: float = 20.0
    budget_min_concurrency: int = 3
    same_endpoint: bool = False


class CircuitBreaker(msgspec.Struct, frozen=True):
    """See the contract. It always exists: these are the defaults of all upstreams."""

    max_connections: int = 1024
    max_pending_requests: int = 1024
    max_requests: int = 1024


class OutlierDetection(msgspec.Struct, frozen=True):
    """See the contract."""

    consecutive_failures: int = 5
    interval_s: float = 1.0
    base_ejection_s: float = 5.0
    max_ejection_percent: int = 50


class HealthCheck(msgspec.Struct, frozen=True):
    """See the contract."""

    interval_s: float = 5.0
    timeout_s: float = 1.0
    unhealthy_threshold: int = 3
    healthy_threshold: int = 1
    path: str = ""


class LoadBalancing(msgspec.Struct, frozen=True):
    """See the contract."""

    balancer: Balancer
    header: str = ""
    cookie: str = ""
    source_address: bool = False

    @property
    def hashes_on(self) -> bool:
        """Whether it says what is hashed."""
        return bool(self.header or self.cookie or self.source_address)


class Split(msgspec.Struct, frozen=True):
    """A share of the requests, or those with a header."""

    upstream_id: str
    percent: float = 0.0
    header_name: str = ""
    header_value: str = ""


class Mirror(msgspec.Struct, frozen=True):
    """See the contract."""

    upstream_id: str
    percent: float = 100.0


class RateLimit(msgspec.Struct, frozen=True):
    """See the contract."""

    requests: int
    per_s: float = 1.0
    burst: int = 0
    """Filled in: never 0."""


class Fault(msgspec.Struct, frozen=True):
    """See the contract."""

    delay_s: float = 0.0
    delay_percent: float = 0.0
    abort_status: int = 0
    abort_percent: float = 0.0


class Policy(msgspec.Struct, frozen=True):
    """See the contract; None = not asked for."""

    load_balancing: LoadBalancing
    timeouts: Timeouts = Timeouts()
    retry: Retry | None = None
    circuit_breaker: CircuitBreaker = CircuitBreaker()
    outlier_detection: OutlierDetection | None = None
    health_check: HealthCheck | None = None
    splits: tuple[Split, ...] = ()
    mirror: Mirror | None = None
    rate_limit: RateLimit | None = None
    fault: Fault | None = None
    hedge: bool = False

    @property
    def references(self) -> tuple[str, ...]:
        """The other upstreams that it names."""
        mirrored = (self.mirror.upstream_id,) if self.mirror else ()
        return (*(split.upstream_id for split in self.splits), *mirrored)


class Tls(msgspec.Struct, frozen=True):
    """See the contract; empty = not given."""

    server_name: str = ""
    ca_file: str = ""
    cert_file: str = ""
    key_file: str = ""
    subject_alt_names: tuple[str, ...] = ()


class RedisAuth(msgspec.Struct, frozen=True):
    """See the contract."""

    password_file: str
    username: str = ""


class Spec(msgspec.Struct, frozen=True):
    """A declaration, checked and with its defaults: equal ones mean the same."""

    upstream_id: str
    protocol: Protocol
    listen: Listen
    discovery: Discovery
    policy: Policy
    tls: Tls | None = None
    redis_auth: RedisAuth | None = None
