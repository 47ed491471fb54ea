"""The one importer of the OpenTelemetry SDK: spans by its tracer, our counters as its instruments."""

from __future__ import annotations

import asyncio
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.grpc.metric_exporter import OTLPMetricExporter
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.metrics import Observation
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import (
    AggregationTemporality,
    DataT,
    Gauge,
    HistogramDataPoint,
    Metric,
    MetricExportResult,
    MetricsData,
    NumberDataPoint,
    PeriodicExportingMetricReader,
    ResourceMetrics,
    ScopeMetrics,
    Sum,
)
from opentelemetry.sdk.metrics.export import Histogram as OtlpHistogram
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.sdk.util.instrumentation import InstrumentationScope

from retinue_server.runtime import telemetry
from retinue_server.runtime.metrics import Histogram
from retinue_server.runtime.telemetry import SAMPLED, TraceContext

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence
    from contextvars import Token

    from retinue_server.runtime.metrics import Family, Metrics, Sample
    from retinue_server.runtime.metrics import Resource as OtherResource

_FLUSH_MS = 3000
_READ_S = 2.0
_SCOPE = "retinue_server"
_BATCH = 2000
"""Points in one message: collectors take 4 MiB unless they are told otherwise."""


class RecordedSpan:
    """A `telemetry.Span` of the SDK."""

    def __init__(self, span: trace.Span) -> None:
        context = span.get_span_context()
        sampled = bool(context.trace_flags & SAMPLED)
        ids = f"{context.trace_id:032x}", f"{context.span_id:016x}"
        self._span = span
        self.traceparent = telemetry.format(TraceContext(*ids, sampled))

    def set(self, key: str, value: str | float) -> None:
        """Adds an attribute."""
        self._span.set_attribute(key, value)

    def end(self, end_ns: int | None = None, error: str = "") -> None:
        """As `telemetry.Span` says."""
        if error:
            self._span.set_attribute("error.type", error)
            self._span.set_status(trace.StatusCode.ERROR)
        self._span.end(end_ns)

    def __enter__(self) -> Self:
        self._token: Token[str] = telemetry.enter(self.traceparent)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        telemetry.leave(self._token)
        if isinstance(error, Exception):
            self._span.set_attribute("error.type", type(error).__qualname__)
            self._span.set_status(trace.StatusCode.ERROR, str(error))
        self._span.end()


class RecordingTracer:
    """A `telemetry.Tracer` of the SDK."""

    on = True

    def __init__(self, tracer: trace.Tracer) -> None:
        self._tracer = tracer

    def span(
        self,
        name: str,
        parent: str | None = None,
        *,
        links: Sequence[str] = (),
        attributes: Mapping[str, str | int] | None = None,
        kind: telemetry.Kind = "internal",
        start_ns: int | None = None,
    ) -> telemetry.Span:
        """As `telemetry.Tracer` says."""
        text = telemetry.valid(parent)
        context = telemetry.parse(text)
        if context is not None and not context.sampled:
            return telemetry.Unrecorded(text)
        span = self._tracer.start_span(
            name,
            context=Context() if context is None else trace.set_span_in_context(_remote(context), Context()),
            kind=trace.SpanKind[kind.upper()],
            links=[trace.Link(_remote(c).get_span_context()) for c in map(telemetry.parse, links) if c],
            attributes=attributes,
            start_time=start_ns,
        )
        return RecordedSpan(span)


def _remote(context: TraceContext) -> trace.Span:
    flags = trace.TraceFlags(SAMPLED if context.sampled else 0)
    ids = int(context.trace_id, 16), int(context.span_id, 16)
    return trace.NonRecordingSpan(trace.SpanContext(*ids, is_remote=True, trace_flags=flags))


class Exporter:
    """Sends traces and metrics to the endpoint of the environment, as its standard variables say."""

    def __init__(self, environment: Mapping[str, str], metrics: Metrics, loop: asyncio.AbstractEventLoop) -> None:
        name = environment.get("OTEL_SERVICE_NAME", "retinue-server")
        resource = Resource.create({"service.name": name})
        self._closers: list[Callable[[], object]] = []
        self.tracer: telemetry.Tracer = telemetry.Off()
        if environment.get("OTEL_TRACES_EXPORTER", "otlp") == "otlp":
            self._trace(resource)
        if environment.get("OTEL_METRICS_EXPORTER", "otlp") == "otlp":
            self._meter(resource, metrics, loop)

    def close(self) -> None:
        """Sends what is left; blocks for seconds at most."""
        for closer in self._closers:
            closer()

    def _trace(self, resource: Resource) -> None:
        provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
        self._closers += [lambda: provider.force_flush(_FLUSH_MS), provider.shutdown]
        self.tracer = RecordingTracer(provider.get_tracer(_SCOPE))

    def _meter(self, resource: Resource, metrics: Metrics, loop: asyncio.AbstractEventLoop) -> None:
        exporter = _WithOthers(metrics, loop) if metrics.has_others else OTLPMetricExporter()
        reader = PeriodicExportingMetricReader(exporter)
        provider = MeterProvider([reader], resource=resource, shutdown_on_exit=False)
        self._closers.append(lambda: provider.shutdown(_FLUSH_MS))
        meter = provider.get_meter(_SCOPE)
        for family in metrics.families():
            _observe(meter, family, _FamilyReader(metrics, family.name, loop))


