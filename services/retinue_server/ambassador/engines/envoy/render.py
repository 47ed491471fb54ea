"""Assignments -> Envoy's resources, as JSON has them.

One upstream becomes a cluster and its endpoints, a listener, and, where it speaks HTTP or gRPC, a route configuration
that has every policy: a listener that changes does not reach connections that are open, a route configuration does.
"""

from __future__ import annotations

import ipaddress
from typing import TYPE_CHECKING, Any

from retinue_server.ambassador.core.spec import (
    HTTP_LIKE,
    Balancer,
    Endpoint,
    HealthCheck,
    LoadBalancing,
    Policy,
    Protocol,
    Retry,
    RetryCondition,
    Spec,
)
from retinue_server.ambassador.engines.envoy.bindings import Json, typed

if TYPE_CHECKING:
    from collections.abc import Iterator

CLUSTER = "envoy.config.cluster.v3.Cluster"
ENDPOINTS = "envoy.config.endpoint.v3.ClusterLoadAssignment"
LISTENER = "envoy.config.listener.v3.Listener"
ROUTES = "envoy.config.route.v3.RouteConfiguration"
SECRET = "envoy.extensions.transport_sockets.tls.v3.Secret"  # noqa: S105 - a type's name

_ADS: Json = {"ads": {}, "resource_api_version": "V3"}
_NET = "envoy.extensions.filters.network."
_HTTP = "envoy.extensions.filters.http."
_REDIS = "envoy.filters.network.redis_proxy"
_RATE = "envoy.filters.http.local_ratelimit"
_FAULT = "envoy.filters.http.fault"
_RETRY_ON = {
    RetryCondition.SERVER_ERROR: "5xx",
    RetryCondition.GATEWAY_ERROR: "gateway-error",
    RetryCondition.CONNECT_FAILURE: "connect-failure",
    RetryCondition.RESET: "reset",
    RetryCondition.REFUSED_STREAM: "refused-stream",
    RetryCondition.GRPC_UNAVAILABLE: "unavailable",
    RetryCondition.GRPC_RESOURCE_EXHAUSTED: "resource-exhausted",
    RetryCondition.GRPC_CANCELLED: "cancelled",
    RetryCondition.GRPC_DEADLINE_EXCEEDED: "deadline-exceeded",
    RetryCondition.GRPC_INTERNAL: "internal",
}
_BALANCERS = {
    Balancer.ROUND_ROBIN: "ROUND_ROBIN",
    Balancer.LEAST_REQUEST: "LEAST_REQUEST",
    Balancer.RANDOM: "RANDOM",
    Balancer.RING_HASH: "RING_HASH",
    Balancer.MAGLEV: "MAGLEV",
}
_GRPC_UNAVAILABLE = 14
_UNLIMITED = 1_000_000_000
"""For limits that are not ours to set; Envoy's own default is 1,024."""
_SESSION_TIMEOUT = "0s"
"""None: the app's own deadline counts."""


def seconds(value: float) -> str:
    """A duration as JSON has it, exact to the millisecond."""
    return f"{value:.3f}s".replace(".000s", "s")


def percent(value: float) -> Json:
    """A fraction, exact to a ten-thousandth of a percent."""
    return {"numerator": round(value * 10_000), "denominator": "MILLION"}


def socket_address(address: str) -> Json:
    """Of `IP:PORT`, `[IPV6]:PORT` or `unix:PATH`."""
    if address.startswith("unix:"):
        return {"pipe": {"path": address.removeprefix("unix:")}}
    host, _, port = address.rpartition(":")
    return {"socket_address": {"address": host.strip("[]"), "port_value": int(port)}}


# Clusters


def cluster(spec: Spec, redis_password: str = "") -> Json:
    """Who is asked, and how connections to them are made."""
    policy = spec.policy
    found: Json = {
        "name": spec.upstream_id,
        "type": "EDS",
        "eds_cluster_config": {"eds_config": _ADS},
        "connect_timeout": seconds(policy.timeouts.connect_s),
        "lb_policy": _BALANCERS[policy.load_balancing.balancer],
        "common_lb_config": {
            "update_merge_window": "0s",  # else an ejection right after a change waits for up to a second
            "healthy_panic_threshold": {"value": 0},  # nobody is asked who is known to be ill
        },
        "circuit_breakers": {"thresholds": [_thresholds(policy)]},
        "ignore_health_on_host_removal": True,
    }
    if options := _protocol_options(spec, redis_password):
        found["typed_extension_protocol_options"] = options
    if policy.outlier_detection is not None:
        found["outlier_detection"] = _outliers(policy)
    if policy.health_check is not None:
        found["health_checks"] = [_health_check(policy.health_check, spec.protocol)]
    if spec.tls is not None:
        found["transport_socket"] = _tls(spec)
    return found


