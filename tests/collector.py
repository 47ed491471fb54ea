"""A real OTLP gRPC endpoint that remembers the spans and metrics it gets."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import grpc
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceResponse
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2_grpc import (
    MetricsServiceServicer,
    add_MetricsServiceServicer_to_server,
)
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceResponse
from opentelemetry.proto.collector.trace.v1.trace_service_pb2_grpc import (
    TraceServiceServicer,
    add_TraceServiceServicer_to_server,
)


class Metrics(MetricsServiceServicer):
    """Metrics by the name of the service whose they are."""

    def __init__(self) -> None:
        self.found: dict[str, dict[str, Any]] = {}
        """The latest of each, by its name."""
        self.resources: dict[str, dict[str, str]] = {}

    def Export(self, request: Any, context: Any) -> Any:  # noqa: N802 - the contract's name
        for resource in request.resource_metrics:
            attributes = {pair.key: pair.value.string_value for pair in resource.resource.attributes}
            name = attributes["service.name"]
            self.resources[name] = attributes
            for scope in resource.scope_metrics:
                self.found.setdefault(name, {}).update((metric.name, metric) for metric in scope.metrics)
        return ExportMetricsServiceResponse()


class Collector(TraceServiceServicer):
    """Spans with the names of the services that sent them."""

    def __init__(self) -> None:
        self.spans: list[tuple[str, Any]] = []
        self.metrics = Metrics()

    def Export(self, request: Any, context: Any) -> Any:  # noqa: N802 - the contract's name
        for resource in request.resource_spans:
            names = [pair.value.string_value for pair in resource.resource.attributes if pair.key == "service.name"]
            self.spans += [(names[0], span) for scope in resource.scope_spans for span in scope.spans]
        return ExportTraceServiceResponse()


@contextmanager
def collecting() -> Iterator[tuple[Collector, str]]:
    """A collector that listens, and its address as OTEL_EXPORTER_OTLP_ENDPOINT takes it."""
    found, running = Collector(), grpc.server(ThreadPoolExecutor(2))
    add_TraceServiceServicer_to_server(found, running)  # type: ignore[no-untyped-call] # generated without types
    add_MetricsServiceServicer_to_server(found.metrics, running)  # type: ignore[no-untyped-call] # as above
    port = running.add_insecure_port("127.0.0.1:0")
    running.start()
    try:
        yield found, f"http://127.0.0.1:{port}"
    finally:
        running.stop(0).wait()