class _WithOthers(OTLPMetricExporter):
    """Sends what patterns know of others with what this process counts: the SDK's instruments cannot say whose a value
    is, nor since when it counts."""

    def __init__(self, metrics: Metrics, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__(max_export_batch_size=_BATCH)
        self._patterns, self._patterns_loop = metrics, loop

    def export(self, metrics_data: MetricsData, timeout_millis: float = 10_000, **kwargs: Any) -> MetricExportResult:
        """As the SDK's."""
        others = asyncio.run_coroutine_threadsafe(self._read_others(), self._patterns_loop).result(_READ_S)
        both = MetricsData([*metrics_data.resource_metrics, *map(_resource_metrics, others)])
        return super().export(both, timeout_millis, **kwargs)

    async def _read_others(self) -> list[OtherResource]:
        found = []
        for one in self._patterns.resources():
            found.append(one)
            await asyncio.sleep(0)  # others' turn
        return found


def _resource_metrics(one: OtherResource) -> ResourceMetrics:
    made = [Metric(f.name, f.help, f.unit, _data(f, one.time_ns)) for f in one.families]
    scope = ScopeMetrics(InstrumentationScope(_SCOPE), made, "")
    return ResourceMetrics(Resource(dict(one.attributes)), [scope], "")


def _data(family: Family, time_ns: int) -> DataT:
    if family.type == "histogram":
        return OtlpHistogram([_histogram_point(s, time_ns) for s in family.samples], AggregationTemporality.CUMULATIVE)
    points = [
        NumberDataPoint(dict(s.labels), s.start_ns, time_ns, s.value)
        for s in family.samples
        if not isinstance(s.value, Histogram)
    ]
    if family.type == "gauge":
        return Gauge(points)
    return Sum(points, AggregationTemporality.CUMULATIVE, is_monotonic=True)


def _histogram_point(sample: Sample, time_ns: int) -> HistogramDataPoint:
    value = sample.value
    assert isinstance(value, Histogram)
    upto = [count for _, count in value.buckets]
    counts = [count - below for below, count in zip([0, *upto], upto, strict=False)]
    bounds = [bound for bound, _ in value.buckets[:-1]]
    return HistogramDataPoint(
        dict(sample.labels), sample.start_ns, time_ns, upto[-1], value.total, counts, bounds, math.nan, math.nan
    )


@dataclass(frozen=True, slots=True)
class _FamilyReader:
    """Reads one family on the event loop, for the exporter's thread."""

    metrics: Metrics
    name: str
    loop: asyncio.AbstractEventLoop

    def plain(self, _: object) -> Iterable[Observation]:
        """Counters and gauges."""
        samples = self._samples()
        return [Observation(s.value, s.labels) for s in samples if not isinstance(s.value, Histogram)]

    def count(self, _: object) -> Iterable[Observation]:
        """How many observations a histogram has."""
        samples = self._samples()
        return [Observation(s.value.buckets[-1][1], s.labels) for s in samples if isinstance(s.value, Histogram)]

    def sum(self, _: object) -> Iterable[Observation]:
        """The sum of a histogram's observations."""
        samples = self._samples()
        return [Observation(s.value.total, s.labels) for s in samples if isinstance(s.value, Histogram)]

    def _samples(self) -> list[Sample]:
        return asyncio.run_coroutine_threadsafe(self._read(), self.loop).result(_READ_S)

    async def _read(self) -> list[Sample]:
        found = [family for family in self.metrics.families() if family.name == self.name]
        return [sample for family in found for sample in family.samples]


def _observe(meter: Any, family: Family, reader: _FamilyReader) -> None:
    """Observable instruments of a family; a histogram's are its count and its sum."""
    if family.type == "gauge":
        meter.create_observable_gauge(family.name, [reader.plain], description=family.help)
    elif family.type == "counter":
        meter.create_observable_counter(family.name, [reader.plain], description=family.help)
    else:
        meter.create_observable_counter(f"{family.name}_count", [reader.count], description=family.help)
        meter.create_observable_counter(f"{family.name}_sum", [reader.sum], description=family.help)
