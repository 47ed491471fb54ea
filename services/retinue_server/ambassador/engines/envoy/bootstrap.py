"""What Envoy is started with: where it gets everything else."""

from __future__ import annotations

from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from retinue_server.ambassador.engines.envoy.bindings import Json, typed

if TYPE_CHECKING:
    from pathlib import Path

_ADS: Json = {"ads": {}, "resource_api_version": "V3"}
XDS_CLUSTER, OTLP_CLUSTER = "retinue-xds", "retinue-otlp"
_SAMPLERS = "envoy.extensions.tracers.opentelemetry.samplers.v3."
_HTTP2 = "envoy.extensions.upstreams.http.v3.HttpProtocolOptions"


def bootstrap(node_id: str, xds: Path, admin: Path, otlp_endpoint: str = "") -> Json:
    """Admin and xDS are sockets in the file system, so that no request of an app can be made to reach them."""
    clusters = [_cluster(XDS_CLUSTER, {"pipe": {"path": str(xds)}})]
    if otlp_endpoint:
        clusters.append(_cluster(OTLP_CLUSTER, _tcp(otlp_endpoint), kind="STRICT_DNS"))
    return {
        "node": {"id": node_id, "cluster": "retinue"},
        "admin": {"address": {"pipe": {"path": str(admin), "mode": 0o600}}},
        "dynamic_resources": {"ads_config": _ads_config(), "cds_config": _ADS, "lds_config": _ADS},
        "static_resources": {"clusters": clusters},
        "stats_flush_on_admin": True,  # who looks finds histograms as they were at the last look, not as of some timer
    }


def _ads_config() -> Json:
    backoff = {"base_interval": "0.1s", "max_interval": "1s"}  # as it is, it would take seconds to find us again
    service = {"envoy_grpc": {"cluster_name": XDS_CLUSTER, "retry_policy": {"retry_back_off": backoff}}}
    return {
        "api_type": "DELTA_GRPC",
        "transport_api_version": "V3",
        "grpc_services": [service],
        "set_node_on_first_message_only": True,
    }


def _cluster(name: str, address: Json, kind: str = "STATIC") -> Json:
    keepalive = {"interval": "5s", "timeout": "5s"}
    http2 = {"explicit_http_config": {"http2_protocol_options": {"connection_keepalive": keepalive}}}
    return {
        "name": name,
        "type": kind,
        "connect_timeout": "1s",
        "typed_extension_protocol_options": {_HTTP2: typed(_HTTP2, http2)},
        "load_assignment": {
            "cluster_name": name,
            "endpoints": [{"lb_endpoints": [{"endpoint": {"address": address}}]}],
        },
    }


def _tcp(endpoint: str) -> Json:
    parts = urlsplit(endpoint if "//" in endpoint else f"//{endpoint}")
    return {"socket_address": {"address": parts.hostname or "127.0.0.1", "port_value": parts.port or 4317}}


def tracing(service_name: str) -> Json:
    """Of a connection manager: spans for requests that the app has sampled, to the collector that ours go to."""
    never = typed(f"{_SAMPLERS}TraceIdRatioBasedSamplerConfig", {"sampling_percentage": {"numerator": 0}})
    parents = {
        "wrapped_sampler": {"name": "envoy.tracers.opentelemetry.samplers.trace_id_ratio_based", "typed_config": never}
    }
    config = {
        "grpc_service": {"envoy_grpc": {"cluster_name": OTLP_CLUSTER}},
        "service_name": service_name,
        "sampler": {  # without one Envoy would take the app's decision to sample out of what it passes on
            "name": "envoy.tracers.opentelemetry.samplers.parent_based",
            "typed_config": typed(f"{_SAMPLERS}ParentBasedSamplerConfig", parents),
        },
    }
    name = "envoy.config.trace.v3.OpenTelemetryConfig"
    return {
        "spawn_upstream_span": True,
        "provider": {"name": "envoy.tracers.opentelemetry", "typed_config": typed(name, config)},
    }