def _thresholds(policy: Policy) -> Json:
    breaker, retry = policy.circuit_breaker, policy.retry or Retry(())
    return {
        "max_connections": breaker.max_connections,
        "max_pending_requests": breaker.max_pending_requests,
        "max_requests": breaker.max_requests,
        "retry_budget": {
            "budget_percent": {"value": retry.budget_percent},
            "min_retry_concurrency": retry.budget_min_concurrency,
        },
        "track_remaining": True,
    }


def _protocol_options(spec: Spec, redis_password: str) -> Json:
    if spec.protocol in HTTP_LIKE:
        version = "http2_protocol_options" if spec.protocol is Protocol.GRPC else "http_protocol_options"
        idle = spec.policy.timeouts.idle_s
        options = {"common_http_protocol_options": {"idle_timeout": seconds(idle)}} if idle else {}
        name = "envoy.extensions.upstreams.http.v3.HttpProtocolOptions"
        return {name: typed(name, {"explicit_http_config": {version: {}}, **options})}
    if spec.protocol is Protocol.REDIS and spec.redis_auth is not None:
        said: Json = {"auth_password": {"inline_string": redis_password}}
        if spec.redis_auth.username:
            said["auth_username"] = {"inline_string": spec.redis_auth.username}
        return {_REDIS: typed(f"{_NET}redis_proxy.v3.RedisProtocolOptions", said)}
    return {}


def _outliers(policy: Policy) -> Json:
    said = policy.outlier_detection
    assert said is not None
    return {
        "consecutive_5xx": said.consecutive_failures,
        "consecutive_gateway_failure": said.consecutive_failures,
        "enforcing_consecutive_gateway_failure": 0,
        "enforcing_success_rate": 0,
        "interval": seconds(said.interval_s),
        "base_ejection_time": seconds(said.base_ejection_s),
        "max_ejection_time": seconds(max(300.0, said.base_ejection_s)),
        "max_ejection_percent": said.max_ejection_percent,
        "always_eject_one_host": True,
    }


def _health_check(said: HealthCheck, protocol: Protocol) -> Json:
    found: Json = {
        "interval": seconds(said.interval_s),
        "timeout": seconds(said.timeout_s),
        "unhealthy_threshold": said.unhealthy_threshold,
        "healthy_threshold": said.healthy_threshold,
        "no_traffic_interval": seconds(said.interval_s),
    }
    match protocol:
        case Protocol.HTTP:
            found["http_health_check"] = {"path": said.path}
        case Protocol.GRPC:
            found["grpc_health_check"] = {}
        case Protocol.REDIS:
            config = typed("envoy.extensions.health_checkers.redis.v3.Redis")
            found["custom_health_check"] = {"name": "envoy.health_checkers.redis", "typed_config": config}
        case _:
            found["tcp_health_check"] = {}
    return found


def _tls(spec: Spec) -> Json:
    tls = spec.tls
    assert tls is not None
    names = tls.subject_alt_names or (tls.server_name,)
    context: Json = {
        "combined_validation_context": {
            "default_validation_context": {"match_typed_subject_alt_names": [_san(name) for name in names]},
            "validation_context_sds_secret_config": {"name": f"{spec.upstream_id}/ca", "sds_config": _ADS},
        },
    }
    if tls.cert_file:
        context["tls_certificate_sds_secret_configs"] = [{"name": f"{spec.upstream_id}/cert", "sds_config": _ADS}]
    if spec.protocol is Protocol.GRPC:
        context["alpn_protocols"] = ["h2"]
    said = {"sni": tls.server_name, "common_tls_context": context}
    name = "envoy.extensions.transport_sockets.tls.v3.UpstreamTlsContext"
    return {"name": "envoy.transport_sockets.tls", "typed_config": typed(name, said)}


def _san(name: str) -> Json:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return {"san_type": "DNS", "matcher": {"exact": name}}
    return {"san_type": "IP_ADDRESS", "matcher": {"exact": name}}


def ca_secret(upstream_id: str, ca: bytes) -> Json:
    """The certificate authorities of an upstream's endpoints."""
    return {"name": f"{upstream_id}/ca", "validation_context": {"trusted_ca": {"inline_string": ca.decode()}}}


def cert_secret(upstream_id: str, cert: bytes, key: bytes) -> Json:
    """The certificate by which an upstream's endpoints know us."""
    chain, private = {"inline_string": cert.decode()}, {"inline_string": key.decode()}
    return {"name": f"{upstream_id}/cert", "tls_certificate": {"certificate_chain": chain, "private_key": private}}


def endpoints(spec: Spec, known: tuple[Endpoint, ...]) -> Json:
    """Who serves an upstream; each zone is a locality, which weights don't tell apart."""
    return {
        "cluster_name": spec.upstream_id,
        "endpoints": [{"lb_endpoints": [_endpoint(one) for one in known]}] if known else [],
    }


