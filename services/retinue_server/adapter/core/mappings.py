"""Names of StatsD -> names with labels, by rules in the form of a mapping file of statsd_exporter: such a file is a
rule pack as it is. What of it has no meaning here is refused rule by rule.

https://github.com/prometheus/statsd_exporter#metric-mapping-and-configuration
"""

from __future__ import annotations

import itertools
import math
import re
from typing import TYPE_CHECKING, Any, Literal

import msgspec

if TYPE_CHECKING:
    from collections.abc import Mapping, MutableSequence, Sequence

BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, math.inf)
"""Of timers for which no rule says others."""
QUANTILES = (0.5, 0.9, 0.99)
_PLACE = re.compile(r"\$(\d+)|\$\{(\w+)\}")
_DURATION = re.compile(r"(\d+(?:\.\d+)?)(ns|us|µs|ms|s|m|h)")
_SECONDS = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}
_COMPONENT = re.compile(r"\*|[^*]+")
_TYPES = {b"c": ("counter",), b"g": ("gauge",), b"s": ("gauge",)}
_OBSERVER = ("observer", "timer")
_MAX_NAME = 1024
"""Characters of a name that are looked at."""

Observer = Literal["", "histogram", "summary"]


class _Quantile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    quantile: float
    error: float = 0.0


class _HistogramOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    buckets: list[float] = []


class _SummaryOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    quantiles: list[_Quantile] = []
    max_age: str = ""
    """It, and the next two, bound memory there; here the latest observations count."""
    age_buckets: int = 0
    buf_cap: int = 0


