"""Between the contract's messages and the core's records. What is malformed is named in `violations`, never guessed."""

from __future__ import annotations

from typing import TYPE_CHECKING

from retinue.adapter.v1 import adapter_service_pb2 as api
from retinue.adapter.v1 import metric_pb2 as metric_pb
from retinue.adapter.v1 import target_pb2 as pb
from retinue_server.adapter.core import limits
from retinue_server.adapter.core.collection import Limits
from retinue_server.adapter.core.matching import Match
from retinue_server.adapter.core.points import Histogram, Raw, RawFamily, Summary, Type, Value
from retinue_server.adapter.core.spec import Kind, Spec
from retinue_server.adapter.core.target import Shown
from retinue_server.runtime import wire
from retinue_server.runtime.errors import Violation

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from google.protobuf.duration_pb2 import Duration

    from retinue_server.adapter.core.points import AnyFamily, Series, Signal
    from retinue_server.adapter.core.target import Target
    from retinue_server.adapter.core.targets import Trial

MAX_WAIT_MS = 60_000
_HOUR_MS = 3_600_000
_INTERVAL_MS, _SHORTEST_MS, _TIMEOUT_MS = 10_000, 1_000, 5_000
_MAX_REJECTIONS = 20


class Reader:
    """Reads one request; `violations` has what was wrong with it."""

    def __init__(self) -> None:
        self.violations: list[Violation] = []

    def wrong(self, field: str, text: str) -> None:
        """Notes a violation."""
        self.violations.append(Violation(field, text))

    def target(self, said: pb.Target, what: str) -> Spec:
        """A declaration with its defaults, checked as far as it stands alone; raises InvalidArgument at once."""
        for name in ("status", "etag"):
            if said.HasField("status") if name == "status" else said.etag:
                self.wrong(f"target.{name}", "is output only; leave it out")
        if said.kind not in Kind._value2member_map_ or said.kind == pb.TARGET_KIND_OTLP:
            names = ", ".join(kind.name for kind in Kind if kind is not Kind.OTLP)
            self.wrong("target.kind", f"must be one of {names}")
        interval = self._ms(said, "interval_duration", _INTERVAL_MS, _SHORTEST_MS, _HOUR_MS)
        timeout = self._ms(said, "timeout_duration", min(_TIMEOUT_MS, interval), 1, interval)
        usual = Limits()
        bounds = Limits(
            said.limits.max_bytes or usual.max_bytes,
            said.limits.max_series or usual.max_series,
            said.limits.max_labels or usual.max_labels,
        )
        spec = Spec(
            said.target_id,
            Kind(said.kind) if said.kind in Kind._value2member_map_ else Kind.REPORT,
            said.endpoint,
            said.credentials_file,
            said.rule_pack,
            said.service,
            interval / 1000,
            timeout / 1000,
            bounds,
        )
        if not any(one.field == "target.kind" for one in self.violations):
            limits.check(spec, self.violations)
        limits.refuse(self.violations, what)
        return spec

    def _ms(self, said: pb.Target, name: str, usual: int, low: int, high: int) -> int:
        if not said.HasField(name):  # type: ignore[arg-type] # one of the durations
            return usual
        return wire.duration_ms(getattr(said, name), f"target.{name}", self.violations, low=low, high=high)

    def wait_s(self, said: Duration, remaining_s: float | None) -> float:
        """How long to wait."""
        wait = wire.duration_ms(said, "wait_duration", self.violations, high=MAX_WAIT_MS) / 1000
        return wait if remaining_s is None else max(0.0, min(wait, remaining_s - 0.2))

    def matches(self, said: Sequence[api.Match]) -> list[Match]:
        """What somebody wants."""
        if len(said) > limits.MAX_MATCHES:
            self.wrong("matches", f"must be at most {limits.MAX_MATCHES}")
            return []
        for index, one in enumerate(said):
            for place, target_id in enumerate(one.target_ids):
                limits.check_id(target_id, self.violations, f"matches[{index}].target_ids[{place}]")
            if "*" in one.name[:-1]:
                self.wrong(f"matches[{index}].name", "may have * at its end only")
        return [Match(one.name, frozenset(one.target_ids), tuple(one.labels.items())) for one in said]

    def report(self, said: api.ReportMetricsRequest) -> list[RawFamily]:
        """Points, as they are; those without a value are named."""
        limits.check_id(said.target_id, self.violations)
        count = sum(len(one.series) for one in said.metrics)
        if count > limits.MAX_REPORTED:
            self.wrong("metrics", f"must have at most {limits.MAX_REPORTED} series")
        found = []
        for index, one in enumerate(said.metrics):
            at = f"metrics[{index}]"
            if not one.name:
                self.wrong(f"{at}.name", "must be given")
            if one.type not in Type._value2member_map_:
                self.wrong(f"{at}.type", f"must be one of {', '.join(Type.__members__)}")
                continue
            kind = Type(one.type)
            points = [self._point(series, f"{at}.series[{place}]", kind) for place, series in enumerate(one.series)]
            found.append(RawFamily(one.name, kind, [p for p in points if p is not None], one.unit, one.help))
        return found

    def _point(self, said: metric_pb.Series, at: str, kind: Type) -> Raw | None:
        wanted = {Type.HISTOGRAM: "histogram", Type.SUMMARY: "summary"}.get(kind, "number")
        if said.WhichOneof("value") != wanted:
            self.wrong(f"{at}.value", f"must be {wanted}")
            return None
        return Raw(dict(said.labels), _value(said))