def _endpoint(one: Endpoint) -> Json:
    found: Json = {"endpoint": {"address": socket_address(one.address)}, "load_balancing_weight": one.weight}
    if one.shard_name:
        found["metadata"] = {"filter_metadata": {"envoy.lb": {"hash_key": one.shard_name}}}
    return found


# Listeners


def listener(spec: Spec, tracing: Json | None = None) -> Json:
    """Where the app dials."""
    listen = spec.listen
    address = (
        {"pipe": {"path": listen.path, "mode": listen.mode}}
        if listen.path
        else {"socket_address": {"address": "127.0.0.1", "port_value": listen.port}}
    )
    return {
        "name": spec.upstream_id,
        "stat_prefix": spec.upstream_id,
        "address": address,
        "enable_reuse_port": False,  # a second Envoy must fail, not share the port
        "traffic_direction": "OUTBOUND",
        "filter_chains": [{"filters": list(_filters(spec, tracing))}],
    }


def _filters(spec: Spec, tracing: Json | None) -> Iterator[Json]:
    if spec.protocol in HTTP_LIKE:
        yield _filter("envoy.filters.network.http_connection_manager", _connection_manager(spec, tracing))
        return
    if (rate := spec.policy.rate_limit) is not None:
        bucket = _bucket(rate.requests, rate.per_s, rate.burst)
        name = f"{_NET}local_ratelimit.v3.LocalRateLimit"
        said = typed(name, {"stat_prefix": spec.upstream_id, "token_bucket": bucket})
        yield _filter("envoy.filters.network.local_ratelimit", said)
    if spec.protocol is Protocol.REDIS:
        yield _filter(_REDIS, _redis(spec))
    else:
        yield _filter("envoy.filters.network.tcp_proxy", _tcp(spec))


def _filter(name: str, config: Json) -> Json:
    return {"name": name, "typed_config": config}


def _connection_manager(spec: Spec, tracing: Json | None) -> Json:
    said: Json = {
        "stat_prefix": spec.upstream_id,
        "codec_type": "HTTP2" if spec.protocol is Protocol.GRPC else "AUTO",
        "rds": {"route_config_name": spec.upstream_id, "config_source": _ADS},
        "http_filters": [
            _filter(_RATE, typed(f"{_HTTP}local_ratelimit.v3.LocalRateLimit", {"stat_prefix": "rate_limit"})),
            _filter(_FAULT, typed(f"{_HTTP}fault.v3.HTTPFault")),
            *_grpc_filters(spec),
            _filter("envoy.filters.http.router", typed(f"{_HTTP}router.v3.Router")),
        ],
        "stream_idle_timeout": "0s",
        "server_header_transformation": "PASS_THROUGH",
        "skip_xff_append": True,
        "generate_request_id": False,
        "upgrade_configs": [{"upgrade_type": "websocket"}],
        "http2_protocol_options": {"max_concurrent_streams": 1024},
    }
    if tracing:
        said["tracing"] = tracing
        # Else a request without an id of its own would count as one that is not to be traced.
        own = {"pack_trace_reason": False, "use_request_id_for_trace_sampling": False}
        said["request_id_extension"] = {
            "typed_config": typed("envoy.extensions.request_id.uuid.v3.UuidRequestIdConfig", own)
        }
    return typed(f"{_NET}http_connection_manager.v3.HttpConnectionManager", said)


def _grpc_filters(spec: Spec) -> Iterator[Json]:
    """Counts calls by their status: as HTTP they are all well."""
    if spec.protocol is Protocol.GRPC:
        yield _filter("envoy.filters.http.grpc_stats", typed(f"{_HTTP}grpc_stats.v3.FilterConfig"))


def _redis(spec: Spec) -> Json:
    said = {
        "stat_prefix": spec.upstream_id,
        "settings": {
            "op_timeout": seconds(spec.policy.timeouts.request_s or 1.0),
            "enable_hashtagging": True,
            "enable_command_stats": False,  # some 1,300 figures an upstream
        },
        "prefix_routes": {"catch_all_route": {"cluster": spec.upstream_id}},
    }
    return typed(f"{_NET}redis_proxy.v3.RedisProxy", said)


def _tcp(spec: Spec) -> Json:
    idle = spec.policy.timeouts.idle_s
    said: Json = {
        "stat_prefix": spec.upstream_id,
        "cluster": spec.upstream_id,
        "idle_timeout": seconds(idle) if idle else "0s",
    }
    if spec.policy.load_balancing.source_address:
        said["hash_policy"] = [{"source_ip": {}}]
    return typed(f"{_NET}tcp_proxy.v3.TcpProxy", said)


# Routes


