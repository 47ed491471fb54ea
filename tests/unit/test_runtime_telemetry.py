"""Claims about trace context, export by OTLP, and logs."""

from __future__ import annotations

import asyncio
import io
import json
import logging
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import grpc
import pytest
from opentelemetry.proto.collector.metrics.v1 import metrics_service_pb2, metrics_service_pb2_grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc
from support import echo
from support.echo import Echo
from support.serving import dial, running, settings

from retinue_server.runtime import logs, telemetry
from retinue_server.runtime.config import Log
from retinue_server.runtime.telemetry import TraceContext

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

TRACE = "0af7651916cd43dd8448eb211c80319c"
SAMPLED = f"00-{TRACE}-b7ad6b7169203331-01"
UNSAMPLED = f"00-{TRACE}-b7ad6b7169203331-00"


def test_a_traceparent_is_read_and_written() -> None:
    assert telemetry.parse(SAMPLED) == TraceContext(TRACE, "b7ad6b7169203331", sampled=True)
    assert telemetry.format(TraceContext(TRACE, "b7ad6b7169203331", sampled=False)) == UNSAMPLED
    assert telemetry.parse(f"cc-{TRACE}-b7ad6b7169203331-01-what-the-future-brings") is not None


@pytest.mark.parametrize(
    "text",
    [
        "",
        "x",
        f"ff-{TRACE}-b7ad6b7169203331-01",
        f"00-{'0' * 32}-b7ad6b7169203331-01",
        f"00-{TRACE}-{'0' * 16}-01",
        f"{SAMPLED}-more",
        SAMPLED.upper(),
        f"{SAMPLED}\n",
    ],
)
def test_a_malformed_traceparent_is_none(text: str) -> None:
    assert telemetry.parse(text) is None


def test_without_an_endpoint_a_span_passes_its_parent_on() -> None:
    tracer = telemetry.tracer()
    assert tracer.on is False
    with tracer.span("outer", SAMPLED) as span:
        span.set("k", "v")
        assert span.traceparent == telemetry.current() == SAMPLED
        with tracer.span("inner", links=[UNSAMPLED], attributes={"a": 1}, kind="client") as inner:
            assert inner.traceparent == SAMPLED
        with tracer.span("new", "") as new:
            assert new.traceparent == ""
    assert telemetry.current() == ""


class Collector(trace_service_pb2_grpc.TraceServiceServicer, metrics_service_pb2_grpc.MetricsServiceServicer):
    """Takes what is exported."""

    def __init__(self) -> None:
        self.spans: list[Any] = []
        self.services: set[str] = set()
        self.metrics: dict[str, Any] = {}

    def Export(self, request: Any, context: Any) -> Any:  # noqa: N802 - the RPC's name
        if isinstance(request, metrics_service_pb2.ExportMetricsServiceRequest):
            scopes = [scope for resource in request.resource_metrics for scope in resource.scope_metrics]
            self.metrics |= {metric.name: metric for scope in scopes for metric in scope.metrics}
            return metrics_service_pb2.ExportMetricsServiceResponse()
        for resource in request.resource_spans:
            attributes = {a.key: a.value.string_value for a in resource.resource.attributes}
            self.services.add(attributes["service.name"])
            self.spans += [span for scope in resource.scope_spans for span in scope.spans]
        return trace_service_pb2.ExportTraceServiceResponse()


@pytest.fixture
def collector(monkeypatch: pytest.MonkeyPatch) -> Iterator[Collector]:
    collector = Collector()
    with ThreadPoolExecutor(2) as pool:
        server = grpc.server(pool)
        add_traces: Any = trace_service_pb2_grpc.add_TraceServiceServicer_to_server
        add_traces(collector, server)
        add_metrics: Any = metrics_service_pb2_grpc.add_MetricsServiceServicer_to_server
        add_metrics(collector, server)
        port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{port}")
        monkeypatch.setenv("OTEL_SERVICE_NAME", "the-queue")
        yield collector
        server.stop(None).wait()


