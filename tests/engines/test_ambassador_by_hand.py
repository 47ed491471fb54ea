"""An Envoy that is told by us has all that one has whose file somebody wrote, and nothing more."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import yaml
from support.postgres import free_port
from support.upstreams import assignment, envoy_or_skip, spec

from retinue_server.ambassador.config import EnvoySettings
from retinue_server.ambassador.core.spec import (
    Balancer,
    CircuitBreaker,
    Endpoint,
    Fault,
    HealthCheck,
    Listen,
    LoadBalancing,
    Mirror,
    OutlierDetection,
    Protocol,
    RateLimit,
    Retry,
    RetryCondition,
    Spec,
    Split,
    Timeouts,
)
from retinue_server.ambassador.engine import Assignment
from retinue_server.ambassador.engines.envoy.admin import Admin
from retinue_server.ambassador.engines.envoy.plane import make
from retinue_server.runtime.errors import Unavailable

pytestmark = pytest.mark.timeout(120)

HTTP = """\
static_resources:
  listeners:
    - name: it
      stat_prefix: it
      address: {socket_address: {address: 127.0.0.1, port_value: PORT}}
      enable_reuse_port: false
      traffic_direction: OUTBOUND
      filter_chains:
        - filters:
            - name: envoy.filters.network.http_connection_manager
              typed_config:
                "@type": TYPE/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager
                stat_prefix: it
                stream_idle_timeout: 0s
                server_header_transformation: PASS_THROUGH
                skip_xff_append: true
                generate_request_id: false
                upgrade_configs: [{upgrade_type: websocket}]
                http2_protocol_options: {max_concurrent_streams: 1024}
                http_filters:
                  - name: envoy.filters.http.local_ratelimit
                    typed_config:
                      "@type": TYPE/envoy.extensions.filters.http.local_ratelimit.v3.LocalRateLimit
                      stat_prefix: rate_limit
                  - name: envoy.filters.http.fault
                    typed_config: {"@type": TYPE/envoy.extensions.filters.http.fault.v3.HTTPFault}
                  - name: envoy.filters.http.router
                    typed_config: {"@type": TYPE/envoy.extensions.filters.http.router.v3.Router}
                route_config:
                  name: it
                  virtual_hosts:
                    - name: it
                      domains: ["*"]
                      typed_per_filter_config:
                        envoy.filters.http.local_ratelimit:
                          "@type": TYPE/envoy.extensions.filters.http.local_ratelimit.v3.LocalRateLimit
                          stat_prefix: it
                          token_bucket: {max_tokens: 20, tokens_per_fill: 10, fill_interval: 1s}
                          filter_enabled: {default_value: {numerator: 1000000, denominator: MILLION}}
                          filter_enforced: {default_value: {numerator: 1000000, denominator: MILLION}}
                        envoy.filters.http.fault:
                          "@type": TYPE/envoy.extensions.filters.http.fault.v3.HTTPFault
                          delay: {fixed_delay: 0.2s, percentage: {numerator: 50000, denominator: MILLION}}
                          abort: {http_status: 503, percentage: {numerator: 10000, denominator: MILLION}}
                      routes:
                        - match: {prefix: /, headers: [{name: x-canary, string_match: {exact: "yes"}}]}
                          route:
                            cluster: other
                            <<: &policies
                              timeout: 3s
                              hedge_policy: {hedge_on_per_try_timeout: true}
                              hash_policy: [{header: {header_name: x-user}}]
                              request_mirror_policies:
                                - cluster: other
                                  runtime_fraction: {default_value: {numerator: 250000, denominator: MILLION}}
                              retry_policy:
                                retry_on: 5xx,reset
                                num_retries: 2
                                per_try_timeout: 0.5s
                                retry_back_off: {base_interval: 0.025s, max_interval: 0.250s}
                                host_selection_retry_max_attempts: 5
                                retry_host_predicate:
                                  - name: envoy.retry_host_predicates.previous_hosts
                                    typed_config:
                                      "@type": TYPE/envoy.extensions.retry.host.previous_hosts.v3.PreviousHostsPredicate
                        - match: {prefix: /}
                          route:
                            weighted_clusters: {clusters: [{name: it, weight: 900000}, {name: other, weight: 100000}]}
                            <<: *policies
  clusters:
    - name: it
      connect_timeout: 2s
      lb_policy: RING_HASH
      common_lb_config: {update_merge_window: 0s, healthy_panic_threshold: {value: 0}}
      ignore_health_on_host_removal: true
      circuit_breakers:
        thresholds:
          - max_connections: 100
            max_pending_requests: 10
            max_requests: 200
            retry_budget: {budget_percent: {value: 25}, min_retry_concurrency: 5}
            track_remaining: true
      outlier_detection:
        consecutive_5xx: 4
        consecutive_gateway_failure: 4
        enforcing_consecutive_gateway_failure: 0
        enforcing_success_rate: 0
        interval: 2s
        base_ejection_time: 6s
        max_ejection_time: 300s
        max_ejection_percent: 40
        always_eject_one_host: true
      health_checks:
        - interval: 5s
          no_traffic_interval: 5s
          timeout: 1s
          unhealthy_threshold: 3
          healthy_threshold: 1
          http_health_check: {path: /healthz}
      typed_extension_protocol_options:
        envoy.extensions.upstreams.http.v3.HttpProtocolOptions:
          "@type": TYPE/envoy.extensions.upstreams.http.v3.HttpProtocolOptions
          explicit_http_config: {http_protocol_options: {}}
          common_http_protocol_options: {idle_timeout: 60s}
      load_assignment:
        cluster_name: it
        endpoints:
          - lb_endpoints:
              - endpoint: {address: {socket_address: {address: 127.0.0.1, port_value: 9}}}
                load_balancing_weight: 3
              - endpoint: {address: {pipe: {path: /nowhere.sock}}}
                load_balancing_weight: 1