def routes(spec: Spec) -> Json:
    """What becomes of requests: all policies of an upstream that speaks HTTP or gRPC."""
    policy = spec.policy
    host: Json = {"name": spec.upstream_id, "domains": ["*"], "routes": list(_routes(spec))}
    filters: Json = {}
    if policy.rate_limit is not None:
        filters[_RATE] = _rate_limit(spec)
    if policy.fault is not None:
        filters[_FAULT] = _fault(spec)
    if filters:
        host["typed_per_filter_config"] = filters
    return {"name": spec.upstream_id, "virtual_hosts": [host]}


def _routes(spec: Spec) -> Iterator[Json]:
    """Those with a header first; the first that matches counts."""
    for split in spec.policy.splits:
        if split.header_name:
            header: Json = {"name": split.header_name}
            if split.header_value:
                header["string_match"] = {"exact": split.header_value}
            else:
                header["present_match"] = True
            action = _action(spec.policy, {"cluster": split.upstream_id})
            yield {"match": {"prefix": "/", "headers": [header]}, "route": action}
    shares = [split for split in spec.policy.splits if not split.header_name]
    yield {"match": {"prefix": "/"}, "route": _action(spec.policy, _target(spec.upstream_id, shares))}


def _target(own: str, shares: list[Any]) -> Json:
    if not shares:
        return {"cluster": own}
    weights = {split.upstream_id: round(split.percent * 10_000) for split in shares}
    rest = 1_000_000 - sum(weights.values())
    clusters = [{"name": own, "weight": rest}] if rest > 0 else []
    clusters += [{"name": name, "weight": weight} for name, weight in weights.items()]
    return {"weighted_clusters": {"clusters": clusters}}


def _action(policy: Policy, target: Json) -> Json:
    request_s = policy.timeouts.request_s
    found: Json = {**target, "timeout": seconds(request_s) if request_s else _SESSION_TIMEOUT}
    if policy.retry is not None:
        found["retry_policy"] = _retry(policy.retry, policy)
    if policy.hedge:
        found["hedge_policy"] = {"hedge_on_per_try_timeout": True}
    if hashing := _hash_policy(policy.load_balancing):
        found["hash_policy"] = hashing
    if policy.mirror is not None:
        fraction = {"default_value": percent(policy.mirror.percent)}
        found["request_mirror_policies"] = [{"cluster": policy.mirror.upstream_id, "runtime_fraction": fraction}]
    return found


def _retry(retry: Retry, policy: Policy) -> Json:
    found: Json = {
        "retry_on": ",".join(_RETRY_ON[condition] for condition in retry.on),
        "num_retries": retry.attempts,
        "retry_back_off": {
            "base_interval": seconds(retry.backoff_base_s),
            "max_interval": seconds(retry.backoff_max_s),
        },
    }
    if policy.timeouts.per_try_s is not None:
        found["per_try_timeout"] = seconds(policy.timeouts.per_try_s)
    if not retry.same_endpoint:
        name = "envoy.retry_host_predicates.previous_hosts"
        config = typed("envoy.extensions.retry.host.previous_hosts.v3.PreviousHostsPredicate")
        found["retry_host_predicate"] = [_filter(name, config)]
        found["host_selection_retry_max_attempts"] = 5
    return found


def _hash_policy(said: LoadBalancing) -> list[Json]:
    if said.header:
        return [{"header": {"header_name": said.header}}]
    if said.cookie:
        return [{"cookie": {"name": said.cookie}}]
    return [{"connection_properties": {"source_ip": True}}] if said.source_address else []


def _bucket(requests: int, per_s: float, burst: int) -> Json:
    return {"max_tokens": burst, "tokens_per_fill": requests, "fill_interval": seconds(per_s)}


def _rate_limit(spec: Spec) -> Json:
    rate = spec.policy.rate_limit
    assert rate is not None
    everything = {"default_value": percent(100)}
    said = {
        "stat_prefix": spec.upstream_id,
        "token_bucket": _bucket(rate.requests, rate.per_s, rate.burst),
        "filter_enabled": everything,
        "filter_enforced": everything,
        "rate_limited_as_resource_exhausted": False,
    }
    return typed(f"{_HTTP}local_ratelimit.v3.LocalRateLimit", said)


def _fault(spec: Spec) -> Json:
    fault = spec.policy.fault
    assert fault is not None
    said: Json = {}
    if fault.delay_s:
        said["delay"] = {"fixed_delay": seconds(fault.delay_s), "percentage": percent(fault.delay_percent)}
    if fault.abort_status:
        status: Json = {"http_status": fault.abort_status}
        if spec.protocol is Protocol.GRPC:
            status = {"grpc_status": _GRPC_UNAVAILABLE}
        said["abort"] = {**status, "percentage": percent(fault.abort_percent)}
    return typed(f"{_HTTP}fault.v3.HTTPFault", said)
