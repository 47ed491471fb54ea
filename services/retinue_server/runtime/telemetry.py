"""Traces and metrics by OTLP, when `OTEL_EXPORTER_OTLP_ENDPOINT` is set; otherwise OpenTelemetry never loads.

The SDK is imported by `telemetry_sdk.py` alone, and that by `Telemetry.start`. Context goes by W3C
`traceparent` strings, which patterns store and forward as they are; a span opens only when its parent was
sampled, or when there is no parent and the sampler says so.
"""

from __future__ import annotations

import asyncio
import logging
import re
import threading
from contextlib import suppress
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, Literal, Protocol, Self

import msgspec

from retinue_server.runtime.addresses import StartError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from contextvars import Token

    from retinue_server.runtime.metrics import Metrics
    from retinue_server.runtime.telemetry_sdk import Exporter

log = logging.getLogger(__name__)

ENDPOINT = "OTEL_EXPORTER_OTLP_ENDPOINT"
Kind = Literal["internal", "server", "client", "producer", "consumer"]

_TRACEPARENT = re.compile(r"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?")
SAMPLED = 0x01
"""The flag of a traceparent."""
_FLUSH_S = 4.0
_current: ContextVar[str] = ContextVar("traceparent", default="")


class TraceContext(msgspec.Struct, frozen=True):
    """What a traceparent says."""

    trace_id: str
    """32 hexadecimal digits."""
    span_id: str
    """16 hexadecimal digits."""
    sampled: bool


def parse(traceparent: str) -> TraceContext | None:
    """None for what is no valid traceparent, as W3C Trace Context level 1 has it."""
    match = _TRACEPARENT.fullmatch(traceparent)
    if match is None:
        return None
    version, trace_id, span_id, flags, rest = match.groups()
    if version == "ff" or (version == "00" and rest) or not int(trace_id, 16) or not int(span_id, 16):
        return None
    return TraceContext(trace_id, span_id, bool(int(flags, 16) & SAMPLED))


def format(context: TraceContext) -> str:  # noqa: A001 - telemetry.format, beside telemetry.parse
    """The traceparent of a context."""
    return f"00-{context.trace_id}-{context.span_id}-{'01' if context.sampled else '00'}"


def current() -> str:
    """The traceparent of what runs now; empty without one."""
    return _current.get()


def enter(traceparent: str) -> Token[str]:
    """Makes a traceparent the current one, until `leave`."""
    return _current.set(traceparent)


def leave(token: Token[str]) -> None:
    """Undoes `enter`."""
    _current.reset(token)


class Span(Protocol):
    """What `span` yields."""

    traceparent: str
    """Give it to whatever this work causes; empty when there is no trace."""

    def set(self, key: str, value: str | float) -> None:
        """Adds an attribute."""

    def end(self, end_ns: int | None = None, error: str = "") -> None:
        """Ends a span that was not entered, now or at that time since the epoch; `error` says what failed."""

    def __enter__(self) -> Self: ...
    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: object) -> None: ...


class Tracer(Protocol):
    """Opens spans."""

    on: bool
    """False when no span is ever recorded."""

    def span(
        self,
        name: str,
        parent: str | None = None,
        *,
        links: Sequence[str] = (),
        attributes: Mapping[str, str | int] | None = None,
        kind: Kind = "internal",
        start_ns: int | None = None,
    ) -> Span:
        """A context manager; within it `current` is the span's traceparent.

        `parent` is a traceparent; None takes `current`, "" starts a trace. Nothing is recorded when tracing
        is off or the parent is not sampled; the parent's traceparent then passes on unchanged. A span that is
        not entered ends by `end`; with `start_ns` it began at that time since the epoch.
        """


class Unrecorded:
    """Passes its parent's context on."""

    __slots__ = ("_token", "traceparent")

    def __init__(self, traceparent: str) -> None:
        self.traceparent = traceparent

    def set(self, key: str, value: object) -> None:
        """Nothing is recorded."""

    def end(self, end_ns: int | None = None, error: str = "") -> None:
        """Nothing is recorded."""

    def __enter__(self) -> Self:
        self._token: Token[str] = enter(self.traceparent)
        return self

    def __exit__(self, *_: object) -> None:
        leave(self._token)


class Off:
    """The tracer of a process without an endpoint."""

    on = False

    def span(self, name: str, parent: str | None = None, **_: Any) -> Span:  # noqa: ARG002 - Tracer has it
        """Passes a valid parent on."""
        return Unrecorded(valid(parent))


def valid(parent: str | None) -> str:
    """The parent that a span has: the given one, else `current`; empty when it is malformed."""
    text = _current.get() if parent is None else parent
    return text if text and parse(text) is not None else ""


_tracer: Tracer = Off()


def tracer() -> Tracer:
    """The process's tracer."""
    return _tracer


def _in_background(work: Callable[[], None]) -> asyncio.Future[None]:
    """Done when the work is; its thread does not keep the process from ending."""
    loop = asyncio.get_running_loop()
    done: asyncio.Future[None] = loop.create_future()

    def run() -> None:
        work()
        with suppress(RuntimeError):  # the loop has ended meanwhile
            loop.call_soon_threadsafe(done.cancel)

    threading.Thread(target=run, name="telemetry-close", daemon=True).start()
    return done


class Telemetry:
    """A part: sets the tracer up from the environment, and flushes what is left when it stops."""

    def __init__(self, environment: Mapping[str, str], metrics: Metrics) -> None:
        self._environment = environment
        self._metrics = metrics
        self._exporter: Exporter | None = None

    async def start(self) -> None:
        """Loads the SDK when an endpoint is set; raises StartError when it is not installed."""
        global _tracer  # noqa: PLW0603 - one process, one tracer
        if self._exporter is not None or not self._wanted():
            return
        try:
            from retinue_server.runtime.telemetry_sdk import Exporter  # noqa: PLC0415 - 10 MiB and 160 ms
        except ImportError as error:
            raise StartError(
                f"cannot export telemetry: {error.name} is missing; "
                f"run `pip install 'retinue-server[telemetry]'`, or unset {ENDPOINT}"
            ) from None
        self._exporter = Exporter(self._environment, self._metrics, asyncio.get_running_loop())
        _tracer = self._exporter.tracer

    async def stop(self) -> None:
        """Sends what is left, within some seconds."""
        global _tracer  # noqa: PLW0603 - one process, one tracer
        exporter, self._exporter = self._exporter, None
        if exporter is None:
            return
        _tracer = Off()
        closing = _in_background(exporter.close)
        await asyncio.wait({closing}, timeout=_FLUSH_S)
        if not closing.done():
            log.warning("cannot send the last telemetry within %s s", _FLUSH_S)

    def _wanted(self) -> bool:
        protocol = self._environment.get("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc")
        if not self._environment.get(ENDPOINT) or self._environment.get("OTEL_SDK_DISABLED") == "true":
            return False
        if protocol != "grpc":
            log.warning("no telemetry: OTEL_EXPORTER_OTLP_PROTOCOL is %s; only grpc is spoken here", protocol)
        return protocol == "grpc"