"""

OTHER = {"name": "other", "load_assignment": {"cluster_name": "other"}}

REDIS = """\
static_resources:
  listeners:
    - name: it
      stat_prefix: it
      address: {socket_address: {address: 127.0.0.1, port_value: PORT}}
      enable_reuse_port: false
      traffic_direction: OUTBOUND
      filter_chains:
        - filters:
            - name: envoy.filters.network.redis_proxy
              typed_config:
                "@type": TYPE/envoy.extensions.filters.network.redis_proxy.v3.RedisProxy
                stat_prefix: it
                settings: {op_timeout: 0.2s, enable_hashtagging: true}
                prefix_routes: {catch_all_route: {cluster: it}}
  clusters:
    - name: it
      connect_timeout: 5s
      lb_policy: MAGLEV
      common_lb_config: {update_merge_window: 0s, healthy_panic_threshold: {value: 0}}
      ignore_health_on_host_removal: true
      circuit_breakers:
        thresholds:
          - max_connections: 1024
            max_pending_requests: 1024
            max_requests: 1024
            retry_budget: {budget_percent: {value: 20}, min_retry_concurrency: 3}
            track_remaining: true
      load_assignment:
        cluster_name: it
        endpoints:
          - lb_endpoints:
              - endpoint: {address: {socket_address: {address: 127.0.0.1, port_value: 9}}}
                load_balancing_weight: 1
                metadata: {filter_metadata: {envoy.lb: {hash_key: shard-a}}}
"""

TCP = """\
static_resources:
  listeners:
    - name: it
      stat_prefix: it
      address: {pipe: {path: SOCKET, mode: 384}}
      enable_reuse_port: false
      traffic_direction: OUTBOUND
      filter_chains:
        - filters:
            - name: envoy.filters.network.local_ratelimit
              typed_config:
                "@type": TYPE/envoy.extensions.filters.network.local_ratelimit.v3.LocalRateLimit
                stat_prefix: it
                token_bucket: {max_tokens: 5, tokens_per_fill: 5, fill_interval: 60s}
            - name: envoy.filters.network.tcp_proxy
              typed_config:
                "@type": TYPE/envoy.extensions.filters.network.tcp_proxy.v3.TcpProxy
                stat_prefix: it
                cluster: it
                idle_timeout: 3600s
  clusters:
    - name: it
      connect_timeout: 5s
      lb_policy: LEAST_REQUEST
      common_lb_config: {update_merge_window: 0s, healthy_panic_threshold: {value: 0}}
      ignore_health_on_host_removal: true
      circuit_breakers:
        thresholds:
          - max_connections: 1024
            max_pending_requests: 1024
            max_requests: 1024
            retry_budget: {budget_percent: {value: 20}, min_retry_concurrency: 3}
            track_remaining: true
      load_assignment:
        cluster_name: it
        endpoints:
          - lb_endpoints:
              - endpoint: {address: {socket_address: {address: 127.0.0.1, port_value: 9}}}
                load_balancing_weight: 1
