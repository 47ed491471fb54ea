"""What may be declared: every violation is named, nothing is guessed."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from retinue_server.ambassador.core.spec import (
    HASHING,
    HTTP_LIKE,
    SHARDED,
    Balancer,
    CircuitBreaker,
    Dns,
    Endpoint,
    File,
    HealthCheck,
    Kubernetes,
    LoadBalancing,
    Policy,
    Protocol,
    Retry,
    RetryCondition,
    Spec,
    Static,
    Timeouts,
)
from retinue_server.runtime import endpoints
from retinue_server.runtime.errors import InvalidArgument, Violation

if TYPE_CHECKING:
    from collections.abc import Iterator, MutableSequence, Sequence

UPSTREAM_ID = re.compile(r"[a-z](?:[a-z0-9-]{0,61}[a-z0-9])?")
_HOSTNAME = re.compile(r"(?=.{1,253}\.?$)(?:[A-Za-z0-9_](?:[A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?\.?)+")
_LABEL = re.compile(r"[a-z0-9](?:[-a-z0-9]{0,61}[a-z0-9])?")
_PORT_NAME = re.compile(r"(?=.*[a-z])[a-z0-9](?:[-a-z0-9]{0,13}[a-z0-9])?")
_TOKEN = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]{1,128}")
MAX_ENDPOINTS = 1000
MAX_WEIGHT = 1000
_MAX_TEXT = 128
_MAX_PATH = 100
_MAX_PORT = 65535
_HOUR, _MILLISECOND = 3600.0, 0.001
_MILLION = 1_000_000
PAGE_SIZES = 100, 50
_GRPC_ONLY = frozenset(condition for condition in RetryCondition if condition.name.startswith("GRPC_"))


def refuse(violations: Sequence[Violation], what: str) -> None:
    """Raises what is wrong."""
    if violations:
        first = violations[0]
        raise InvalidArgument(f"cannot {what}: {first.field} {first.description}", list(violations))


def check_upstream_id(upstream_id: str, violations: MutableSequence[Violation], field: str = "upstream_id") -> None:
    """A name that an upstream can have."""
    if not UPSTREAM_ID.fullmatch(upstream_id):
        violations.append(
            Violation(field, "must be 1 to 63 of a-z 0-9 -, beginning with a letter and not ending with a dash")
        )


def check(spec: Spec, violations: MutableSequence[Violation], at: str = "upstream.") -> None:
    """All of a declaration, beyond what translation has found."""
    check_upstream_id(spec.upstream_id, violations, at + "upstream_id")
    for field, text in _violations(spec):
        violations.append(Violation(at + field, text))


def check_endpoints(found: Sequence[Endpoint], violations: MutableSequence[Violation], field: str) -> None:
    """A list of endpoints."""
    violations.extend(Violation(at, text) for at, text in endpoint_violations(found, field))


def _violations(spec: Spec) -> Iterator[tuple[str, str]]:
    yield from _listen(spec)
    yield from _discovery(spec)
    yield from _policy(spec)
    if spec.tls is not None:
        yield from _tls(spec)
    if spec.redis_auth is not None:
        if spec.protocol is not Protocol.REDIS:
            yield "redis_auth", "is for REDIS"
        if not spec.redis_auth.password_file.startswith("/"):
            yield "redis_auth.password_file", "must be an absolute path"


def _within(field: str, value: float, low: float, high: float, words: str) -> Iterator[tuple[str, str]]:
    """NaN is nowhere."""
    if not low <= value <= high:
        yield field, f"must be {words}"


def _listen(spec: Spec) -> Iterator[tuple[str, str]]:
    listen = spec.listen
    yield from _within("listen.port", listen.port, 0, _MAX_PORT, f"0 to {_MAX_PORT}")
    if listen.path and not _is_path(listen.path):
        yield "listen.unix_socket.path", f"must be absolute, up to {_MAX_PATH} bytes"
    yield from _within("listen.unix_socket.mode", listen.mode, 0, 0o777, "permission bits, 0 to 511 (0777)")


def _is_path(path: str) -> bool:
    return path.startswith("/") and len(path.encode()) <= _MAX_PATH and "\0" not in path


def _discovery(spec: Spec) -> Iterator[tuple[str, str]]:
    match spec.discovery:
        case Static(found):
            if not found:
                yield "static.endpoints", "must be one or more"
            yield from endpoint_violations(found, "static.endpoints")
        case Dns() as dns:
            yield from _dns(dns)
        case File(path):
            if not path.startswith("/"):
                yield "file.path", "must be absolute"
        case Kubernetes() as service:
            yield from _kubernetes(service)


def _dns(said: Dns) -> Iterator[tuple[str, str]]:
    if not _HOSTNAME.fullmatch(said.hostname):
        yield "dns.hostname", "must be a host name"
    yield from _within("dns.port", said.port, 1, _MAX_PORT, f"1 to {_MAX_PORT}")
    yield from _within("dns.refresh_duration", said.refresh_s, 1, _HOUR, "1 s to 1 h")


def _kubernetes(said: Kubernetes) -> Iterator[tuple[str, str]]:
    if not _LABEL.fullmatch(said.service):
        yield "kubernetes.service", "must be the name of a Service"
    if said.namespace and not _LABEL.fullmatch(said.namespace):
        yield "kubernetes.namespace", "must be the name of a namespace"
    number = int(said.port) if said.port.isascii() and said.port.isdecimal() else 0
    if not (_PORT_NAME.fullmatch(said.port) or 1 <= number <= _MAX_PORT):
        yield "kubernetes.port", "must be the number or the name of a port"


def endpoint_violations(found: Sequence[Endpoint], field: str) -> Iterator[tuple[str, str]]:
    """What is wrong with a list of endpoints: paths of fields, and what would be right."""
    if len(found) > MAX_ENDPOINTS:
        yield field, f"must be at most {MAX_ENDPOINTS}"
    seen: set[str] = set()
    for index, one in enumerate(found):
        at = f"{field}[{index}]"
        if not _is_endpoint(one.address):
            yield f"{at}.address", "must be IP:PORT, [IPV6]:PORT or unix:/PATH; names are for `dns`"
        elif one.address in seen:
            yield f"{at}.address", "must not repeat an earlier one"
        seen.add(one.address)
        yield from _within(f"{at}.weight", one.weight, 1, MAX_WEIGHT, f"1 to {MAX_WEIGHT}")
        for name in ("zone", "shard_name"):
            if len(getattr(one, name)) > _MAX_TEXT:
                yield f"{at}.{name}", f"must be up to {_MAX_TEXT} characters"


def _is_endpoint(address: str) -> bool:
    if address.startswith("unix:"):
        return _is_path(address.removeprefix("unix:"))
    try:
        endpoints.split(address)
    except ValueError:
        return False
    return True


def _tls(spec: Spec) -> Iterator[tuple[str, str]]:
    tls = spec.tls
    assert tls is not None
    if not tls.server_name and not isinstance(spec.discovery, Dns):
        yield "tls.server_name", "must be given where discovery is not `dns`"
    if bool(tls.cert_file) != bool(tls.key_file):
        yield "tls.cert_file", "and key_file need each other"
    for name in ("ca_file", "cert_file", "key_file"):
        if getattr(tls, name) and not getattr(tls, name).startswith("/"):
            yield f"tls.{name}", "must be an absolute path"


def _policy(spec: Spec) -> Iterator[tuple[str, str]]:
    policy, protocol = spec.policy, spec.protocol
    if protocol not in HTTP_LIKE:
        yield from _not_http(policy, protocol)
    yield from _timeouts(policy.timeouts)
    yield from _retry(policy, protocol)
    yield from _breakers(policy)
    yield from _outliers(policy)
    yield from _health(policy.health_check, protocol)
    yield from _balancing(policy, protocol)
    yield from _splits(policy, spec.upstream_id)
    if policy.mirror is not None:
        if policy.mirror.upstream_id == spec.upstream_id:
            yield "policy.mirror.upstream_id", "must be another upstream"
        yield from _within("policy.mirror.percent", policy.mirror.percent, 0.01, 100, "0.01 to 100")
    yield from _rate(policy)
    yield from _fault(policy, protocol)


def _not_http(policy: Policy, protocol: Protocol) -> Iterator[tuple[str, str]]:
    asked = {
        "retry": policy.retry,
        "splits": policy.splits,
        "mirror": policy.mirror,
        "fault": policy.fault,
        "hedge": policy.hedge,
        "timeouts.per_try_duration": policy.timeouts.per_try_s,
    }
    for name, value in asked.items():
        if value:
            yield f"policy.{name}", f"is for HTTP and GRPC, not for {protocol.name}"
    if protocol is Protocol.TCP and policy.timeouts.request_s is not None:
        yield "policy.timeouts.request_duration", "is for requests, which TCP has none of"


def _timeouts(said: Timeouts) -> Iterator[tuple[str, str]]:
    for name in ("connect", "request", "per_try", "idle"):
        seconds = getattr(said, f"{name}_s")
        if seconds is not None:
            yield from _within(f"policy.timeouts.{name}_duration", seconds, _MILLISECOND, _HOUR, "1 ms to 1 h")
    if said.request_s is not None and said.per_try_s is not None and said.per_try_s > said.request_s:
        yield "policy.timeouts.per_try_duration", "must be at most request_duration"


def _retry(policy: Policy, protocol: Protocol) -> Iterator[tuple[str, str]]:
    retry = policy.retry
    if retry is not None:
        yield from _retries(retry, protocol)
        if policy.hedge and policy.timeouts.per_try_s is None:
            yield "policy.hedge", "needs timeouts.per_try_duration, after which it makes another request"
        return
    if policy.hedge:
        yield "policy.hedge", "needs retry"
    if policy.timeouts.per_try_s is not None and protocol in HTTP_LIKE:
        yield "policy.timeouts.per_try_duration", "needs retry"


def _retries(retry: Retry, protocol: Protocol) -> Iterator[tuple[str, str]]:
    at = "policy.retry."
    if not retry.on:
        yield at + "on", "must be one or more"
    if protocol is Protocol.HTTP and _GRPC_ONLY.intersection(retry.on):
        yield at + "on", "has conditions that only GRPC has"
    yield from _within(at + "attempts", retry.attempts, 1, 10, "1 to 10")
    yield from _within(at + "backoff_base_duration", retry.backoff_base_s, _MILLISECOND, _HOUR, "1 ms to 1 h")
    longest = "from backoff_base_duration to 1 h"
    yield from _within(at + "backoff_max_duration", retry.backoff_max_s, retry.backoff_base_s, _HOUR, longest)
    yield from _within(at + "budget_percent", retry.budget_percent, 0.01, 100, "0.01 to 100")
    yield from _within(at + "budget_min_concurrency", retry.budget_min_concurrency, 1, _MILLION, "1 to 1,000,000")


def _breakers(policy: Policy) -> Iterator[tuple[str, str]]:
    for name in CircuitBreaker.__struct_fields__:
        value = getattr(policy.circuit_breaker, name)
        yield from _within(f"policy.circuit_breaker.{name}", value, 1, _MILLION, "1 to 1,000,000")


def _outliers(policy: Policy) -> Iterator[tuple[str, str]]:
    said, at = policy.outlier_detection, "policy.outlier_detection."
    if said is None:
        return
    yield from _within(at + "consecutive_failures", said.consecutive_failures, 1, 10_000, "1 to 10,000")
    yield from _within(at + "interval_duration", said.interval_s, 0.01, _HOUR, "10 ms to 1 h")
    yield from _within(at + "base_ejection_duration", said.base_ejection_s, 0.01, _HOUR, "10 ms to 1 h")
    yield from _within(at + "max_ejection_percent", said.max_ejection_percent, 1, 100, "1 to 100")


def _health(said: HealthCheck | None, protocol: Protocol) -> Iterator[tuple[str, str]]:
    if said is None:
        return
    at = "policy.health_check."
    yield from _within(at + "interval_duration", said.interval_s, 0.1, _HOUR, "100 ms to 1 h")
    yield from _within(at + "timeout_duration", said.timeout_s, 0.01, _HOUR, "10 ms to 1 h")
    for name in ("unhealthy_threshold", "healthy_threshold"):
        yield from _within(at + name, getattr(said, name), 1, 1000, "1 to 1,000")
    if (protocol is Protocol.HTTP) != bool(said.path):
        yield at + "path", "must be given for HTTP, and is for no other"
    elif said.path and (not said.path.startswith("/") or not said.path.isprintable()):
        yield at + "path", "must begin with /"


def _balancing(policy: Policy, protocol: Protocol) -> Iterator[tuple[str, str]]:
    said, at = policy.load_balancing, "policy.load_balancing."
    if said.balancer is Balancer.KETAMA and protocol is not Protocol.MEMCACHED:
        yield at + "balancer", "KETAMA is for MEMCACHED"
    for name in ("header", "cookie"):
        if (value := getattr(said, name)) and not _TOKEN.fullmatch(value):
            yield at + name, "must be a name of up to 128 characters"
    if protocol in SHARDED:
        yield from _sharding(said, protocol)
    else:
        yield from _hashing(said, protocol)


def _sharding(said: LoadBalancing, protocol: Protocol) -> Iterator[tuple[str, str]]:
    at = "policy.load_balancing."
    if said.balancer not in HASHING:
        yield at + "balancer", f"{protocol.name} is sharded by key: RING_HASH or MAGLEV, or KETAMA for MEMCACHED"
    if said.hashes_on:
        yield at + "hash_on", "is for HTTP and GRPC; keys are hashed here"


def _hashing(said: LoadBalancing, protocol: Protocol) -> Iterator[tuple[str, str]]:
    at = "policy.load_balancing."
    if said.hashes_on and said.balancer not in HASHING:
        yield at + "hash_on", "is for RING_HASH and MAGLEV"
    if protocol is Protocol.TCP and (said.header or said.cookie):
        yield at + "hash_on", "TCP has only source_address"
    elif said.balancer in HASHING and not said.hashes_on:
        yield at + "hash_on", "must say what is hashed"


def _splits(policy: Policy, own_id: str) -> Iterator[tuple[str, str]]:
    total = 0.0
    for index, split in enumerate(policy.splits):
        at = f"policy.splits[{index}]"
        if not UPSTREAM_ID.fullmatch(split.upstream_id) or split.upstream_id == own_id:
            yield f"{at}.upstream_id", "must be another upstream"
        if split.header_name and split.percent:
            yield f"{at}.percent", "excludes header"
        if split.header_name:
            if not _TOKEN.fullmatch(split.header_name):
                yield f"{at}.header.name", "must be a name of up to 128 characters"
            if not split.header_value.isprintable():
                yield f"{at}.header.value", "must be printable"
        else:
            yield from _within(f"{at}.percent", split.percent, 0.01, 100, "0.01 to 100")
        total += split.percent
    yield from _within("policy.splits", total, 0, 100, "at most 100 percent in sum")


def _rate(policy: Policy) -> Iterator[tuple[str, str]]:
    said, at = policy.rate_limit, "policy.rate_limit."
    if said is None:
        return
    for name in ("requests", "burst"):
        yield from _within(at + name, getattr(said, name), 1, _MILLION, "1 to 1,000,000")
    yield from _within(at + "per_duration", said.per_s, 0.05, _HOUR, "50 ms to 1 h")


def _fault(policy: Policy, protocol: Protocol) -> Iterator[tuple[str, str]]:
    said, at = policy.fault, "policy.fault."
    if said is None or protocol not in HTTP_LIKE:
        return
    for name in ("delay_percent", "abort_percent"):
        yield from _within(at + name, getattr(said, name), 0, 100, "0 to 100")
    yield from _within(at + "delay_duration", said.delay_s, 0, _HOUR, "up to 1 h")
    if bool(said.delay_s) != bool(said.delay_percent):
        yield at + "delay_percent", "and delay_duration need each other"
    if said.abort_status:
        yield from _within(at + "abort_status", said.abort_status, 400, 599, "400 to 599")
    if bool(said.abort_status) != bool(said.abort_percent):
        yield at + "abort_percent", "and abort_status need each other"


def required(spec: Spec) -> Iterator[str]:
    """The capabilities that a declaration asks of its data plane, by the names of the contract's `Capability`."""
    policy = spec.policy
    asked: dict[str, object] = {
        spec.protocol.name.lower(): True,
        "listen.unix_socket": spec.listen.path,
        "tls": spec.tls,
        "tls.subject_alt_names": spec.tls and spec.tls.subject_alt_names,
        "redis_auth": spec.redis_auth,
        "policy.timeouts.request_duration": policy.timeouts.request_s,
        "policy.timeouts.per_try_duration": policy.timeouts.per_try_s,
        "policy.timeouts.idle_duration": policy.timeouts.idle_s,
        "policy.retry": policy.retry,
        "policy.hedge": policy.hedge,
        "policy.outlier_detection": policy.outlier_detection,
        "policy.health_check": policy.health_check,
        "policy.splits": policy.splits,
        "policy.mirror": policy.mirror,
        "policy.rate_limit": policy.rate_limit,
        "policy.fault": policy.fault,
    }
    yield from (name for name, value in asked.items() if value)
    yield f"policy.load_balancing.balancer={policy.load_balancing.balancer.name}"
    usual = CircuitBreaker()
    for name in CircuitBreaker.__struct_fields__:
        if getattr(policy.circuit_breaker, name) != getattr(usual, name):
            yield f"policy.circuit_breaker.{name}"