async def test_what_was_sampled_is_exported_before_the_process_ends(tmp_path: Path, collector: Collector) -> None:
    servicer = echo.EchoServicer()
    async with (
        running(settings(tmp_path), servicer) as process,
        dial(process.addresses["listen"][0]) as client,
    ):
        assert telemetry.tracer().on
        await client.Say(Echo(), metadata=(("traceparent", SAMPLED),))
        await client.Say(Echo(), metadata=(("traceparent", UNSAMPLED),))
        await client.Fail(Echo(text="lease"), metadata=(("traceparent", SAMPLED),)).code()
        await client.Repeat(Echo(), metadata=(("traceparent", "garbage"),)).code()
        with telemetry.tracer().span("work", "", links=[SAMPLED], kind="consumer") as work:
            context = telemetry.parse(work.traceparent)
    assert telemetry.tracer().on is False
    say, fail, repeat, own = collector.spans
    assert collector.services == {"the-queue"}
    assert (say.name, say.trace_id.hex(), say.parent_span_id.hex()) == (
        f"{echo.SERVICE}/Say", TRACE, "b7ad6b7169203331",
    )  # fmt: skip
    assert fail.status.code == 2
    assert {a.key: a.value.int_value for a in fail.attributes}["rpc.grpc.status_code"] == 9
    assert repeat.parent_span_id == b""
    assert context == TraceContext(own.trace_id.hex(), own.span_id.hex(), sampled=True)
    assert own.links[0].trace_id.hex() == TRACE
    points = collector.metrics["retinue_server_handled_total"].sum.data_points
    assert sum(p.as_int or p.as_double for p in points) == 4
    assert "retinue_server_handling_seconds_count" in collector.metrics


async def test_a_sampler_of_the_environment_holds(
    tmp_path: Path, collector: Collector, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_TRACES_SAMPLER", "always_off")
    monkeypatch.setenv("OTEL_METRICS_EXPORTER", "none")
    async with (
        running(settings(tmp_path), echo.EchoServicer()) as process,
        dial(process.addresses["listen"][0]) as client,
    ):
        await client.Say(Echo())
    assert collector.spans == []
    assert collector.metrics == {}


async def test_a_collector_that_is_away_holds_nothing_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:1")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "1")
    monkeypatch.setenv("OTEL_METRICS_EXPORTER", "none")
    async with asyncio.timeout(60):
        async with (
            running(settings(tmp_path), echo.EchoServicer()) as process,
            dial(process.addresses["listen"][0]) as client,
        ):
            assert (await client.Say(Echo(text="on"))).text == "on"


def render(formatter: logging.Formatter, log: Any) -> str:
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(formatter)
    handler.addFilter(logs.add_trace)
    logger = logging.Logger("a.b")  # noqa: LOG001 - of its own, beside the process's
    logger.addHandler(handler)
    log(logger)
    return stream.getvalue()


def test_a_json_line_has_the_trace_the_extras_and_the_traceback() -> None:
    def log(logger: logging.Logger) -> None:
        with telemetry.tracer().span("s", SAMPLED):
            logger.error("cannot %s", "go", extra={"queue": "q1"}, exc_info=ValueError("inner\ncause"))

    text = render(logs.JsonFormatter(), log)
    assert text.count("\n") == 1
    line = json.loads(text)
    assert line["level"] == "error"
    assert line["message"] == "cannot go"
    assert line["logger"] == "a.b"
    assert line["trace_id"] == TRACE
    assert line["span_id"] == "b7ad6b7169203331"
    assert line["queue"] == "q1"
    assert "ValueError: inner" in line["exception"]
    assert line["time"].endswith("Z")


def test_a_line_without_a_trace_names_none() -> None:
    line = json.loads(render(logs.JsonFormatter(), lambda logger: logger.info("x")))
    assert set(line) == {"time", "level", "logger", "message"}


def test_text_is_for_people() -> None:
    assert render(logs.TextFormatter(), lambda logger: logger.info("hello")).endswith("INFO    hello\n")


def test_auto_is_json_where_no_terminal_is(capsys: pytest.CaptureFixture[str]) -> None:
    root = logging.getLogger()
    before, level = root.handlers[:], root.level
    try:
        logs.setup(Log(level="debug"))
        logging.getLogger("z").debug("seen")
        assert json.loads(capsys.readouterr().err)["message"] == "seen"
        logs.setup(Log(format="text"))
        logging.getLogger("z").debug("not seen")
        logging.getLogger("z").info("plain")
        assert capsys.readouterr().err.endswith("plain\n")
    finally:
        logging.captureWarnings(capture=False)
        root.handlers[:], root.level = before, level
