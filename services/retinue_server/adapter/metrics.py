"""What the adapter counts, in Prometheus' terms, and the golden signals; names and labels are part of the product."""

from __future__ import annotations

from typing import TYPE_CHECKING

from retinue_server.adapter.core import exposition
from retinue_server.adapter.core.collection import RESERVED
from retinue_server.adapter.core.points import SIGNALS, Family, Histogram, Series, Summary, Type
from retinue_server.adapter.core.spec import State
from retinue_server.runtime import metrics as own

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from retinue_server.adapter.core.points import AnyFamily
    from retinue_server.adapter.core.target import Target
    from retinue_server.adapter.core.targets import Targets

_NS = 1_000_000
_UCUM = {
    "seconds": "s",
    "bytes": "By",
    "ratio": "1",
    "celsius": "Cel",
    "volts": "V",
    "joules": "J",
    "grams": "g",
    "meters": "m",
}
"""Of base units."""
_SIGNALS = {
    "requests": ("app_requests", Type.COUNTER, "", "Requests served."),
    "errors": ("app_errors", Type.COUNTER, "", "Requests that failed for a reason of the app's own."),
    "duration": ("app_request_duration_seconds", Type.HISTOGRAM, "seconds", "How long requests take."),
    "saturation": ("app_saturation_ratio", Type.GAUGE, "ratio", "How full the fullest resource is."),
}


def families(
    targets: Targets, packs_ok: Callable[[], bool], file_ok: Callable[[], bool], restarts: Callable[[], int]
) -> Iterable[own.Family]:
    """Targets by state, what collecting them takes, and what of them is refused."""
    known = list(targets.all())

    def each(read: Callable[[Target], float]) -> list[own.Sample]:
        return [own.Sample(one.spec.own_labels, read(one)) for one in known]

    def counted(name: str) -> list[own.Sample]:
        found = [(one, getattr(targets.source(one.spec.target_id), name, None)) for one in known]
        return [own.Sample(one.spec.own_labels, count) for one, count in found if isinstance(count, int)]

    name = "retinue_adapter_"
    rejected = [
        own.Sample({**one.spec.own_labels, "reason": reason}, count)
        for one in known
        for reason, count in one.status.rejected.items()
    ]
    states = [
        own.Sample({**one.spec.own_labels, "state": state.name.lower()}, int(one.status.state is state))
        for one in known
        for state in State
    ]
    return (
        own.Family(f"{name}up", "Whether the last collection succeeded.", "gauge", each(_is_up)),
        own.Family(f"{name}target_state", "1 for the state that a target is in.", "gauge", states),
        own.Family(f"{name}collection_seconds", "What the last collection took.", "gauge", each(_took)),
        own.Family(f"{name}series", "Series that are shown.", "gauge", each(lambda one: one.shown.series)),
        own.Family(f"{name}last_success_timestamp_seconds", "When it succeeded last.", "gauge", each(_success)),
        own.Family(f"{name}rejected_points_total", "Points refused, by reason.", "counter", rejected),
        own.Family(
            f"{name}collections_total",
            "Collections, by outcome.",
            "counter",
            [own.Sample({"outcome": outcome}, count) for outcome, count in targets.collections.items()],
        ),
        own.Family(f"{name}datagrams_total", "Datagrams taken in.", "counter", counted("received")),
        own.Family(
            f"{name}dropped_datagrams_total", "Datagrams that the kernel dropped.", "counter", counted("dropped")
        ),
        own.Family(f"{name}rule_packs_ok", "0 while a rule pack is wrong.", "gauge", [own.Sample({}, int(packs_ok()))]),
        own.Family(
            f"{name}target_file_ok",
            "0 while the file of targets is wrong.",
            "gauge",
            [own.Sample({}, int(file_ok()))],
        ),
        own.Family(
            f"{name}worker_restarts_total",
            "Times the worker was started anew.",
            "counter",
            [own.Sample({}, restarts())],
        ),
    )


def _is_up(one: Target) -> float:
    return float(one.status.state in (State.UP, State.DEGRADED, State.LIMITED))


def _took(one: Target) -> float:
    return one.status.took_ms / 1000


def _success(one: Target) -> float:
    return one.status.success_ms / 1000


def resources(targets: Targets) -> Iterator[own.Resource]:
    """What is shown of each target, with its golden signals, as OTLP has it."""
    for target in list(targets.all()):
        if target.is_stale or not target.shown.time_ms:
            continue
        spec = target.spec
        attributes = {
            "service.name": spec.own_labels["service"],
            "service.instance.id": spec.own_labels["instance"],
            "retinue.target": spec.target_id,
            "retinue.kind": spec.own_labels["kind"],
        }
        found = [part for family in (*target.shown.families, *signals([target])) for part in _otlp(family)]
        yield own.Resource(attributes, found, target.shown.time_ms * _NS)


def _otlp(family: AnyFamily) -> Iterator[own.Family]:
    """As OTLP's SDK sends it: of a summary, its quantiles, its sum and its count."""
    name, unit = exposition.sample_name(family.name, family.type), _UCUM.get(family.unit, "")
    each = [({key: text for key, text in one.labels if key not in RESERVED}, one) for one in family.series]
    if family.type is Type.SUMMARY:
        told = [(labels, one.start_ms * _NS, one.value) for labels, one in each if isinstance(one.value, Summary)]
        shares = [own.Sample({**labels, "quantile": str(q)}, v) for labels, _, s in told for q, v in s.quantiles]
        yield own.Family(name, family.help, "gauge", shares, unit)
        yield own.Family(f"{name}_sum", family.help, "counter", [own.Sample(n, s.sum, at) for n, at, s in told], unit)
        yield own.Family(f"{name}_count", family.help, "counter", [own.Sample(n, s.count, at) for n, at, s in told])
    elif family.type is Type.HISTOGRAM:
        samples = [
            own.Sample(labels, _histogram(one.value), one.start_ms * _NS)
            for labels, one in each
            if isinstance(one.value, Histogram)
        ]
        yield own.Family(name, family.help, "histogram", samples, unit)
    else:
        samples = [
            own.Sample(labels, one.value, one.start_ms * _NS)
            for labels, one in each
            if isinstance(one.value, float | int)
        ]
        yield own.Family(name, family.help, "counter" if family.type is Type.COUNTER else "gauge", samples, unit)


def _histogram(value: Histogram) -> own.Histogram:
    return own.Histogram(tuple((bound, round(count)) for bound, count in value.buckets), value.sum)


def signals(targets: Iterable[Target]) -> Iterator[Family]:
    """The golden signals that are there, one family for each target and kind."""
    for target in targets:
        if target.is_stale:
            continue
        labels = tuple(sorted(target.spec.own_labels.items()))
        for kind, one in zip(SIGNALS, target.shown.signals, strict=True):
            if one.value is None:
                continue
            name, shape, unit, text = _SIGNALS[kind]
            if isinstance(one.value, Histogram) == (shape is Type.HISTOGRAM):
                lines = exposition.lines(name, shape, labels, one.value).encode()
                yield Family(name, shape, unit, text, [Series(labels, one.value)], lines)
