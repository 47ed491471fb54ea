"""The adapter: which apps are collected, what they say in one form, and what this app says of itself.

    async with Adapter() as adapter:
        for found in await adapter.signals("cache"):                # requests, errors, duration, saturation
            print(found)
        await adapter.report("shop", gauge("cart_size", 3, kind="guest"), counter("orders", 17))

    async with Adapter("unix:/run/retinue/control.sock") as operator:
        await operator.create(target("cache", "REDIS", "127.0.0.1:6379"), wait=10)

What changes targets is for operators: it needs the address of the control socket. Times are seconds or `timedelta`.
"""

from __future__ import annotations

import asyncio
from datetime import timedelta
from typing import TYPE_CHECKING, Any, NamedTuple, Self, TypeAlias

import grpc.aio
from google.protobuf.duration_pb2 import Duration

from retinue.adapter.v1 import adapter_service_pb2 as api
from retinue.adapter.v1 import adapter_service_pb2_grpc as rpc
from retinue.adapter.v1 import metric_pb2 as metric_pb
from retinue.adapter.v1 import target_pb2 as pb
from retinue.client import errors
from retinue.client.channel import DEFAULT_TIMEOUT, Connection, backoff, is_transient

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Iterable, Iterator, Mapping, Sequence

Seconds: TypeAlias = float | timedelta

PATTERN = "adapter"
_MOST_WAIT = 60.0
"""What the contract lets a call wait, in seconds."""
_MOST_SERIES, _MOST_BYTES = 1000, 3 << 20
"""Of one ReportMetrics: the contract's limit, and what is safely below gRPC's."""


class Change(NamedTuple):
    """Of a watch."""

    metrics: Sequence[metric_pb.Metric]
    """Metrics with the series that changed; `stale` are those that are gone."""
    begins: bool
    """The first part of a snapshot, when a watch begins or had to begin anew: forget what was known before."""
    synced: bool
    """The snapshot is complete with this one."""
    coalesced: int
    """Collections that were missed before this one, since the reader was slow."""


class Reported(NamedTuple):
    """What became of a report."""

    accepted: int
    """Points that were taken."""
    rejections: Sequence[pb.Rejection]
    """Those that were not, by reason."""


def target(
    target_id: str,
    kind: str,
    endpoint: str = "",
    *,
    interval: Seconds | None = None,
    timeout: Seconds | None = None,
    **fields: Any,
) -> pb.Target:
    """A declaration: `kind` such as REDIS or PROMETHEUS; `fields` are the message's: `rule_pack`, `service` ..."""
    found = pb.Target(target_id=target_id, kind=pb.TargetKind.Value(f"TARGET_KIND_{kind}"), endpoint=endpoint, **fields)
    if interval is not None:
        found.interval_duration.CopyFrom(_duration(interval))
    if timeout is not None:
        found.timeout_duration.CopyFrom(_duration(timeout))
    return found


def declaration(found: pb.Target) -> pb.Target:
    """A target as it was declared: without what the server says of it."""
    bare = pb.Target()
    bare.CopyFrom(found)
    for name in ("status", "etag"):
        bare.ClearField(name)
    return bare


def match(name: str = "", *, targets: Iterable[str] = (), labels: Mapping[str, str] | None = None) -> api.Match:
    """Selects series: a name or `beginning*`, targets, labels with their values; what is left out matches all."""
    return api.Match(name=name, target_ids=targets, labels=labels)


def counter(name: str, value: float, *, unit: str = "", **labels: str) -> metric_pb.Metric:
    """A point for a report: what only grows. The name has no `_total`."""
    series = [metric_pb.Series(labels=labels, number=value)]
    return metric_pb.Metric(name=name, type=metric_pb.METRIC_TYPE_COUNTER, unit=unit, series=series)


def gauge(name: str, value: float, *, unit: str = "", **labels: str) -> metric_pb.Metric:
    """A point for a report: what goes up and down. Units such as `ms` or `By` are turned into base units."""
    series = [metric_pb.Series(labels=labels, number=value)]
    return metric_pb.Metric(name=name, type=metric_pb.METRIC_TYPE_GAUGE, unit=unit, series=series)


