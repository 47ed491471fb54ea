"""Between the contract's messages and the core's records. What is malformed is named in `violations`, never guessed."""

from __future__ import annotations

from enum import IntEnum
from typing import TYPE_CHECKING, Any, TypeVar

from retinue.ambassador.v1 import ambassador_service_pb2 as api
from retinue.ambassador.v1 import policy_pb2 as policy_pb
from retinue.ambassador.v1 import stats_pb2 as stats_pb
from retinue.ambassador.v1 import upstream_pb2 as pb
from retinue_server.ambassador.core import limits, spec
from retinue_server.ambassador.core.spec import HTTP_LIKE, SHARDED, Balancer
from retinue_server.ambassador.core.spec import Protocol as Speaks
from retinue_server.ambassador.engine import Counts
from retinue_server.runtime import wire
from retinue_server.runtime.errors import Violation

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from google.protobuf.duration_pb2 import Duration

    from retinue_server.ambassador.core.upstream import View
    from retinue_server.ambassador.engine import DataPlane, EndpointHealth

Member = TypeVar("Member", bound=IntEnum)

MAX_WAIT_MS = 60_000
_HOUR_MS = 3_600_000
_DRAIN_MS = 30_000
_MAX_STATUS_ENDPOINTS = 1000
_REQUEST_S = 1.0
"""How long requests of sharded protocols may take that say nothing else."""
_USUAL_BALANCER = {Speaks.REDIS: Balancer.MAGLEV, Speaks.MEMCACHED: Balancer.KETAMA}


