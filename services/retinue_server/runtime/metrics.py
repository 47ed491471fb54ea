"""What is counted: plain integers per method, read when somebody asks.

A pattern adds its own by `Pattern.metrics`, a function that gives families; it is called for each reading,
on the event loop, and must not block.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, Any, Literal, Protocol

import msgspec

from retinue_server.runtime.errors import Code

if TYPE_CHECKING:
    from retinue_server.runtime.dispatch import Method
    from retinue_server.runtime.interceptors import Limits

BUCKETS_S = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 60.0)
"""Upper bounds of the histogram of durations, in seconds; one more bucket has what is longer."""


class Histogram(msgspec.Struct, frozen=True):
    """The value of a sample of type histogram."""

    buckets: tuple[tuple[float, int], ...]
    """Upper bound and the number of observations up to it; the last bound is infinite."""
    total: float
    """The sum of the observations."""


class Sample(msgspec.Struct, frozen=True):
    """One time series of a family."""

    labels: Mapping[str, str]
    value: float | Histogram
    start_ns: int = 0
    """Since when it counts, since the epoch; 0 = since this process runs."""


class Family(msgspec.Struct, frozen=True):
    """Samples that share a name; a counter's name ends in `_total`, units are seconds and bytes."""

    name: str
    help: str
    type: Literal["counter", "gauge", "histogram"]
    samples: Iterable[Sample]
    unit: str = ""
    """By UCUM, as OTLP has it."""


class Resource(msgspec.Struct, frozen=True):
    """What is known of something else than this process; sent by OTLP, not shown at `/metrics`."""

    attributes: Mapping[str, str]
    families: Sequence[Family]
    time_ns: int
    """Of the values."""


Collect = Callable[[], Iterable[Family]]


class CallStats:
    """How the calls of one method ended and how long they took."""

    __slots__ = ("buckets", "codes", "seconds")

    def __init__(self) -> None:
        self.codes = [0] * len(Code)
        self.buckets = [0] * (len(BUCKETS_S) + 1)
        self.seconds = 0.0

    def record(self, code: int, seconds: float) -> None:
        """Counts one call."""
        self.codes[code] += 1
        self.buckets[bisect_left(BUCKETS_S, seconds)] += 1
        self.seconds += seconds

    def histogram(self) -> Histogram:
        """Counts as Prometheus has them: each bucket includes the ones below."""
        bounds = (*BUCKETS_S, float("inf"))
        return Histogram(tuple(zip(bounds, accumulate(self.buckets), strict=True)), self.seconds)


class Metrics:
    """Every family of the process."""

    def __init__(
        self, collectors: Iterable[Collect] = (), others: Iterable[Callable[[], Iterable[Resource]]] = ()
    ) -> None:
        self._calls: dict[tuple[str, str], CallStats] = {}
        self._collectors, self._others = list(collectors), list(others)

    def method(self, method: Method) -> CallStats:
        """The method's counters, the same for each of its listeners."""
        return self._calls.setdefault((method.service, method.name), CallStats())

    def register(self, collect: Collect) -> None:
        """Adds a source of families."""
        self._collectors.append(collect)

    def families(self) -> list[Family]:
        """The present values."""
        return [*self._call_families(), *(family for collect in self._collectors for family in collect())]

    @property
    def has_others(self) -> bool:
        """Whether `resources` may have some."""
        return bool(self._others)

    def resources(self) -> Iterator[Resource]:
        """What patterns know of others, one after the other: the reader may let the event loop go on between them."""
        return (one for read in self._others for one in read())

    def _call_families(self) -> list[Family]:
        handled, durations = [], []
        for (service, method), stats in self._calls.items():
            labels = {"service": service, "method": method}
            seen = [code for code in Code if stats.codes[code]]
            handled += [Sample({**labels, "code": code.name}, stats.codes[code]) for code in seen]
            durations.append(Sample(labels, stats.histogram()))
        return [
            Family("retinue_server_handled_total", "Calls that ended, by canonical code.", "counter", handled),
            Family("retinue_server_handling_seconds", "How long calls took.", "histogram", durations),
        ]


def of_limits(limits: Limits) -> Collect:
    """How many calls are open."""

    def collect() -> list[Family]:
        samples = [
            Sample({"kind": "unary"}, limits.calls.used),
            Sample({"kind": "stream"}, limits.streams.used),
        ]
        return [Family("retinue_server_open_calls", "Calls that are open now.", "gauge", samples)]

    return collect


class MetricPages(Protocol):
    """A pattern whose product is metrics: it shows those of others, with the process's own among them."""

    def page(self, own: Iterable[Any], name: str, *, open_metrics: bool) -> tuple[str, bytes] | None:
        """Content type and text of `/metrics/NAME`, or of `/metrics`, where `own` belong; None = there is no such
        thing."""


class Exposition:
    """The families as text for Prometheus; its library loads on the first reading."""

    content_type = "text/plain; version=0.0.4; charset=utf-8"

    def __init__(self, metrics: Metrics, pages: MetricPages | None = None) -> None:
        self._metrics, self._pages = metrics, pages
        self._registry: Any = None

    def page(self, name: str, accept: str) -> tuple[str, bytes] | None:
        """What `/metrics`, or `/metrics/NAME`, answers: content type and text."""
        import prometheus_client  # noqa: PLC0415 - most servers are never asked

        if self._registry is None:
            self._registry = prometheus_client.CollectorRegistry()
            self._registry.register(self)
            prometheus_client.ProcessCollector(registry=self._registry)
        if self._pages is not None:
            return self._pages.page(self._registry.collect(), name, open_metrics=prefers_open_metrics(accept))
        return None if name else (self.content_type, prometheus_client.generate_latest(self._registry))

    def text(self) -> bytes:
        """Of `/metrics`."""
        found = self.page("", "")
        assert found is not None
        return found[1]

    def describe(self) -> list[Any]:
        """Tells the library that names are known only when they are read."""
        return []

    def collect(self) -> Iterable[Any]:
        """The library's form of the families."""
        return [_to_prometheus(family) for family in self._metrics.families()]


def prefers_open_metrics(accept: str) -> bool:
    """Whether a reader that sends this `Accept` would rather have OpenMetrics 1.0 than the text format."""
    shares = {"application/openmetrics-text": 0.0, "text/plain": 0.0}
    for one in accept.split(","):
        kind, *said = [part.strip().lower() for part in one.split(";")]
        named = dict(part.partition("=")[::2] for part in said)
        if kind in shares and not named.get("version", "1").startswith("2"):
            shares[kind] = max(shares[kind], _share(named.get("q", "1")))
    return 0 < shares["application/openmetrics-text"] >= shares["text/plain"]


def _share(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return 0.0


def _to_prometheus(family: Family) -> Any:
    from prometheus_client import core  # noqa: PLC0415 - as above

    samples = list(family.samples)
    names = sorted({name for sample in samples for name in sample.labels})
    kinds = {
        "counter": core.CounterMetricFamily,
        "gauge": core.GaugeMetricFamily,
        "histogram": core.HistogramMetricFamily,
    }
    converted = kinds[family.type](family.name, family.help, labels=names)
    for sample in samples:
        values = [sample.labels.get(name, "") for name in names]
        if isinstance(sample.value, Histogram):
            buckets = [(_bound(bound), count) for bound, count in sample.value.buckets]
            converted.add_metric(values, buckets, sample.value.total)
        else:
            converted.add_metric(values, sample.value)
    return converted


def _bound(value: float) -> str:
    return "+Inf" if value == float("inf") else str(value)
