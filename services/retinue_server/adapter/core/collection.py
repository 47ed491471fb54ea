"""What becomes of what a target brings: normalised, checked against what is there, within its limits, as lines.

A `Collector` is one target's, from its first collection to its end; the `Registry` all of them share keeps two targets
from saying different things by one name. What is refused is counted by reason:

    bad_name           nothing of the name can be one         negative_counter  a counter below zero
    bad_label          nothing of a label's name can be one   not_a_number      where a number must be
    label_collision    two labels have the same name then     bad_histogram     bounds or counts fall, or there are none
    label_limit        more labels than its limit             series_limit      a new series beyond its limit
    duplicate_series   twice in one collection                type_conflict     the name is of another type elsewhere
    name_conflict      its lines would bear another's name    type_unsupported  a type that no reader of ours knows
    bad_info           its value is not 1

Sources refuse some at once: bad_line and unknown_type (StatsD), old_point and no_temporality (OTLP), query_failed
(PostgreSQL).
"""

from __future__ import annotations

import itertools
import math
import threading
from typing import TYPE_CHECKING

import msgspec

from retinue_server.adapter.core import exposition, naming
from retinue_server.adapter.core.packs import Reject
from retinue_server.adapter.core.points import CUMULATIVE, Family, Histogram, Labels, Series, Summary, Type, Value

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from retinue_server.adapter.core.points import AnyFamily, Raw, RawFamily

RESERVED = ("instance", "kind", "service", "target")
"""Labels that are ours; a source's own are called `exported_…`."""
_OWN_SUFFIX = {Type.COUNTER: "_total", Type.INFO: "_info"}
"""What the exposition adds; sources that say it themselves do not get it twice."""
_RESERVED_NAMES = frozenset(
    name
    for base, kind in (
        ("app_requests", Type.COUNTER),
        ("app_errors", Type.COUNTER),
        ("app_request_duration_seconds", Type.HISTOGRAM),
        ("app_saturation_ratio", Type.GAUGE),
    )
    for name in exposition.taken_names(base, kind)
)
"""Names of the golden signals: a source's own are called `exported_…`, as those of our own metrics are."""
_MAX_LABEL = 1024
"""Characters of a label's value; the rest is cut off."""


class Limits(msgspec.Struct, frozen=True, array_like=True):
    """Of one target."""

    max_bytes: int = 10 << 20
    max_series: int = 10_000
    max_labels: int = 30


class Registry:
    """Which names are in use, of what type, by which targets; and which family each exposed name belongs to. For
    several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._types: dict[str, tuple[Type, str]] = {}
        self._users: dict[str, set[str]] = {}
        self._exposed: dict[str, str] = {}

    def claim(self, name: str, kind: Type, unit: str, target: str) -> str:
        """Why the target can't use the name so; empty if it can, and then it does."""
        with self._lock:
            return self._claim(name, kind, unit, target)

    def _claim(self, name: str, kind: Type, unit: str, target: str) -> str:
        known = self._types.get(name)
        if known is not None:
            if known != (kind, unit) and self._users[name] != {target}:
                return "type_conflict"
            if known == (kind, unit):
                self._users[name].add(target)
                return ""
            self._free(name)
        names = exposition.taken_names(name, kind)
        if any(self._exposed.get(one, name) != name for one in names):
            return "name_conflict"
        self._types[name], self._users[name] = (kind, unit), {target}
        self._exposed.update(dict.fromkeys(names, name))
        return ""

    def release(self, names: Iterable[str], target: str) -> None:
        """The target uses these no more."""
        with self._lock:
            for name in names:
                users = self._users.get(name, set())
                users.discard(target)
                if not users and name in self._types:
                    self._free(name)

    def _free(self, name: str) -> None:
        kind, _ = self._types.pop(name)
        del self._users[name]
        for one in exposition.taken_names(name, kind):
            if self._exposed.get(one) == name:
                del self._exposed[one]


_Key = tuple[str, Type, Labels]
"""Of a series: the name of its family, with the type that it had then, and labels."""


class _Known(msgspec.Struct):
    """A series between two collections."""

    labels: Labels
    prefix: str
    value: Value
    start_ms: int
    seen: int
    text: str = ""
    """Its lines, where they are several; they stand as long as the value does."""