class Reader:
    """Reads one request; `violations` has what was wrong with it, by `at` before the field."""

    def __init__(self, at: str = "upstream.", violations: list[Violation] | None = None) -> None:
        self.violations = [] if violations is None else violations
        self._at = at

    def wrong(self, field: str, text: str) -> None:
        """Notes a violation."""
        self.violations.append(Violation(self._at + field, text))

    def upstream(self, said: pb.Upstream) -> spec.Spec:
        """A declaration with its defaults, checked as far as it stands alone; raises InvalidArgument at once."""
        protocol = self._protocol(said.protocol)
        for name in ("status", "etag"):
            if said.HasField("status") if name == "status" else said.etag:
                self.wrong(name, "is output only; leave it out")
        found = spec.Spec(
            said.upstream_id,
            protocol,
            self._listen(said.listen),
            self._discovery(said),
            self._policy(said.policy, protocol),
            self._tls(said),
            spec.RedisAuth(said.redis_auth.password_file, said.redis_auth.username)
            if said.HasField("redis_auth")
            else None,
        )
        limits.check(found, self.violations, self._at)
        limits.refuse(self.violations, "declare the upstream")
        return found

    def _protocol(self, number: int) -> Speaks:
        protocol = _member(Speaks, number)
        if protocol is None:
            self.wrong("protocol", "must be one of " + ", ".join(Speaks.__members__))
        return protocol or Speaks.TCP

    def _listen(self, said: pb.Listen) -> spec.Listen:
        if said.WhichOneof("address") != "unix_socket":
            return spec.Listen(port=said.port)
        if not said.unix_socket.path:
            self.wrong("listen.unix_socket.path", "must be given")
        return spec.Listen(path=said.unix_socket.path, mode=said.unix_socket.mode or 0o660)

    def _discovery(self, said: pb.Upstream) -> spec.Discovery:
        match said.WhichOneof("discovery"):
            case "static":
                return spec.Static(endpoints(said.static.endpoints))
            case "dns":
                refresh = self._seconds(said.dns, "refresh_duration", "dns.", 5.0)
                return spec.Dns(said.dns.hostname.rstrip("."), said.dns.port, refresh)
            case "file":
                return spec.File(said.file.path)
            case "kubernetes":
                service = said.kubernetes
                return spec.Kubernetes(service.service, service.port, service.namespace)
            case "pushed":
                return spec.Pushed()
            case _:
                self.wrong("discovery", "must be one of static, dns, file, kubernetes, pushed")
                return spec.Pushed()

    def _tls(self, said: pb.Upstream) -> spec.Tls | None:
        if not said.HasField("tls"):
            return None
        tls = said.tls
        name = tls.server_name or (said.dns.hostname.rstrip(".") if said.WhichOneof("discovery") == "dns" else "")
        return spec.Tls(name, tls.ca_file, tls.cert_file, tls.key_file, tuple(tls.subject_alt_names))

    def _seconds(self, said: Any, name: str, at: str, usual: Any) -> Any:
        """A field of a message, a Duration, in seconds; what is usual if it is unset."""
        if not said.HasField(name):
            return usual
        return wire.duration_ms(getattr(said, name), f"{self._at}{at}{name}", self.violations, high=_HOUR_MS) / 1000

    def _policy(self, said: policy_pb.Policy, protocol: Speaks) -> spec.Policy:
        breaker, usual = said.circuit_breaker, spec.CircuitBreaker()
        return spec.Policy(
            self._balancing(said.load_balancing, protocol),
            self._timeouts(said.timeouts, protocol),
            self._retry(said.retry) if said.HasField("retry") else None,
            spec.CircuitBreaker(
                breaker.max_connections or usual.max_connections,
                breaker.max_pending_requests or usual.max_pending_requests,
                breaker.max_requests or usual.max_requests,
            ),
            self._outliers(said.outlier_detection) if said.HasField("outlier_detection") else None,
            self._health(said.health_check) if said.HasField("health_check") else None,
            tuple(_split(one) for one in said.splits),
            spec.Mirror(said.mirror.upstream_id, said.mirror.percent or 100.0) if said.HasField("mirror") else None,
            self._rate(said.rate_limit) if said.HasField("rate_limit") else None,
            self._fault(said.fault) if said.HasField("fault") else None,
            said.hedge.enabled,
        )

    def _balancing(self, said: policy_pb.LoadBalancing, protocol: Speaks) -> spec.LoadBalancing:
        usual = _USUAL_BALANCER.get(protocol, Balancer.ROUND_ROBIN)
        balancer = _member(Balancer, said.balancer) if said.balancer else usual
        if balancer is None:
            self.wrong("policy.load_balancing.balancer", "must be one of " + ", ".join(Balancer.__members__))
            balancer = usual
        return spec.LoadBalancing(balancer, said.header, said.cookie, said.source_address)

    def _timeouts(self, said: policy_pb.Timeouts, protocol: Speaks) -> spec.Timeouts:
        at = "policy.timeouts."
        return spec.Timeouts(
            self._seconds(said, "connect_duration", at, 5.0),
            self._seconds(said, "request_duration", at, _REQUEST_S if protocol in SHARDED else None),
            self._seconds(said, "per_try_duration", at, None),
            self._seconds(said, "idle_duration", at, None if protocol in (Speaks.TCP, Speaks.REDIS) else 3600.0),
        )

    def _retry(self, said: policy_pb.Retry) -> spec.Retry:
        at = "policy.retry."
        found = [_member(spec.RetryCondition, number) for number in said.on]
        for index, condition in enumerate(found):
            if condition is None:
                self.wrong(f"{at}on[{index}]", "must be one of " + ", ".join(spec.RetryCondition.__members__))
        base = self._seconds(said, "backoff_base_duration", at, 0.025)
        return spec.Retry(
            tuple(dict.fromkeys(condition for condition in found if condition is not None)),
            said.attempts or 1,
            base,
            self._seconds(said, "backoff_max_duration", at, base * 10),
            said.budget_percent or 20.0,
            said.budget_min_concurrency or 3,
            said.same_endpoint,
        )

    def _outliers(self, said: policy_pb.OutlierDetection) -> spec.OutlierDetection:
        at = "policy.outlier_detection."
        return spec.OutlierDetection(
            said.consecutive_failures or 5,
            self._seconds(said, "interval_duration", at, 1.0),
            self._seconds(said, "base_ejection_duration", at, 5.0),
            said.max_ejection_percent or 50,
        )

    def _health(self, said: policy_pb.HealthCheck) -> spec.HealthCheck:
        at = "policy.health_check."
        return spec.HealthCheck(
            self._seconds(said, "interval_duration", at, 5.0),
            self._seconds(said, "timeout_duration", at, 1.0),
            said.unhealthy_threshold or 3,
            said.healthy_threshold or 1,
            said.path,
        )

    def _rate(self, said: policy_pb.RateLimit) -> spec.RateLimit:
        per = self._seconds(said, "per_duration", "policy.rate_limit.", 1.0)
        return spec.RateLimit(said.requests, per, said.burst or said.requests)

    def _fault(self, said: policy_pb.Fault) -> spec.Fault:
        delay = self._seconds(said, "delay_duration", "policy.fault.", 0.0)
        return spec.Fault(delay, said.delay_percent, said.abort_status, said.abort_percent)

    def wait_s(self, said: Duration, remaining_s: float | None) -> float:
        """How long to wait: what is asked, but no longer than 200 ms before the caller's deadline."""
        asked = wire.duration_ms(said, "wait_duration", self.violations, high=MAX_WAIT_MS) / 1000
        return asked if remaining_s is None else max(min(asked, remaining_s - 0.2), 0)

    def drain_s(self, request: api.DrainUpstreamRequest | api.RemoveUpstreamRequest) -> float:
        """How long open connections may go on."""
        if not request.HasField("drain_duration"):
            return _DRAIN_MS / 1000
        return wire.duration_ms(request.drain_duration, "drain_duration", self.violations, high=_HOUR_MS) / 1000

    def page_size(self, asked: int, sizes: tuple[int, int]) -> int:
        """The size of a page, of the largest and the usual."""
        most, usual = sizes
        if not 0 <= asked <= most:
            self.wrong("page_size", f"must be 0 to {most}")
        return asked or usual

    def interval_s(self, request: api.WatchUpstreamStatsRequest) -> float:
        """How often counts are given."""
        if not request.HasField("interval_duration"):
            return 1.0
        return (
            wire.duration_ms(request.interval_duration, "interval_duration", self.violations, low=100, high=_HOUR_MS)
            / 1000
        )