def state_name(found: pb.Target) -> str:
    """Its state as people say it: pending, up, degraded, limited, stale, down, misconfigured."""
    return pb.TargetState.Name(found.status.state).removeprefix("TARGET_STATE_").lower()


def signal_name(signal: metric_pb.Signal) -> str:
    """As people say it: requests, errors, duration, saturation."""
    return metric_pb.SignalKind.Name(signal.kind).removeprefix("SIGNAL_KIND_").lower()


class Adapter:
    """The adapter at an address; cheap, a given connection is shared. Methods raise RetinueError."""

    def __init__(
        self,
        address: str | None = None,
        *,
        connection: Connection | None = None,
        timeout: float = DEFAULT_TIMEOUT,
        patient: bool = True,
    ) -> None:
        self.timeout = timeout
        self._owned = connection is None
        self.connection = connection or Connection(address, pattern=PATTERN, patient=patient)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Closes the connection if it was opened here. Safe to repeat."""
        if self._owned:
            await self.connection.close()

    # Targets

    async def create(self, wanted: pb.Target, *, wait: Seconds = 0) -> pb.Target:
        """Begins to collect it, and waits for the first collection, up to 60 s; its status says how that went."""
        request = api.CreateTargetRequest(target=wanted, wait_duration=_duration(wait))
        return (await self._call("CreateTarget", request, wait)).target  # type: ignore[no-any-return] # by the contract

    async def update(self, wanted: pb.Target, *, etag: str = "") -> pb.Target:
        """Makes the target of that name what is said here, all of it."""
        request = api.UpdateTargetRequest(target=wanted, etag=etag)
        return (await self._call("UpdateTarget", request)).target  # type: ignore[no-any-return] # by the contract

    async def delete(self, target_id: str, *, etag: str = "") -> bool:
        """Forgets it and its series; whether there was one."""
        request = api.DeleteTargetRequest(target_id=target_id, etag=etag)
        return (await self._call("DeleteTarget", request)).deleted  # type: ignore[no-any-return] # by the contract

    async def get(self, target_id: str) -> pb.Target:
        """As it is now. Raises NotFound."""
        return (await self._call("GetTarget", api.GetTargetRequest(target_id=target_id))).target  # type: ignore[no-any-return] # by the contract

    async def list(self) -> AsyncGenerator[pb.Target]:
        """All, by name."""
        request = api.ListTargetsRequest()
        while True:
            page = await self._call("ListTargets", request)
            for found in page.targets:
                yield found
            if not page.next_page_token:
                return
            request.page_token = page.next_page_token

    async def test(self, wanted: pb.Target) -> api.TestTargetResponse:
        """Collects once and keeps nothing: what came beside what would become of it, and the golden signals."""
        wait = wanted.timeout_duration.ToTimedelta()
        return await self._call("TestTarget", api.TestTargetRequest(target=wanted), wait)  # type: ignore[no-any-return] # by the contract

    # Metrics

    async def metrics(
        self, *matches: api.Match, max_age: Seconds | None = None, include_stale: bool = False
    ) -> Sequence[metric_pb.Metric]:
        """The latest of what any of these matches, or of all. `max_age` refuses what is older, for as long as
        `timeout` lasts."""
        request = api.GetMetricsRequest(matches=matches, include_stale=include_stale)
        if max_age is not None:
            request.max_age_duration.CopyFrom(_duration(max_age))
        return (await self._call("GetMetrics", request)).metrics  # type: ignore[no-any-return] # by the contract

    async def watch(self, *matches: api.Match) -> AsyncGenerator[Change]:
        """A snapshot of what matches, then each change. Begins anew, with a snapshot, when a connection is lost."""
        async for response, begins in self._stream("WatchMetrics", api.WatchMetricsRequest(matches=matches)):
            yield Change(response.metrics, begins, response.synced, response.coalesced)

    async def describe(self, *matches: api.Match) -> Sequence[metric_pb.Metric]:
        """Names, types, units and help of what matches, without values."""
        return (await self._call("DescribeMetrics", api.DescribeMetricsRequest(matches=matches))).metrics  # type: ignore[no-any-return] # by the contract

    # Golden signals

    async def signals(self, *target_ids: str) -> Sequence[metric_pb.Signals]:
        """Requests, errors, duration and saturation of these targets or of all. Raises NotFound."""
        return (await self._call("GetSignals", api.GetSignalsRequest(target_ids=target_ids))).signals  # type: ignore[no-any-return] # by the contract

    async def watch_targets(self, *target_ids: str) -> AsyncGenerator[api.WatchTargetsResponse]:
        """Targets (none named = all), then `synced`, then each again whenever its state changes, or its name when it is
        gone. Goes on over lost connections, with a snapshot again, and does not tell what went meanwhile."""
        async for response, _ in self._stream("WatchTargets", api.WatchTargetsRequest(target_ids=target_ids)):
            yield response

    async def watch_signals(self, *target_ids: str) -> AsyncGenerator[metric_pb.Signals]:
        """The same, and again whenever one changes; a target that is gone has no `signals`. Goes on over lost
        connections, and does not tell what went meanwhile."""
        async for response, _ in self._stream("WatchSignals", api.WatchSignalsRequest(target_ids=target_ids)):
            yield response.signals

    # Reports

    async def report(self, target_id: str, *metrics: metric_pb.Metric) -> Reported:
        """Tells the server what this app says of itself, in as many calls as it takes. A point replaces the one of its
        series, so that it is safe to repeat; points that are refused keep no others from being taken.
        """
        accepted, refused = 0, dict[str, pb.Rejection]()
        for batch in batches(metrics):
            request = api.ReportMetricsRequest(target_id=target_id, metrics=batch)
            response = await self._call("ReportMetrics", request)
            accepted += response.accepted_points
            for one in response.rejections:
                refused.setdefault(
                    one.reason, pb.Rejection(reason=one.reason, example=one.example)
                ).points += one.points
        return Reported(accepted, list(refused.values()))

    # Calling

    async def _call(self, method: str, request: Any, wait: Seconds = 0) -> Any:
        stub = rpc.AdapterServiceStub(self.connection.channel)
        seconds = self.timeout + min(_seconds(wait), _MOST_WAIT)
        return await self.connection.call(getattr(stub, method), request, timeout=seconds)

    async def _stream(self, method: str, request: Any) -> AsyncGenerator[tuple[Any, bool]]:
        """Responses, and whether each is the first of its connection."""
        reached, waits = False, backoff()
        while True:
            stub: Any = rpc.AdapterServiceStub(self.connection.channel)
            call = getattr(stub, method)(request, metadata=self.connection.metadata())
            begins = True
            try:
                async for response in call:
                    reached, waits = True, backoff()
                    yield response, begins
                    begins = False
            except grpc.aio.AioRpcError as raw:
                error = errors.from_rpc_error(raw)
                hopeful = reached or self.connection.patient or error.reason
                if not (is_transient(error) and hopeful):
                    raise error from raw
            finally:
                call.cancel()
            await asyncio.sleep(next(waits))


def batches(metrics: Iterable[metric_pb.Metric]) -> Iterator[Sequence[metric_pb.Metric]]:
    """Reports that are not too large: a metric with many series is told in parts."""
    batch, series, size = list[metric_pb.Metric](), 0, 0
    for metric in (part for whole in metrics for part in _parts(whole)):
        count, length = len(metric.series), metric.ByteSize()
        if batch and (series + count > _MOST_SERIES or size + length > _MOST_BYTES):
            yield batch
            batch, series, size = [], 0, 0
        batch.append(metric)
        series, size = series + count, size + length
    if batch:
        yield batch


def _parts(metric: metric_pb.Metric) -> Iterator[metric_pb.Metric]:
    """None larger than a report, as far as it is not one series that is."""
    if len(metric.series) <= 1 or (len(metric.series) <= _MOST_SERIES and metric.ByteSize() <= _MOST_BYTES):
        yield metric
        return
    middle = len(metric.series) // 2
    for some in (metric.series[:middle], metric.series[middle:]):
        part = metric_pb.Metric(name=metric.name, type=metric.type, unit=metric.unit, help=metric.help, series=some)
        yield from _parts(part)


def _seconds(value: Seconds) -> float:
    return value.total_seconds() if isinstance(value, timedelta) else value


def _duration(value: Seconds) -> Duration:
    found = Duration()
    found.FromTimedelta(timedelta(seconds=_seconds(value)))
    return found
