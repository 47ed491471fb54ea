"""OTLP's MetricsService: SDKs push, and each service.name is a target of its own.

https://opentelemetry.io/docs/specs/otlp, https://opentelemetry.io/docs/specs/otel/compatibility/prometheus_and_openmetrics
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import math
import re
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from retinue_server.adapter.core.packs import Reject
from retinue_server.adapter.core.points import Histogram, Raw, RawFamily, Summary, Type
from retinue_server.adapter.core.spec import Kind, Spec
from retinue_server.adapter.engines.reports import Pushed, Pushes
from retinue_server.runtime.dispatch import Service
from retinue_server.runtime.errors import ResourceExhausted, RetinueError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

    from google.protobuf.descriptor import ServiceDescriptor

    from retinue_server.adapter.core.points import Value
    from retinue_server.adapter.core.target import Target
    from retinue_server.adapter.core.targets import Targets
    from retinue_server.runtime.dispatch import Call

_NOT_IN_IDS = re.compile(r"[^a-z0-9]+")
_MAX_ID, _MAX_TEXT, _HASH = 63, 1024, 8
_NO_VALUE = 1
"""The flag of a point that says there is nothing now."""
_DELTA, _CUMULATIVE = 1, 2
_MS = 1_000_000
_UNNAMED = "unknown_service"


def descriptor() -> ServiceDescriptor | None:
    """Of the service; None where its package is not installed."""
    try:
        from opentelemetry.proto.collector.metrics.v1 import metrics_service_pb2  # noqa: PLC0415 - optional
    except ImportError:
        return None
    found: ServiceDescriptor = metrics_service_pb2.DESCRIPTOR.services_by_name["MetricsService"]
    return found


def services(targets: Targets) -> list[Service]:
    """The service, if it can be offered."""
    found = descriptor()
    return [] if found is None else [Service(found, MetricsService(targets))]


class MetricsService:
    """Takes in what it can, and says by partial_success what it can't."""

    def __init__(self, targets: Targets) -> None:
        self._targets = targets

    async def Export(self, request: Any, call: Call) -> Any:  # noqa: N802, ARG002 - as the contract has it
        from opentelemetry.proto.collector.metrics.v1 import metrics_service_pb2 as api  # noqa: PLC0415 - as above

        reject = Reject()
        for resource in request.resource_metrics:
            await self._resource(resource, reject)
        response = api.ExportMetricsServiceResponse()
        if reject.counts:
            response.partial_success.rejected_data_points = sum(reject.counts.values())
            told = (f"{reason}: {count}, such as {reject.examples[reason]}" for reason, count in reject.counts.items())
            response.partial_success.error_message = "; ".join(told)[:1000]
        return response

    async def _resource(self, said: Any, reject: Reject) -> None:
        attributes = _labels(said.resource.attributes)
        name = attributes.get("service.name") or _UNNAMED
        instance = attributes.get("service.instance.id")
        own = {"service_instance_id": instance} if instance else {}
        here = Reject()
        found = [_target_info(attributes, own)]
        for metric in _metrics(said):
            found += read(metric, own, here)
            await asyncio.sleep(0)  # others' turn: an SDK may push thousands of points at once
        try:
            pushes = await self._pushes(name)
        except RetinueError as error:
            reject("no_target", str(error)[:300], sum(map(_count, _metrics(said))))
            return
        for family, points in found:  # without a turn of others: what is pushed at once is shown at once
            pushes.push(family, points, here)
        for reason, count in here.counts.items():
            reject(reason, here.examples[reason], count)
            pushes.reject(reason, here.examples[reason], count)
        self._targets.hurry(pushes.target_id)

    async def _pushes(self, service: str) -> Pushes:
        """Of the target of a service, which comes with its first push."""
        usual = target_id(service)
        for name in (usual, f"{usual[: _MAX_ID - _HASH - 1]}-{hashlib.sha256(service.encode()).hexdigest()[:_HASH]}"):
            known = self._targets.find(name)
            if known is None:
                await self._create(Spec(name, Kind.OTLP, service=service[:_MAX_TEXT]))
            elif known.spec.kind is not Kind.OTLP or known.spec.service != service[:_MAX_TEXT]:
                continue  # somebody else has the name
            found = self._targets.source(name)
            assert isinstance(found, Pushes)
            return found
        raise AssertionError("two services have one hash")

    async def _create(self, spec: Spec) -> None:
        """Where there is no room, in the place of one that pushed long ago."""
        try:
            await self._targets.create(spec)
        except ResourceExhausted:
            silent = [one.spec.target_id for one in self._targets.all() if _is_silent(one)]
            if not silent:
                raise
            await self._targets.delete(silent[0])
            await self._targets.create(spec)