def _member(kind: type[Member], number: int) -> Member | None:
    return next((one for one in kind if one == number), None)


def endpoints(said: Iterable[pb.Endpoint]) -> tuple[spec.Endpoint, ...]:
    """As they were said, with their defaults."""
    return tuple(spec.Endpoint(one.address, one.weight or 1, one.zone, one.shard_name) for one in said)


def _split(said: policy_pb.Split) -> spec.Split:
    return spec.Split(said.upstream_id, said.percent, said.header.name, said.header.value)


# Out


def _duration(seconds: float | None) -> Duration | None:
    return None if seconds is None else wire.to_duration(round(seconds * 1000))


def upstream(view: View) -> pb.Upstream:
    """As declared, with its defaults, and what has become of it."""
    said = declared(view.spec)
    said.etag = view.etag
    said.status.CopyFrom(_status(view))
    return said


def _status(view: View) -> pb.UpstreamStatus:
    standalone = pb.UPSTREAM_MODE_STANDALONE if view.standalone else pb.UPSTREAM_MODE_DECLARED
    status = pb.UpstreamStatus(
        state=pb.UpstreamState.ValueType(view.state),
        generation=view.generation,
        active_generation=view.active_generation,
        address=view.address,
        endpoints=_endpoints(view.endpoints, view.health),
        endpoints_resolved=view.resolved,
        active_connections=view.connections,
        mode=standalone,
        data_plane=pb.DataPlaneKind.ValueType(view.plane.kind),
        from_file=view.from_file,
    )
    if view.rejection is not None:
        status.rejection.generation, status.rejection.message = view.rejection
    return status


