"""Envoy's figures -> ours."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from retinue_server.ambassador.core.spec import HTTP_LIKE, Protocol
from retinue_server.ambassador.engine import Counts, EndpointCounts, EndpointHealth

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from retinue_server.ambassador.core.spec import Spec
    from retinue_server.ambassador.engines.envoy.admin import Admin

FILTER = (
    r"^(cluster\.[^.]+\.(upstream_rq_(total|timeout|retry|retry_overflow|pending_overflow|active_overflow|active|time|5xx"
    r"|pending_failure_eject|rx_reset|tx_reset)|upstream_cx_(overflow|total|connect_fail|none_healthy|connect_ms|"
    r"connect_timeout)|grpc\.failure|outlier_detection\.ejections_enforced_total)"
    r"|http\.[^.]+\.(downstream_rq_(total|5xx|active)|downstream_cx_(active|rx_bytes_total|tx_bytes_total))"
    r"|tcp\.[^.]+\.downstream_cx_(total|rx_bytes_total|tx_bytes_total|no_route)"
    r"|redis\.[^.]+\.(downstream_rq_(total|active)|downstream_cx_(active|rx_bytes_total|tx_bytes_total))"
    r"|listener\.[^.]+\.downstream_cx_(active|total)"
    r"|[^.]+\.http_local_rate_limit\.rate_limited"
    r"|local_rate_limit\.[^.]+\.rate_limited)$"
)
_UNHEALTHY = (
    ("failed_active_health_check", "its health check fails"),
    ("failed_outlier_check", "it is kept off after failures"),
    ("failed_active_degraded_check", "it says that it is degraded"),
    ("pending_dynamic_removal", "it is about to be removed"),
    ("excluded_via_immediate_hc_fail", "it says that it is ill"),
)


def health(cluster: Mapping[str, Any]) -> list[EndpointHealth]:
    """Of the endpoints of one cluster, as /clusters has it."""
    return [_health(host) for host in cluster.get("host_statuses", ())]


def _health(host: Mapping[str, Any]) -> EndpointHealth:
    said = host.get("health_status", {})
    why = next((text for flag, text in _UNHEALTHY if said.get(flag)), "")
    return EndpointHealth(address(host["address"]), not why, why)


def address(said: Mapping[str, Any]) -> str:
    """As ours are written."""
    if "pipe" in said:
        return f"unix:{said['pipe']['path']}"
    host, port = said["socket_address"]["address"], said["socket_address"]["port_value"]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


class Figures:
    """All that is counted, as it was when it was asked last."""

    def __init__(self, admin: Admin) -> None:
        self._admin = admin
        self._plain: dict[str, int] = {}
        self._histograms: dict[str, Sequence[Mapping[str, Any]]] = {}
        self._clusters: dict[str, Mapping[str, Any]] = {}
        self._since_ms = 0

    async def look(self) -> None:
        """Asks; raises Unavailable."""
        info = await self._admin.get("/server_info")
        up_s = float(str(info.get("uptime_current_epoch", "0s")).removesuffix("s"))
        since = int((time.time() - up_s) * 1000)
        if abs(since - self._since_ms) > 2_000:  # noqa: PLR2004 - it is told in whole seconds
            self._since_ms = since
        stats = await self._admin.get(f"/stats?format=json&histogram_buckets=disjoint&filter={_quoted(FILTER)}")
        self._plain = {one["name"]: one["value"] for one in stats["stats"] if "name" in one}
        histograms = [found for one in stats["stats"] for found in one.get("histograms", ())]
        self._histograms = {found["name"]: found["buckets"] for found in histograms}
        clusters = await self._admin.get("/clusters?format=json")
        self._clusters = {one["name"]: one for one in clusters.get("cluster_statuses", ())}

    def forget(self) -> None:
        """Envoy has ended, and so has what it had."""
        self._plain, self._histograms, self._clusters = {}, {}, {}

    def connections(self, upstream_id: str) -> int:
        """From apps."""
        return self._plain.get(f"listener.{upstream_id}.downstream_cx_active", 0)

    def health(self, upstream_id: str) -> Sequence[EndpointHealth]:
        """Of its endpoints."""
        return health(self._clusters.get(upstream_id, {}))

    def counts(self, spec: Spec) -> Counts:
        """Of one upstream."""
        name = spec.upstream_id
        found = Counts(self._since_ms, endpoints=dict(self._endpoints(name)))
        cluster = self._reader(f"cluster.{name}.")
        front = self._reader(f"{_front(spec)}.{name}.")
        found.active_connections = self.connections(name)
        found.received_bytes, found.sent_bytes = (
            front("downstream_cx_rx_bytes_total"),
            front("downstream_cx_tx_bytes_total"),
        )
        found.ejections = cluster("outlier_detection.ejections_enforced_total")
        found.overflows = sum(cluster(f"upstream_{what}_overflow") for what in ("rq_pending", "rq_active", "cx"))
        if spec.protocol is Protocol.TCP:
            found.requests = front("downstream_cx_total")
            found.errors = cluster("upstream_cx_connect_fail") + cluster("upstream_cx_none_healthy")
            found.timeouts = cluster("upstream_cx_connect_timeout")
            found.active_requests = found.active_connections
        else:
            found.requests, found.active_requests = front("downstream_rq_total"), front("downstream_rq_active")
            found.errors = {
                Protocol.HTTP: front("downstream_rq_5xx"),
                Protocol.GRPC: cluster("grpc.failure"),
                Protocol.REDIS: sum(one.errors for one in found.endpoints.values()),
            }[spec.protocol]
            found.retries, found.retries_denied = cluster("upstream_rq_retry"), cluster("upstream_rq_retry_overflow")
            found.timeouts = cluster("upstream_rq_timeout")
        limiter = f"{name}.http_local_rate_limit" if spec.protocol in HTTP_LIKE else f"local_rate_limit.{name}"
        found.rate_limited = self._plain.get(f"{limiter}.rate_limited", 0)
        self._add_latency(found, name, "cx_connect_ms" if spec.protocol is Protocol.TCP else "rq_time")
        return found

    def _reader(self, prefix: str) -> Any:
        return lambda key: int(self._plain.get(prefix + key, 0))

    def _endpoints(self, name: str) -> Iterable[tuple[str, EndpointCounts]]:
        for host in self._clusters.get(name, {}).get("host_statuses", ()):
            stats = {one["name"]: int(one.get("value", 0)) for one in host.get("stats", ())}
            known = _health(host)
            requests = stats.get("rq_total", 0) or stats.get("cx_total", 0)
            errors = stats.get("rq_error", 0) + stats.get("cx_connect_fail", 0)
            yield known.address, EndpointCounts(requests, errors, stats.get("cx_active", 0), known.healthy)

    def _add_latency(self, found: Counts, name: str, kind: str) -> None:
        """Envoy's are milliseconds, and their bounds are the same for all; of what is beyond the last it says nothing.

        Nor does it tell the sum: as many as are in a bucket are taken to be in the middle of it.
        """
        if not (buckets := self._histograms.get(f"cluster.{name}.upstream_{kind}")):
            return
        found.bounds_s = tuple(one["upper_bound"] / 1000 for one in buckets)
        counted = [int(one["cumulative"]) for one in buckets]  # its name for the total; ours are asked for disjoint
        found.buckets = [*counted, 0]
        lower = (0.0, *found.bounds_s)
        found.sum_s = sum(
            (low + high) / 2 * count for low, high, count in zip(lower, found.bounds_s, counted, strict=False)
        )


def _front(spec: Spec) -> str:
    """What Envoy calls the figures of the side of the app."""
    if spec.protocol in HTTP_LIKE:
        return "http"
    return "redis" if spec.protocol is Protocol.REDIS else "tcp"


def _quoted(pattern: str) -> str:
    from urllib.parse import quote  # noqa: PLC0415 - loads a lot, and is used seldom

    return quote(pattern, safe="")
