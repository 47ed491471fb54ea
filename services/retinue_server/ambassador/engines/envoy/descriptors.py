"""Writes descriptors.binpb.xz: the descriptors of Envoy's messages that are used here, and of what they need.

Run by clients/generate.sh in an environment of its own, since xds-protos, whose modules it reads, breaks the exporter
of OpenTelemetry in ours. The descriptors are Envoy's (Apache-2.0); see NOTICE.
"""

from __future__ import annotations

import importlib
import lzma
import sys
from pathlib import Path
from typing import Any

from google.protobuf import descriptor_pb2

MODULES = (
    "envoy.config.bootstrap.v3.bootstrap_pb2",
    "envoy.service.discovery.v3.ads_pb2",
    "envoy.config.listener.v3.listener_pb2",
    "envoy.config.cluster.v3.cluster_pb2",
    "envoy.config.endpoint.v3.endpoint_pb2",
    "envoy.config.route.v3.route_pb2",
    "envoy.config.trace.v3.opentelemetry_pb2",
    "envoy.extensions.request_id.uuid.v3.uuid_pb2",
    "envoy.extensions.tracers.opentelemetry.samplers.v3.parent_based_sampler_pb2",
    "envoy.extensions.tracers.opentelemetry.samplers.v3.trace_id_ratio_based_sampler_pb2",
    "envoy.extensions.transport_sockets.tls.v3.secret_pb2",
    "envoy.extensions.transport_sockets.tls.v3.tls_pb2",
    "envoy.extensions.filters.network.http_connection_manager.v3.http_connection_manager_pb2",
    "envoy.extensions.filters.network.tcp_proxy.v3.tcp_proxy_pb2",
    "envoy.extensions.filters.network.redis_proxy.v3.redis_proxy_pb2",
    "envoy.extensions.filters.network.local_ratelimit.v3.local_rate_limit_pb2",
    "envoy.extensions.filters.http.local_ratelimit.v3.local_rate_limit_pb2",
    "envoy.extensions.filters.http.fault.v3.fault_pb2",
    "envoy.extensions.filters.http.grpc_stats.v3.config_pb2",
    "envoy.extensions.filters.http.router.v3.router_pb2",
    "envoy.extensions.upstreams.http.v3.http_protocol_options_pb2",
    "envoy.extensions.retry.host.previous_hosts.v3.previous_hosts_pb2",
    "envoy.extensions.health_checkers.redis.v3.redis_pb2",
)


def collect(file: Any, found: dict[str, descriptor_pb2.FileDescriptorProto]) -> None:
    """A file after those that it needs, without comments."""
    if file.name in found:
        return
    for needed in file.dependencies:
        collect(needed, found)
    said = descriptor_pb2.FileDescriptorProto()
    file.CopyToProto(said)
    said.ClearField("source_code_info")
    found[file.name] = said


def main(target: Path) -> None:
    """Writes the file."""
    found: dict[str, descriptor_pb2.FileDescriptorProto] = {}
    for name in MODULES:
        collect(importlib.import_module(name).DESCRIPTOR, found)
    files = descriptor_pb2.FileDescriptorSet(file=found.values())
    target.write_bytes(lzma.compress(files.SerializeToString(deterministic=True), preset=9))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