def _is_silent(target: Target) -> bool:
    return target.spec.kind is Kind.OTLP and target.collected.is_set() and not target.shown.series


def target_id(service: str) -> str:
    """The name of a service as one of a target."""
    found = _NOT_IN_IDS.sub("-", service.lower()).strip("-")
    return (found if found[:1].isalpha() else f"otlp-{found}")[:_MAX_ID].strip("-")


def read(metric: Any, own: Mapping[str, str], reject: Reject) -> Iterator[tuple[RawFamily, list[Pushed]]]:
    """What a metric says; what it is of decides what it becomes."""
    shape = metric.WhichOneof("data")
    if shape is None:
        return
    data = getattr(metric, shape)
    refused = _refused(shape, data)
    if refused:
        reject(refused, metric.name, _count(metric))
        return
    is_delta = getattr(data, "aggregation_temporality", _CUMULATIVE) == _DELTA
    family = RawFamily(metric.name, _kind(shape, data), [], metric.unit, metric.description)
    yield family, list(_pushed(shape, data, own, is_delta=is_delta))


def _metrics(said: Any) -> Iterator[Any]:
    return (metric for scope in said.scope_metrics for metric in scope.metrics)


def _refused(shape: str, data: Any) -> str:
    if shape == "exponential_histogram":
        return "type_unsupported"
    if shape in ("sum", "histogram") and data.aggregation_temporality not in (_DELTA, _CUMULATIVE):
        return "no_temporality"
    return ""


def _kind(shape: str, data: Any) -> Type:
    if shape == "sum":
        return Type.COUNTER if data.is_monotonic else Type.GAUGE
    return {"gauge": Type.GAUGE, "histogram": Type.HISTOGRAM, "summary": Type.SUMMARY}[shape]


def _pushed(shape: str, data: Any, own: Mapping[str, str], *, is_delta: bool) -> Iterator[Pushed]:
    value_of: Callable[[Any], Value] = _READERS.get(shape, _number)
    for point in data.data_points:
        labels = {**_labels(point.attributes), **own}
        value = None if point.flags & _NO_VALUE else Raw(labels, value_of(point), point.start_time_unix_nano // _MS)
        yield Pushed(value, labels, point.time_unix_nano, is_delta)


def _number(point: Any) -> float:
    return float(point.as_int if point.WhichOneof("value") == "as_int" else point.as_double)


def _histogram(point: Any) -> Histogram:
    counts = [float(count) for count in accumulate(point.bucket_counts)] or [float(point.count)]
    total = point.sum if point.HasField("sum") else math.nan
    buckets = tuple(zip((*point.explicit_bounds, math.inf), counts, strict=False))
    return Histogram(buckets, total, float(point.count))


def _summary(point: Any) -> Summary:
    quantiles = tuple((one.quantile, one.value) for one in point.quantile_values)
    return Summary(quantiles, point.sum, float(point.count))


_READERS: Mapping[str, Callable[[Any], Value]] = {"histogram": _histogram, "summary": _summary}


def _target_info(attributes: Mapping[str, str], own: Mapping[str, str]) -> tuple[RawFamily, list[Pushed]]:
    labels = {**{name: text for name, text in attributes.items() if name != "service.instance.id"}, **own}
    return RawFamily("target", Type.INFO, [], "", "Who pushes."), [Pushed(Raw(labels, 1.0), labels, 0)]


def _count(metric: Any) -> int:
    shape = metric.WhichOneof("data")
    return len(getattr(metric, shape).data_points) if shape else 0


def _labels(attributes: Iterable[Any]) -> dict[str, str]:
    return {pair.key: _text(pair.value) for pair in attributes}


def _text(value: Any) -> str:
    """As the specification writes attributes where text alone is allowed."""
    found = _plain(value)
    return found if isinstance(found, str) else "" if found is None else json.dumps(found, separators=(",", ":"))


def _plain(value: Any) -> Any:
    match value.WhichOneof("value"):
        case None:
            return None
        case "array_value":
            return [_plain(one) for one in value.array_value.values]
        case "kvlist_value":
            return {pair.key: _plain(pair.value) for pair in value.kvlist_value.values}
        case "bytes_value":
            return base64.b64encode(value.bytes_value).decode()
        case shape:
            return getattr(value, shape)