def _endpoints(known: Sequence[spec.Endpoint], health: Sequence[EndpointHealth]) -> Iterable[pb.EndpointStatus]:
    seen = {one.address: one for one in health}
    for endpoint in known[:_MAX_STATUS_ENDPOINTS]:
        found = seen.get(endpoint.address)
        yield pb.EndpointStatus(
            address=endpoint.address,
            weight=endpoint.weight,
            healthy=found is None or found.healthy,
            reason=found.reason if found else "",
        )


def declared(said: spec.Spec) -> pb.Upstream:
    """A declaration with its defaults."""
    found = pb.Upstream(
        upstream_id=said.upstream_id,
        protocol=pb.Protocol.ValueType(said.protocol),
        listen=_listen(said.listen),
        policy=_policy(said),
    )
    _discover(found, said.discovery)
    if said.tls is not None:
        tls = said.tls
        found.tls.server_name, found.tls.ca_file = tls.server_name, tls.ca_file
        found.tls.cert_file, found.tls.key_file = tls.cert_file, tls.key_file
        found.tls.subject_alt_names.extend(tls.subject_alt_names)
    if said.redis_auth is not None:
        found.redis_auth.username, found.redis_auth.password_file = (
            said.redis_auth.username,
            said.redis_auth.password_file,
        )
    return found


def _listen(said: spec.Listen) -> pb.Listen:
    if said.path:
        return pb.Listen(unix_socket=pb.UnixSocket(path=said.path, mode=said.mode))
    return pb.Listen(port=said.port)


def _discover(found: pb.Upstream, said: spec.Discovery) -> None:
    match said:
        case spec.Static(known):
            found.static.SetInParent()
            found.static.endpoints.extend(
                pb.Endpoint(address=one.address, weight=one.weight, zone=one.zone, shard_name=one.shard_name)
                for one in known
            )
        case spec.Dns(hostname, port, refresh_s):
            found.dns.CopyFrom(pb.DnsDiscovery(hostname=hostname, port=port, refresh_duration=_duration(refresh_s)))
        case spec.File(path):
            found.file.path = path
        case spec.Kubernetes(service, port, namespace):
            found.kubernetes.CopyFrom(pb.KubernetesDiscovery(service=service, port=port, namespace=namespace))
        case spec.Pushed():
            found.pushed.SetInParent()


def _policy(said: spec.Spec) -> policy_pb.Policy:
    policy, times, breaker = said.policy, said.policy.timeouts, said.policy.circuit_breaker
    found = policy_pb.Policy(
        timeouts=policy_pb.Timeouts(
            connect_duration=_duration(times.connect_s),
            request_duration=_duration(times.request_s),
            per_try_duration=_duration(times.per_try_s),
            idle_duration=_duration(times.idle_s),
        ),
        circuit_breaker=policy_pb.CircuitBreaker(max_connections=breaker.max_connections),
        load_balancing=_load_balancing(policy.load_balancing),
        splits=[_split_said(one) for one in policy.splits],
        retry=_retry_said(policy.retry) if policy.retry else None,
    )
    if said.protocol in HTTP_LIKE:
        found.circuit_breaker.max_pending_requests = breaker.max_pending_requests
        found.circuit_breaker.max_requests = breaker.max_requests
    _protection(found, policy)
    if policy.mirror is not None:
        found.mirror.upstream_id, found.mirror.percent = policy.mirror.upstream_id, policy.mirror.percent
    if policy.hedge:
        found.hedge.enabled = True
    return found