def _value(said: metric_pb.Series) -> Value:
    match said.WhichOneof("value"):
        case "histogram":
            one = said.histogram
            return Histogram(
                tuple((bucket.upper_bound, float(bucket.cumulative_count)) for bucket in one.buckets),
                one.sum,
                float(one.count),
            )
        case "summary":
            told = said.summary
            return Summary(tuple((q.quantile, q.value) for q in told.quantiles), told.sum, float(told.count))
        case _:
            return said.number


def target(known: Target, etag: str, *, dropped: int = 0, received: int = 0, address: str = "") -> pb.Target:
    """A target with its status."""
    spec, status = known.spec, known.status
    found = pb.Target(
        target_id=spec.target_id,
        kind=pb.TargetKind.ValueType(spec.kind),
        endpoint=spec.endpoint,
        credentials_file=spec.credentials_file,
        rule_pack=spec.rule_pack,
        service=spec.service,
        interval_duration=wire.to_duration(round(spec.interval_s * 1000)),
        timeout_duration=wire.to_duration(round(spec.timeout_s * 1000)),
        limits=pb.TargetLimits(
            max_bytes=spec.limits.max_bytes, max_series=spec.limits.max_series, max_labels=spec.limits.max_labels
        ),
        status=pb.TargetStatus(
            state=pb.TargetState.ValueType(status.state),
            message=status.message,
            series=known.shown.series,
            rejections=rejections(status.rejected, status.examples),
            address=address or spec.endpoint,
        ),
        etag=etag,
    )
    if status.last_ms:
        found.status.last_collection_time.CopyFrom(wire.to_timestamp(status.last_ms))
        found.status.collection_duration.CopyFrom(wire.to_duration(status.took_ms))
    if status.success_ms:
        found.status.last_success_time.CopyFrom(wire.to_timestamp(status.success_ms))
    if spec.kind is Kind.STATSD:
        found.status.datagrams.CopyFrom(pb.DatagramCounts(received=received, dropped=dropped))
    return found


def rejections(counts: dict[str, int] | object, examples: dict[str, str] | object) -> list[pb.Rejection]:
    """By reason, the most frequent first."""
    assert isinstance(counts, dict)
    assert isinstance(examples, dict)
    ordered = sorted(counts.items(), key=lambda item: -item[1])[:_MAX_REJECTIONS]
    return [pb.Rejection(reason=name, points=count, example=examples.get(name, "")) for name, count in ordered]


def metric(family: AnyFamily, series: Iterable[Series], *, time_ms: int, stale: bool) -> metric_pb.Metric:
    """A metric with some of its series."""
    found = described(family)
    found.series.extend(_series(one, time_ms, stale=stale) for one in series)
    return found


def described(family: AnyFamily) -> metric_pb.Metric:
    """A metric without its series."""
    return metric_pb.Metric(
        name=family.name, type=metric_pb.MetricType.ValueType(family.type), unit=family.unit, help=family.help
    )


def _series(one: Series, time_ms: int, *, stale: bool) -> metric_pb.Series:
    found = metric_pb.Series(labels=dict(one.labels), time=wire.to_timestamp(time_ms), stale=stale)
    if one.start_ms:
        found.start_time.CopyFrom(wire.to_timestamp(one.start_ms))
    if isinstance(one.value, Histogram):
        found.histogram.CopyFrom(_histogram(one.value))
    elif isinstance(one.value, Summary):
        quantiles = [metric_pb.Quantile(quantile=q, value=v) for q, v in one.value.quantiles]
        found.summary.CopyFrom(metric_pb.Summary(quantiles=quantiles, sum=one.value.sum, count=_count(one.value.count)))
    else:
        found.number = one.value
    return found


def _histogram(value: Histogram) -> metric_pb.Histogram:
    buckets = [metric_pb.Bucket(upper_bound=bound, cumulative_count=_count(n)) for bound, n in value.buckets]
    return metric_pb.Histogram(buckets=buckets, sum=value.sum, count=_count(value.count))


def _count(value: float) -> int:
    """A count as an integer: rates of StatsD make parts of one; what is none is 0."""
    return round(value) if 0 <= value < 2**63 else 0


def signals(target_id: str, shown: Shown, now_ms: int) -> metric_pb.Signals:
    """The golden signals of a target."""
    found = metric_pb.Signals(
        target_id=target_id, signals=[_signal(i, one, shown) for i, one in enumerate(shown.signals)]
    )
    if shown.time_ms:
        found.time.CopyFrom(wire.to_timestamp(shown.time_ms))
        found.age_duration.CopyFrom(wire.to_duration(max(now_ms - shown.time_ms, 0)))
    return found


def _signal(index: int, one: Signal, shown: Shown) -> metric_pb.Signal:
    rates = shown.rates
    found = metric_pb.Signal(
        kind=metric_pb.SignalKind.ValueType(index + 1), absent_reason=one.absent, source=one.source
    )
    if isinstance(one.value, Histogram):
        found.histogram.CopyFrom(_histogram(one.value))
    elif one.value is not None:
        found.number = one.value
        rate = rates[index] if index < len(rates) else None
        if rate is not None:
            found.rate = rate
    return found


def tested(found: Trial | str) -> api.TestTargetResponse:
    """What each point of a dry run would become; or why there are none."""
    if isinstance(found, str):
        return api.TestTargetResponse(failure=found)
    return api.TestTargetResponse(
        failure=found.failure,
        points=[
            api.TestedPoint(raw=one.raw, normalised=one.normalised, rejection=one.rejection) for one in found.points
        ],
        omitted_points=found.omitted,
        signals=[_signal(index, one, Shown()) for index, one in enumerate(found.signals)],
    )