class _Defaults(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What rules that say nothing of it have."""

    observer_type: Observer = ""
    timer_type: Observer = ""
    buckets: list[float] = []
    quantiles: list[_Quantile] = []
    histogram_options: _HistogramOptions = _HistogramOptions()
    summary_options: _SummaryOptions = _SummaryOptions()
    match_type: Literal["", "glob", "regex"] = ""
    glob_disable_ordering: bool = False
    ttl: str | float = 0


class _Said(_Defaults, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A rule."""

    match: str
    name: str = ""
    labels: dict[str, str] = {}
    help: str = ""
    action: Literal["map", "drop"] = "map"
    match_metric_type: Literal["", "counter", "gauge", "observer", "timer"] = ""
    scale: float = 1.0
    honor_labels: bool = False


class Shape(msgspec.Struct, frozen=True):
    """What a rule makes of an observation, and how long a series stays."""

    summary: bool = False
    buckets: tuple[float, ...] = BUCKETS
    quantiles: tuple[float, ...] = QUANTILES
    ttl_s: float = 0.0
    """0 = as the target says."""
    scale: float = 1.0


class Mapped(msgspec.Struct, frozen=True):
    """What became of a name."""

    name: str
    """Empty = it is dropped."""
    labels: dict[str, str]
    shape: Shape
    help: str = ""
    honor_labels: bool = False
    """Labels that came win over the rule's."""


class Rule:
    """A rule that can be used; raises ValueError with what is wrong with it."""

    def __init__(self, said: _Said, defaults: _Defaults) -> None:
        self._said = said
        self._drops = said.action == "drop"
        is_regex = (said.match_type or defaults.match_type) == "regex"
        self._pattern = re.compile(said.match) if is_regex else _glob(said.match)
        if not said.name and not self._drops:
            raise ValueError("name must be given")
        for text in (said.name, *said.labels.values()):
            self._check_places(text)
        self._shape = shape(said, defaults, usual="summary")

    def _check_places(self, text: str) -> None:
        for number, name in _PLACE.findall(text):
            place = number or name
            known = int(place) <= self._pattern.groups if place.isdecimal() else place in self._pattern.groupindex
            if not known:
                raise ValueError(f"${place} stands for nothing in {self._said.match}")

    def apply(self, name: str, kind: bytes) -> Mapped | None:
        """None if it is not for that name."""
        wanted = self._said.match_metric_type
        if wanted and wanted not in _TYPES.get(kind, _OBSERVER):
            return None
        found = self._pattern.search(name[:_MAX_NAME])
        if found is None:
            return None

        def filled(text: str) -> str:
            return _PLACE.sub(lambda place: found[_group(place[1] or place[2])] or "", text)

        labels = {key: filled(text) for key, text in self._said.labels.items()}
        shown = "" if self._drops else filled(self._said.name)
        return Mapped(shown, labels, self._shape, self._said.help, self._said.honor_labels)


class Rules:
    """All rules of a pack, in their order: the first that is for a name counts."""

    def __init__(self, defaults: Mapping[str, Any], mappings: Sequence[Mapping[str, Any]]) -> None:
        said = msgspec.convert(defaults, _Defaults)
        self._rules = [Rule(msgspec.convert(one, _Said), said) for one in mappings]
        self.usual = shape(said, said, usual="histogram")
        """Of what no rule is for."""

    def find(self, name: str, kind: bytes) -> Mapped | None:
        """None where no rule is for it."""
        for rule in self._rules:
            found = rule.apply(name, kind)
            if found is not None:
                return found
        return None


def check(defaults: Mapping[str, Any], mappings: Sequence[Mapping[str, Any]], faults: MutableSequence[str]) -> None:
    """Names every rule that cannot be used, and why."""
    usual = _Defaults()
    try:
        usual = msgspec.convert(defaults, _Defaults)
        shape(usual, usual, usual="histogram")
    except (ValueError, msgspec.ValidationError) as error:
        faults.append(f"defaults: {error}")
    for number, one in enumerate(mappings):
        try:
            Rule(msgspec.convert(one, _Said), usual)
        except (ValueError, re.error, msgspec.ValidationError) as error:
            faults.append(f"mappings[{number}] (match: {one.get('match', 'none')}): {error}")


def shape(said: _Defaults, defaults: _Defaults, *, usual: Literal["histogram", "summary"]) -> Shape:
    """Of a rule, or of the defaults themselves; raises ValueError."""
    if said.glob_disable_ordering:
        raise ValueError("glob_disable_ordering is not supported: the first rule that is for a name counts")
    kind = said.observer_type or said.timer_type or defaults.observer_type or defaults.timer_type or usual
    buckets = said.histogram_options.buckets or said.buckets or defaults.histogram_options.buckets or defaults.buckets
    quantiles = (
        said.summary_options.quantiles or said.quantiles or defaults.summary_options.quantiles or defaults.quantiles
    )
    if any(a >= b for a, b in itertools.pairwise(buckets)):
        raise ValueError("buckets must rise")
    if any(not 0 <= one.quantile <= 1 for one in quantiles):
        raise ValueError("quantiles must be from 0 to 1")
    return Shape(
        summary=kind == "summary",
        buckets=(*(bound for bound in buckets if bound != math.inf), math.inf) if buckets else BUCKETS,
        quantiles=tuple(sorted(one.quantile for one in quantiles)) if quantiles else QUANTILES,
        ttl_s=_seconds(said.ttl) or _seconds(defaults.ttl),
        scale=getattr(said, "scale", 1.0),
    )


def _glob(text: str) -> re.Pattern[str]:
    parts = text.split(".")
    wrong = [part for part in parts if not _COMPONENT.fullmatch(part)]
    if wrong:
        raise ValueError(f"{wrong[0]!r} is no component of a name: * stands for a whole one")
    return re.compile(r"\A" + r"\.".join("([^.]*)" if part == "*" else re.escape(part) for part in parts) + r"\Z")


def _group(place: str) -> int | str:
    return int(place) if place.isdecimal() else place


def _seconds(text: str | float) -> float:
    if not isinstance(text, str):
        if text:
            raise ValueError(f"ttl {text} has no unit")
        return 0.0
    parts = _DURATION.findall(text)
    if "".join(number + unit for number, unit in parts) != text and text != "0":
        raise ValueError(f"ttl {text!r} is no duration, such as 1m20s")
    return sum(float(number) * _SECONDS[unit] for number, unit in parts)