class Collector:
    """See the module. `own` are the values of RESERVED for this target."""

    def __init__(self, target: str, own: dict[str, str], limits: Limits, registry: Registry) -> None:
        self.target, self._own, self.limits, self._registry = target, own, limits, registry
        self._known: dict[_Key, _Known] = {}
        """By name and labels as they came: what has to be worked out once."""
        self._same: dict[_Key, _Known] = {}
        """By name and labels as they are shown: an empty value is none, an odd name becomes another, a long value is
        cut."""
        self._names: set[str] = set()
        self._texts: dict[str, list[str]] = {}
        """Lines of this turn by family; one that nobody gave a type comes point by point."""
        self._turn = 0
        self.reject = Reject()
        self.limited = False

    def take(self, families: Iterable[RawFamily], now_ms: int) -> list[Family]:
        """What is left of a collection, by name; series that are missing in it are forgotten."""
        self._turn += 1
        self.limited = False
        taken: dict[str, Family] = {}
        self._texts = {}
        for raw in families:
            self._family(raw, now_ms, taken)
        for name, family in taken.items():
            family.text = "".join(self._texts[name]).encode()
        if len(self._known) > sum(len(family.series) for family in taken.values()):
            self._known = {key: one for key, one in self._known.items() if one.seen == self._turn}
            self._same = {(key[0], key[1], one.labels): one for key, one in self._known.items()}
        self._registry.release(self._names - taken.keys(), self.target)
        self._names = set(taken)
        return [taken[name] for name in sorted(taken)]

    def close(self) -> None:
        """Its names are free for others."""
        self._registry.release(self._names, self.target)
        self._names = set()

    def _family(self, raw: RawFamily, now_ms: int, taken: dict[str, Family]) -> None:
        kind = raw.type
        base = naming.metric_name(raw.name).removesuffix(_OWN_SUFFIX.get(kind, ""))
        unit, factor = "", 1.0
        if kind is not Type.INFO:
            base, unit, factor = naming.based(base, raw.unit)
        if self._own and not _RESERVED_NAMES.isdisjoint(exposition.taken_names(base, kind)):
            base = f"exported_{base}"
        if self._own and base.startswith("retinue_adapter_"):
            base = f"exported_{base}"
        if not base:
            self.reject("bad_name", repr(raw.name)[:200], len(raw.points))
            return
        family = taken.get(base)
        if family is None:
            why = self._registry.claim(base, kind, unit, self.target)
        else:
            why = "" if (family.type, family.unit) == (kind, unit) else "type_conflict"
        if why:
            self.reject(why, base, len(raw.points))
            return
        if family is None:
            family = Family(base, kind, unit, raw.help, [])
        text = self._texts.setdefault(base, [])
        self._points(raw, family, factor, now_ms, text)
        if family.series:
            taken[base] = family
        else:
            self._registry.release((base,), self.target)

    def _points(self, raw: RawFamily, family: Family, factor: float, now_ms: int, text: list[str]) -> None:
        kind, turn, known_by, number = family.type, self._turn, self._known, exposition.number
        plain = kind not in (Type.HISTOGRAM, Type.SUMMARY)
        for point in raw.points:
            key = (family.name, kind, tuple(point.labels.items()))
            known = known_by.get(key) or self._new(key, point, family, now_ms)
            if known is None:
                continue
            if known.seen == turn:
                self.reject("duplicate_series", known.prefix or family.name)
                continue
            value = point.value if factor == 1.0 else _scaled(point.value, factor)
            same = known.text and value == known.value
            why = "" if same else fault(kind, value)
            if why:
                self.reject(why, f"{family.name} {value}"[:200])
                continue
            known.seen = turn
            if point.start_ms:
                known.start_ms = point.start_ms
            elif kind in CUMULATIVE and _fell(known.value, value):
                known.start_ms = now_ms
            known.value = value
            family.series.append(Series(known.labels, value, known.start_ms if kind in CUMULATIVE else 0))
            if plain:
                text.append(f"{known.prefix}{number(value)}\n")  # type: ignore[arg-type]
            else:
                if not same:
                    known.text = exposition.lines(family.name, kind, known.labels, value)
                text.append(known.text)

    def _new(self, key: _Key, point: Raw, family: Family, now_ms: int) -> _Known | None:
        labels = self._labels(point.labels, family.type)
        if labels is None:
            return None
        if len(self._known) >= self.limits.max_series:
            self.limited = True
            self.reject("series_limit", family.name)
            return None
        plain = family.type not in (Type.HISTOGRAM, Type.SUMMARY)
        prefix = exposition.prefix(exposition.sample_name(family.name, family.type), labels) if plain else ""
        known = _Known(labels, prefix, point.value, now_ms, 0)
        known = self._same.setdefault((family.name, family.type, labels), known)
        self._known[key] = known
        return known

    def _labels(self, said: dict[str, str], kind: Type) -> Labels | None:
        """With ours, by name; None if they were refused."""
        if len(said) > self.limits.max_labels:
            self.limited = True
            self.reject("label_limit", ", ".join(itertools.islice(said, 5)))
            return None
        found = dict(self._own)
        for name, text in said.items():
            clean = naming.label_name(name)
            if (
                clean in self._own
                or (clean == "le" and kind is Type.HISTOGRAM)
                or (clean == "quantile" and kind is Type.SUMMARY)
            ):
                clean = f"exported_{clean}"
            if not clean:
                self.reject("bad_label", repr(name)[:200])
                return None
            if clean in found:
                self.reject("label_collision", clean)
                return None
            if text:
                found[clean] = _printable(text)
        return tuple(sorted(found.items()))


