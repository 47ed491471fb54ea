"""Families as text: Prometheus' 0.0.4 and OpenMetrics 1.0, which differ in their headers alone as they are written
here.

https://prometheus.io/docs/instrumenting/exposition_formats, https://prometheus.io/docs/specs/om/open_metrics_spec
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from retinue_server.adapter.core.points import Histogram, Summary, Type

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from retinue_server.adapter.core.points import AnyFamily, Labels, Value

TEXT = "text/plain; version=0.0.4; charset=utf-8"
OPEN_METRICS = "application/openmetrics-text; version=1.0.0; charset=utf-8"
_NAMES = {
    Type.COUNTER: "counter",
    Type.GAUGE: "gauge",
    Type.HISTOGRAM: "histogram",
    Type.SUMMARY: "summary",
    Type.INFO: "info",
    Type.UNKNOWN: "unknown",
}
_SUFFIXES = {
    Type.COUNTER: ("_total", "_created"),
    Type.HISTOGRAM: ("_bucket", "_count", "_sum", "_created"),
    Type.SUMMARY: ("_count", "_sum", "_created"),
    Type.INFO: ("_info",),
}


def taken_names(name: str, kind: Type) -> tuple[str, ...]:
    """The names that a family has for itself: no other may end up with one of them."""
    return (name, *(name + suffix for suffix in _SUFFIXES.get(kind, ())))


def prefix(name: str, labels: Labels) -> str:
    """The line of a series of one number, up to its value."""
    return f"{name}{_braced(labels)} "


def lines(name: str, kind: Type, labels: Labels, value: Value) -> str:
    """All lines of a series."""
    if isinstance(value, Histogram):
        head = _open(f"{name}_bucket", labels, "le")
        return "".join([f'{head}{number(b)}"}} {number(n)}\n' for b, n in value.buckets]) + _sums(name, labels, value)
    if isinstance(value, Summary):
        head = _open(name, labels, "quantile")
        return "".join([f'{head}{number(q)}"}} {number(v)}\n' for q, v in value.quantiles]) + _sums(name, labels, value)
    return f"{prefix(sample_name(name, kind), labels)}{number(value)}\n"


def sample_name(name: str, kind: Type) -> str:
    """Of a series of one number."""
    if kind is Type.COUNTER:
        return name + "_total"
    return name + "_info" if kind is Type.INFO else name


def _sums(name: str, labels: Labels, value: Histogram | Summary) -> str:
    braced = _braced(labels)
    return f"{name}_count{braced} {number(value.count)}\n{name}_sum{braced} {number(value.sum)}\n"


def _open(name: str, labels: Labels, last: str) -> str:
    """A line up to the value of its last label; worked out once for all lines of a series."""
    return f'{name}{{{"".join([f"{_pair(*one)}," for one in labels])}{last}="'


def _braced(labels: Labels) -> str:
    return "{" + ",".join([_pair(*one) for one in labels]) + "}" if labels else ""


def _pair(name: str, text: str) -> str:
    return f'{name}="{escape(text)}"'


def escape(text: str) -> str:
    """A label's value within quotes."""
    if '"' in text or "\\" in text or "\n" in text:
        return text.replace("\\", r"\\").replace("\n", r"\n").replace('"', r"\"")
    return text


def number(value: float) -> str:
    """As both formats read it."""
    if value != value:  # noqa: PLR0124 - the one number that is not itself
        return "NaN"
    if value in (float("inf"), float("-inf")):
        return "+Inf" if value > 0 else "-Inf"
    return repr(float(value))


def document(families: Iterable[Sequence[AnyFamily]], *, open_metrics: bool) -> bytes:
    """Families of one name together, in the order given; of what they say of themselves the first counts."""
    parts: list[bytes] = []
    for same in families:
        parts.append(_header(same[0], open_metrics=open_metrics).encode())
        parts += [family.text for family in same]
    if open_metrics:
        parts.append(b"# EOF\n")
    return b"".join(parts)


def _header(family: AnyFamily, *, open_metrics: bool) -> str:
    name, kind = family.name, _NAMES[family.type]
    if not open_metrics:
        name = sample_name(name, family.type)
        kind = {"info": "gauge", "unknown": "untyped"}.get(kind, kind)
    said = [f"# TYPE {name} {kind}\n"]
    if family.unit and open_metrics:
        said.append(f"# UNIT {name} {family.unit}\n")
    if family.help:
        text = family.help.replace("\\", r"\\").replace("\n", r"\n")
        said.append(f"# HELP {name} {escape(family.help) if open_metrics else text}\n")
    return "".join(said)
