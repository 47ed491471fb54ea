"""W3C trace context: passed on always, recorded only if asked for.

Without OpenTelemetry a context is a `traceparent` string in a context variable (at first that of the
environment, which `retinue work` sets for its commands). With `OTEL_EXPORTER_OTLP_ENDPOINT` set the SDK is
set up with the OTLP exporter, named by `OTEL_SERVICE_NAME`; an app that runs OpenTelemetry itself keeps its
own set-up.
"""

from __future__ import annotations

import os
import random
import re
import sys
import warnings
from contextvars import ContextVar
from typing import Any, NamedTuple

_PATTERN = re.compile(r"[0-9a-f]{2}-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})")
_NO_TRACE, _NO_SPAN = "0" * 32, "0" * 16
_current: ContextVar[_Work | None] = ContextVar("retinue_work", default=None)
_ENDPOINTS = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")


class SpanContext(NamedTuple):
    """Which span of which trace, in lower-case hexadecimal; `flags` 01 = sampled."""

    trace_id: str
    span_id: str
    flags: str = "01"

    def __str__(self) -> str:
        return f"00-{self.trace_id}-{self.span_id}-{self.flags}"


def parse(traceparent: str) -> SpanContext | None:
    """The context in a `traceparent`; None if it is not a valid one."""
    match = _PATTERN.match(traceparent)
    if not match or traceparent.startswith("ff") or match[1] == _NO_TRACE or match[2] == _NO_SPAN:
        return None
    return SpanContext(match[1], match[2], match[3])


def child_of(traceparent: str) -> SpanContext:
    """A new span in the same trace; in a new trace if there is none."""
    parent = parse(traceparent)
    if parent is None:
        return SpanContext(_random_id(128), _random_id(64))
    return parent._replace(span_id=_random_id(64))


def _random_id(bits: int) -> str:
    return f"{random.getrandbits(bits) or 1:0{bits // 4}x}"


def current() -> str:
    """The `traceparent` of the code that runs; empty if it runs in no trace."""
    if span := _otel_context():
        return str(span)
    if work := _current.get():
        return work.traceparent
    given = os.environ.get("TRACEPARENT")
    return str(parse(given) or "") if given else ""


def outgoing() -> str:
    """The `traceparent` for a task: the current one, or that of a new trace."""
    return current() or f"00-{(chance := _random_id(192))[:32]}-{chance[32:]}-01"


def _otel_context() -> SpanContext | None:
    api = sys.modules.get("opentelemetry.trace")
    if api is None:
        return None
    span = api.get_current_span().get_span_context()
    return (
        SpanContext(f"{span.trace_id:032x}", f"{span.span_id:016x}", f"{span.trace_flags:02x}")
        if span.is_valid
        else None
    )


class _Scope:
    """Runs its body in a place of a trace; gives the work, which knows the body's `traceparent`."""

    __slots__ = ("_token", "_work")

    def __init__(self, traceparent: str, span: Any) -> None:
        self._work = _Work(traceparent, span)

    def __enter__(self) -> _Work:
        if self._work.span is not None:
            self._work.span.__enter__()
        self._token = _current.set(self._work)
        return self._work

    def __exit__(self, *error: object) -> None:
        _current.reset(self._token)
        if self._work.span is not None:
            self._work.span.__exit__(*error)


class consuming(_Scope):  # noqa: N801 - a context manager, used like a function
    """Runs its body as the work on one task, a child of the producer's span."""

    __slots__ = ()

    def __init__(self, queue_id: str, task_id: str, traceparent: str) -> None:
        super().__init__(traceparent, _consumer_span(queue_id, task_id, traceparent) if _records() else None)


class answering(_Scope):  # noqa: N801 - the same
    """Runs its body as the answer to one call, a child of the caller's span. `method` is SERVICE/METHOD."""

    __slots__ = ()

    def __init__(self, method: str, traceparent: str, **attributes: str | int) -> None:
        super().__init__(traceparent, _server_span(method, traceparent, attributes) if _records() else None)


def _records() -> bool:
    return "opentelemetry.trace" in sys.modules


class _Work:
    """The work on one task or call. Its place in the trace is worked out when somebody asks: most handlers never do."""

    __slots__ = ("_context", "_parent", "span")

    def __init__(self, parent: str, span: Any) -> None:
        self._parent = parent
        self.span = span
        self._context = ""

    @property
    def traceparent(self) -> str:
        if not self._context:
            self._context = str(_otel_context() or child_of(self._parent))
        return self._context


def _consumer_span(queue_id: str, task_id: str, traceparent: str) -> Any:
    from opentelemetry import trace as api  # noqa: PLC0415 - only where it is loaded already

    producer = _remote_span(traceparent)
    return api.get_tracer("retinue").start_as_current_span(
        f"process {queue_id}",
        context=api.set_span_in_context(api.NonRecordingSpan(producer)) if producer else None,
        kind=api.SpanKind.CONSUMER,
        links=[api.Link(producer)] if producer else [],
        attributes={
            "messaging.system": "retinue",
            "messaging.operation.type": "process",
            "messaging.destination.name": queue_id,
            "messaging.message.id": task_id,
        },
    )


def _server_span(method: str, traceparent: str, attributes: dict[str, str | int]) -> Any:
    from opentelemetry import trace as api  # noqa: PLC0415 - only where it is loaded already

    caller = _remote_span(traceparent)
    return api.get_tracer("retinue").start_as_current_span(
        method,
        context=api.set_span_in_context(api.NonRecordingSpan(caller)) if caller else None,
        kind=api.SpanKind.SERVER,
        attributes={"rpc.system": "grpc", "rpc.method": method, **attributes},
    )


def _remote_span(traceparent: str) -> Any:
    from opentelemetry import trace as api  # noqa: PLC0415 - only where it is loaded already

    parsed = parse(traceparent)
    if parsed is None:
        return None
    flags = api.TraceFlags(int(parsed.flags, 16))
    return api.SpanContext(int(parsed.trace_id, 16), int(parsed.span_id, 16), is_remote=True, trace_flags=flags)


def configure() -> None:
    """Sets the SDK up if the environment names a collector and nobody did before. Safe to repeat."""
    if (
        not any(os.environ.get(name) for name in _ENDPOINTS)
        or os.environ.get("OTEL_SDK_DISABLED", "").lower() == "true"
    ):
        return
    try:
        _configure()
    except ImportError as error:
        warnings.warn(f"cannot export traces: {error}; pip install 'retinue[telemetry]'", stacklevel=2)


def _configure() -> None:
    # Costs 100 ms or more: only for those who asked for it.
    from opentelemetry import trace as api  # noqa: PLC0415

    if not isinstance(api.get_tracer_provider(), api.ProxyTracerProvider):
        return
    from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter  # noqa: PLC0415
    from opentelemetry.sdk.trace import TracerProvider  # noqa: PLC0415
    from opentelemetry.sdk.trace.export import BatchSpanProcessor  # noqa: PLC0415

    provider = TracerProvider()  # reads OTEL_SERVICE_NAME and OTEL_RESOURCE_ATTRIBUTES
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    api.set_tracer_provider(provider)