def _protection(found: policy_pb.Policy, policy: spec.Policy) -> None:
    if (outliers := policy.outlier_detection) is not None:
        found.outlier_detection.CopyFrom(
            policy_pb.OutlierDetection(
                consecutive_failures=outliers.consecutive_failures,
                interval_duration=_duration(outliers.interval_s),
                base_ejection_duration=_duration(outliers.base_ejection_s),
                max_ejection_percent=outliers.max_ejection_percent,
            )
        )
    if (health := policy.health_check) is not None:
        found.health_check.CopyFrom(
            policy_pb.HealthCheck(
                interval_duration=_duration(health.interval_s),
                timeout_duration=_duration(health.timeout_s),
                unhealthy_threshold=health.unhealthy_threshold,
                healthy_threshold=health.healthy_threshold,
                path=health.path,
            )
        )
    if (rate := policy.rate_limit) is not None:
        found.rate_limit.CopyFrom(
            policy_pb.RateLimit(requests=rate.requests, per_duration=_duration(rate.per_s), burst=rate.burst)
        )
    if (fault := policy.fault) is not None:
        found.fault.CopyFrom(
            policy_pb.Fault(
                delay_duration=_duration(fault.delay_s),
                delay_percent=fault.delay_percent,
                abort_status=fault.abort_status,
                abort_percent=fault.abort_percent,
            )
        )


def _load_balancing(said: spec.LoadBalancing) -> policy_pb.LoadBalancing:
    found = policy_pb.LoadBalancing(balancer=policy_pb.LoadBalancer.ValueType(said.balancer))
    for name in ("header", "cookie", "source_address"):
        if value := getattr(said, name):
            setattr(found, name, value)
    return found


def _split_said(said: spec.Split) -> policy_pb.Split:
    found = policy_pb.Split(upstream_id=said.upstream_id, percent=said.percent)
    if said.header_name:
        found.header.name, found.header.value = said.header_name, said.header_value
    return found


def _retry_said(said: spec.Retry) -> policy_pb.Retry:
    return policy_pb.Retry(
        on=[policy_pb.RetryCondition.ValueType(one) for one in said.on],
        attempts=said.attempts,
        backoff_base_duration=_duration(said.backoff_base_s),
        backoff_max_duration=_duration(said.backoff_max_s),
        budget_percent=said.budget_percent,
        budget_min_concurrency=said.budget_min_concurrency,
        same_endpoint=said.same_endpoint,
    )


def stats(upstream_id: str, known: Counts) -> stats_pb.UpstreamStats:
    """Counts of one upstream."""
    names = set(Counts.__struct_fields__) & {field.name for field in stats_pb.UpstreamStats.DESCRIPTOR.fields}
    found = stats_pb.UpstreamStats(
        upstream_id=upstream_id,
        start_time=wire.to_timestamp(known.since_ms),
        endpoints=[
            stats_pb.EndpointStats(
                address=address,
                requests=one.requests,
                errors=one.errors,
                active_connections=one.active_connections,
                healthy=one.healthy,
            )
            for address, one in sorted(known.endpoints.items())
        ],
        **{name: getattr(known, name) for name in names - {"endpoints"}},
    )
    if known.bounds_s:
        found.latency.CopyFrom(
            stats_pb.LatencyHistogram(
                bounds_seconds=known.bounds_s, counts=list(known.buckets), sum_seconds=known.sum_s
            )
        )
    return found


def data_plane(plane: DataPlane) -> api.DataPlane:
    """What carries the bytes, and what it can do."""
    can = {speaks: plane.capabilities(speaks) for speaks in Speaks}
    return api.DataPlane(
        kind=pb.DataPlaneKind.ValueType(plane.kind),
        version=plane.state.version,
        live=plane.state.live,
        reason=plane.state.reason,
        protocols=[pb.Protocol.ValueType(speaks) for speaks, names in can.items() if names],
        capabilities=[
            api.Capability(protocol=pb.Protocol.ValueType(speaks), name=name)
            for speaks, names in can.items()
            for name in sorted(names)
        ],
    )
