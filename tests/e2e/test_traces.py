"""One trace from the producer over two stages of runners to the last result, as a real OTLP endpoint receives it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

from collector import Collector, collecting
from opentelemetry.proto.trace.v1.trace_pb2 import Span
from servers import environment, start_server

PRODUCER = """
import sys
from opentelemetry import trace as otel
from retinue.client import trace
from retinue.client.sync import Queue

trace.configure()
with otel.get_tracer("shop").start_as_current_span("order", kind=otel.SpanKind.PRODUCER):
    with Queue("upper", address=sys.argv[1]) as queue:
        queue.enqueue("hello")
otel.get_tracer_provider().shutdown()
"""


def run(tmp_path: Path, endpoint: str) -> None:
    """A producer, then a runner a stage, all with the same collector; each ends before the next."""
    env = {"OTEL_EXPORTER_OTLP_ENDPOINT": endpoint}
    server = start_server(tmp_path, env={**env, "OTEL_SERVICE_NAME": "retinue-server"})
    try:
        python = [sys.executable, "-c", PRODUCER, server.address]
        work = [sys.executable, "-m", "retinue.cli", "work", "--address", server.address, "--exit-when-empty"]
        steps = {
            "shop": python,
            "upper": [*work, "--then", "reverse", "upper", "--", "tr", "a-z", "A-Z"],
            "reverse": [*work, "reverse", "--", "tac"],
        }
        for name, command in steps.items():
            where = environment(**env, OTEL_SERVICE_NAME=name)
            subprocess.run(command, env=where, cwd=tmp_path, check=True, timeout=240, capture_output=True)
    finally:
        assert server.stop() == 0


def named(collector: Collector, service: str, kind: Any) -> list[Any]:
    return [span for name, span in collector.spans if name == service and span.kind == kind]


def test_one_connected_trace_from_the_producer_to_the_last_stage(tmp_path: Path) -> None:
    with collecting() as (collector, endpoint):
        run(tmp_path, endpoint)
    [root] = named(collector, "shop", Span.SPAN_KIND_PRODUCER)
    [first] = named(collector, "upper", Span.SPAN_KIND_CONSUMER)
    [last] = named(collector, "reverse", Span.SPAN_KIND_CONSUMER)
    trace = [(service, span) for service, span in collector.spans if span.trace_id == root.trace_id]
    assert {service for service, _ in trace} == {"shop", "retinue-server", "upper", "reverse"}
    parents = {span.span_id: span.parent_span_id for _, span in trace}
    loose = [span.name for _, span in trace if span is not root and span.parent_span_id not in parents]
    assert loose == [], "every span but the root has its parent here"
    assert root.span_id in ancestors(first, parents)
    assert first.span_id in ancestors(last, parents)


def ancestors(span: Any, parents: dict[bytes, bytes]) -> list[bytes]:
    """Up to the root."""
    found: list[bytes] = []
    at = span.parent_span_id
    while at:
        found.append(at)
        at = parents.get(at, b"")
    return found
