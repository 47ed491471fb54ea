"""Prometheus' text format and OpenMetrics -> families, by prometheus_client's parsers. For the worker process alone."""

from __future__ import annotations

import json
import math
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from retinue_server.adapter.core.points import CUMULATIVE, Histogram, Raw, RawFamily, Summary, Type
from retinue_server.adapter.engine import Unexpected

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from retinue_server.adapter.core.packs import Reject

_TYPES = {
    "counter": Type.COUNTER,
    "gauge": Type.GAUGE,
    "histogram": Type.HISTOGRAM,
    "summary": Type.SUMMARY,
    "info": Type.INFO,
}
_NOT_SHOWN = "_created"
"""It is the start of a series."""
_LATEST_S = 1e11
_REMEMBERED, _LONG = 1 << 16, 512
"""Texts of labels that are kept, and characters of one that is not: some MiB, some dozen at worst."""


def parse(text: bytes, content_type: str, reject: Reject) -> Iterator[RawFamily]:
    """Raises Unexpected for what neither parser takes; a family that makes no sense is refused alone."""
    return of_metrics(_parsed(text, content_type), reject)


def json_document(text: bytes) -> Any:
    """Raises Unexpected."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise Unexpected(f"its answer is no JSON: {str(error)[:300]}") from None


def of_metrics(metrics: Iterable[Any], reject: Reject) -> Iterator[RawFamily]:
    """Of metrics as prometheus_client has them."""
    counting = set()
    for metric in metrics:
        kind = _TYPES.get(metric.type, Type.UNKNOWN)
        name = metric.name
        if kind in CUMULATIVE:
            counting.add(name)
        elif name.endswith(_NOT_SHOWN) and name.removesuffix(_NOT_SHOWN) in counting:
            continue  # the text format has the starts of counters as gauges
        if metric.type == "stateset":
            kind = Type.GAUGE
        if kind in (Type.HISTOGRAM, Type.SUMMARY):
            points = list(_grouped(metric.samples, name, kind, reject))
        else:
            start = name + _NOT_SHOWN
            points = [Raw(s.labels, s.value) for s in metric.samples if s.name != start]
            if len(points) < len(metric.samples):
                starts = {tuple(s.labels.items()): s.value for s in metric.samples if s.name == start}
                for point in points:
                    point.start_ms = _ms(starts.get(tuple(point.labels.items()), 0.0))
            if metric.type == "gaugehistogram":
                points = []
                reject("type_unsupported", name, len(metric.samples))
        yield RawFamily(name, kind, points, metric.unit, metric.documentation)


def _parsed(text: bytes, content_type: str) -> Iterable[Any]:
    open_metrics, plain = _parsers()
    try:
        parser: Any = open_metrics if content_type.startswith("application/openmetrics-text") else plain
        yield from parser.text_string_to_metric_families(text.decode())
    except Exception as error:  # noqa: BLE001 - whatever makes the parsers stumble
        raise Unexpected(f"its metrics can't be read: {str(error)[:300]}") from None


@lru_cache(1)
def _parsers() -> tuple[Any, Any]:
    """Most of what they take is reading labels, character by character, and from one collection to the next those
    are the same; so these remember what became of a text."""
    from prometheus_client import parser as plain  # noqa: PLC0415 - where it is asked for
    from prometheus_client.openmetrics import parser as open_metrics  # noqa: PLC0415 - as above

    known = getattr(plain, "parse_labels", None)  # a release that has none by this name is slower, and that is all
    if known is not None:
        remembering = remembered(known)
        for module in (plain, open_metrics):
            vars(module)["parse_labels"] = remembering
    return open_metrics, plain


def remembered(parse: Callable[..., dict[str, str]]) -> Callable[..., dict[str, str]]:
    """The same, which looks at a text once."""
    kept = lru_cache(_REMEMBERED)(parse)

    def parse_labels(labels_string: str, *more: bool) -> dict[str, str]:
        if len(labels_string) > _LONG:
            return parse(labels_string, *more)
        return kept(labels_string, *more).copy()  # callers take a name out of it

    return parse_labels


def _grouped(samples: Iterable[Any], name: str, kind: Type, reject: Reject) -> Iterator[Raw]:
    """Histograms and summaries, whose samples are several each."""
    bound = "le" if kind is Type.HISTOGRAM else "quantile"
    found: dict[tuple[tuple[str, str], ...], tuple[dict[str, str], list[tuple[float, float]], dict[str, float]]] = {}
    for sample in samples:
        labels = {key: value for key, value in sample.labels.items() if key != bound}
        _, parts, sums = found.setdefault(tuple(labels.items()), (labels, [], {}))
        if bound in sample.labels:
            try:
                parts.append((float(sample.labels[bound]), sample.value))
            except ValueError:
                reject("bad_histogram", f"{name} {bound}={sample.labels[bound]}"[:200])
        else:
            sums[sample.name.removeprefix(name)] = sample.value
    for labels, parts, sums in found.values():
        parts.sort()
        count = sums.get("_count", parts[-1][1] if parts and kind is Type.HISTOGRAM else math.nan)
        value = (Histogram if kind is Type.HISTOGRAM else Summary)(tuple(parts), sums.get("_sum", math.nan), count)
        yield Raw(labels, value, _ms(sums.get(_NOT_SHOWN, 0.0)))


def _ms(seconds: float) -> int:
    """Of a start, since the epoch; 0 for what is no time."""
    return round(seconds * 1000) if 0 < seconds < _LATEST_S else 0