def _printable(text: str) -> str:
    text = text[:_MAX_LABEL]
    return text if text.isascii() else text.encode(errors="replace").decode()


def _scaled(value: Value, factor: float) -> Value:
    if isinstance(value, Histogram):
        return Histogram(
            tuple((bound * factor, count) for bound, count in value.buckets), value.sum * factor, value.count
        )
    if isinstance(value, Summary):
        return Summary(tuple((q, one * factor) for q, one in value.quantiles), value.sum * factor, value.count)
    return value * factor


def fault(kind: Type, value: Value) -> str:
    """Why a value can't be one of that type, as a reason; empty if it can."""
    if isinstance(value, Histogram):
        return "" if kind is Type.HISTOGRAM and _is_histogram(value) else "bad_histogram"
    if isinstance(value, Summary):
        return "" if kind is Type.SUMMARY and _is_summary(value) else "bad_histogram"
    if kind in (Type.HISTOGRAM, Type.SUMMARY):
        return "bad_histogram"
    if kind is Type.INFO and value != 1:
        return "bad_info"
    if kind is Type.COUNTER and not value >= 0:
        return "not_a_number" if math.isnan(value) else "negative_counter"
    return ""


def _is_histogram(value: Histogram) -> bool:
    bounds, counts = [b for b, _ in value.buckets], [n for _, n in value.buckets]
    rising = all(a < b for a, b in itertools.pairwise(bounds)) and all(a <= b for a, b in itertools.pairwise(counts))
    whole = counts[:1] >= [0] and all(float(count).is_integer() for count in counts) and counts[-1:] == [value.count]
    return rising and whole and bounds[-1:] == [math.inf] and (bounds[0] < 0 or not value.sum < 0)


def _is_summary(value: Summary) -> bool:
    """OpenMetrics has no negative quantiles or sums of them."""
    whole = value.count >= 0 and float(value.count).is_integer() and not value.sum < 0
    return whole and all(0 <= share <= 1 and not one < 0 for share, one in value.quantiles)


def _fell(before: Value, now: Value) -> bool:
    if isinstance(before, Histogram | Summary) or isinstance(now, Histogram | Summary):
        return isinstance(before, type(now)) and now.count < before.count  # type: ignore[union-attr]
    return now < before


def sift(collector: Collector, families: Iterable[RawFamily]) -> tuple[list[RawFamily], Reject]:
    """Points that can be taken, each by itself; and what is wrong with the others. For a collector of its own."""
    found = []
    for family in families:
        good = []
        for point in family.points:
            alone = msgspec.structs.replace(family, points=[point])
            if collector.take([alone], 0):
                good.append(point)
        if good:
            found.append(msgspec.structs.replace(family, points=good))
    return found, collector.reject


def by_name(targets: Iterable[Sequence[AnyFamily]]) -> list[list[AnyFamily]]:
    """Families of all targets, those of one name together."""
    found: dict[str, list[AnyFamily]] = {}
    for families in targets:
        for family in families:
            found.setdefault(family.name, []).append(family)
    return [found[name] for name in sorted(found)]