"""


WRITTEN: dict[Protocol, tuple[str, dict[str, Any], tuple[Endpoint, ...]]] = {
    Protocol.HTTP: (
        HTTP,
        {
            "load_balancing": LoadBalancing(Balancer.RING_HASH, header="x-user"),
            "timeouts": Timeouts(connect_s=2.0, request_s=3.0, per_try_s=0.5, idle_s=60.0),
            "retry": Retry(
                (RetryCondition.SERVER_ERROR, RetryCondition.RESET), 2, budget_percent=25.0, budget_min_concurrency=5
            ),
            "circuit_breaker": CircuitBreaker(100, 10, 200),
            "outlier_detection": OutlierDetection(4, 2.0, 6.0, 40),
            "health_check": HealthCheck(path="/healthz"),
            "splits": (Split("other", 10.0), Split("other", header_name="x-canary", header_value="yes")),
            "mirror": Mirror("other", 25.0),
            "rate_limit": RateLimit(10, 1.0, 20),
            "fault": Fault(0.2, 5.0, 503, 1.0),
            "hedge": True,
        },
        (Endpoint("127.0.0.1:9", 3), Endpoint("unix:/nowhere.sock")),
    ),
    Protocol.REDIS: (REDIS, {"timeouts": Timeouts(request_s=0.2)}, (Endpoint("127.0.0.1:9", shard_name="shard-a"),)),
    Protocol.TCP: (
        TCP,
        {
            "load_balancing": LoadBalancing(Balancer.LEAST_REQUEST),
            "timeouts": Timeouts(idle_s=3600.0),
            "rate_limit": RateLimit(5, 60.0, 5),
        },
        (Endpoint("127.0.0.1:9"),),
    ),
}
"""Each policy once: the file, what is declared, and who serves."""


@pytest.mark.parametrize("protocol", WRITTEN, ids=lambda protocol: protocol.name)
async def test_ours_has_what_the_file_has(protocol: Protocol, tmp_path: Path) -> None:
    file, policy, endpoints = WRITTEN[protocol]
    wanted = spec(protocol, **policy)
    if protocol is Protocol.TCP:
        wanted = msgspec.structs.replace(wanted, listen=Listen(path=str(tmp_path / "it.sock"), mode=0o600))
    async with told(wanted, endpoints, tmp_path / "ours") as ours, written(file, tmp_path / "theirs") as theirs:
        had = await configured(ours)
        assert had == await configured(theirs)
    kinds = {"cluster", "endpoint_config", "listener"} | ({"route_config"} if protocol is Protocol.HTTP else set())
    assert had.keys() == kinds


@contextlib.asynccontextmanager
async def told(wanted: Spec, endpoints: tuple[Endpoint, ...], where: Path) -> AsyncIterator[Admin]:
    """An Envoy of ours."""
    plane = make(EnvoySettings(path=envoy_or_skip()), where)
    assert plane is not None
    await plane.start()
    try:
        await plane.put(assignment(spec(Protocol.HTTP, "other")))
        await plane.put(Assignment(wanted, endpoints, 1))
        yield plane._admin
    finally:
        await plane.stop()


@contextlib.asynccontextmanager
async def written(file: str, where: Path) -> AsyncIterator[Admin]:
    """An Envoy with a file; its admin is a socket, as ours is. It has the upstream that others are split to, too."""
    where.mkdir()
    said = file.replace("TYPE/", "type.googleapis.com/").replace("PORT", str(free_port()))
    config = yaml.safe_load(said.replace("SOCKET", str(where / "it.sock")))
    config["static_resources"]["clusters"].append(OTHER)
    config["admin"] = {"address": {"pipe": {"path": str(where / "admin.sock")}}}
    (where / "envoy.json").write_text(json.dumps(config))
    command = [str(envoy_or_skip()), "-c", str(where / "envoy.json"), "--disable-hot-restart", "--concurrency", "1"]
    process = await asyncio.create_subprocess_exec(*command, stderr=asyncio.subprocess.DEVNULL)
    try:
        admin = Admin(where / "admin.sock")
        async with asyncio.timeout(60):
            while not await serves(admin):
                assert process.returncode is None, "Envoy does not take the file"
                await asyncio.sleep(0.02)
        yield admin
    finally:
        process.kill()
        await process.wait()


async def serves(admin: Admin) -> bool:
    with contextlib.suppress(Unavailable):
        return bool((await admin.get("/server_info"))["state"] == "LIVE")
    return False


async def configured(admin: Admin) -> dict[str, Any]:
    """What Envoy says it has of upstream `it`, by kind: without whence it came and where it listens."""
    said = (await admin.get("/config_dump?include_eds"))["configs"]
    entries = [
        entry
        for section in said
        for key in section
        if key.startswith(("static_", "dynamic_"))
        for entry in section[key]
    ]
    found = {
        kind: one
        for entry in entries
        for kind, one in resources(entry)
        if "it" in (one.get("name"), one.get("cluster_name"))
    }
    for whence in ("type", "eds_cluster_config", "load_assignment"):
        found["cluster"].pop(whence, None)
    found["listener"].pop("address")
    for chain in found["listener"]["filter_chains"]:
        for one in chain["filters"]:
            for whence in ("rds", "route_config"):
                one["typed_config"].pop(whence, None)
    for locality in found["endpoint_config"]["endpoints"]:
        for one in locality["lb_endpoints"]:
            one.pop("health_status")  # what it has found out, not what it was told
    return found


def resources(entry: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """What an entry of the dump has."""
    for kind in ("cluster", "endpoint_config", "listener", "route_config"):
        if (said := entry.get("active_state", entry).get(kind)) is not None:
            yield kind, said
