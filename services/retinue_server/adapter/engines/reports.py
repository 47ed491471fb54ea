"""What apps tell of themselves: by ReportMetrics, and by OTLP."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, NamedTuple

import msgspec

from retinue_server.adapter.core.packs import Reject
from retinue_server.adapter.core.points import Histogram, Raw, RawFamily

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from retinue_server.adapter.core.points import Labels, Type, Value
    from retinue_server.adapter.core.spec import Spec

_STALE_INTERVALS = 5
_PUSH_STALE_S = 300.0
"""SDKs push once a minute unless they are told otherwise."""


class _Latest(NamedTuple):
    point: Raw
    at: float
    time_ns: int


_Series = dict["Labels", _Latest]


class Reports:
    """The latest of each series."""

    def __init__(self, spec: Spec, clock: Callable[[], float] = time.monotonic) -> None:
        self._spec, self._clock = spec, clock
        self.address = spec.endpoint
        self.reject = Reject()
        self._latest: dict[tuple[str, Type, str], tuple[str, _Series]] = {}
        self._size = 0
        self._stale_s = _STALE_INTERVALS * spec.interval_s

    def put(self, families: Iterable[RawFamily]) -> int:
        """Takes them in; how many were too many."""
        left = 0
        for family in families:
            series = self._series(family)
            left += sum(not self._keep(series, point) for point in family.points)
        return left

    def _series(self, family: RawFamily) -> _Series:
        return self._latest.setdefault((family.name, family.type, family.unit), (family.help, {}))[1]

    def _keep(self, series: _Series, point: Raw, time_ns: int = 0) -> bool:
        """Whether there was room for it."""
        key = _key(point)
        if key not in series:
            if self._size >= self._spec.limits.max_series:
                return False
            self._size += 1
        series[key] = _Latest(point, self._clock(), time_ns)
        return True

    def _drop(self, series: _Series, point: Raw) -> None:
        self._size -= series.pop(_key(point), None) is not None

    def drain(self) -> list[RawFamily]:
        """Everything that is not too old."""
        too_old = self._clock() - self._stale_s
        found = []
        for (name, kind, unit), (text, series) in list(self._latest.items()):
            fresh = {key: one for key, one in series.items() if one.at >= too_old}
            self._size -= len(series) - len(fresh)
            if not fresh:
                del self._latest[name, kind, unit]
                continue
            self._latest[name, kind, unit] = text, fresh
            found.append(RawFamily(name, kind, [one.point for one in fresh.values()], unit, text))
        return found

    async def close(self) -> None:
        """Nothing is open."""


class Pushed(NamedTuple):
    """A point of OTLP."""

    point: Raw | None
    """None = the series has nothing now."""
    labels: dict[str, str]
    time_ns: int
    is_delta: bool = False
    """It is what came since the last one, not since the start."""


class Pushes(Reports):
    """What an SDK pushes. Deltas are added up; a point that is older than what is known is refused, so that one that is
    sent twice counts once."""

    def __init__(self, spec: Spec, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__(spec, clock)
        self.target_id = spec.target_id
        self._stale_s = max(self._stale_s, _PUSH_STALE_S)

    def push(self, family: RawFamily, pushed: Iterable[Pushed], reject: Reject) -> None:
        """Points of `family`, whose own are not looked at."""
        series = self._series(family)
        for one in pushed:
            before = series.get(tuple(sorted(one.labels.items())))
            if before is not None and (
                one.time_ns < before.time_ns or (one.is_delta and one.time_ns == before.time_ns)
            ):
                reject("old_point", family.name)
                continue
            if one.point is None:
                self._drop(series, Raw(one.labels, 0.0))
                continue
            point = one.point
            if one.is_delta and before is not None:
                value = _added(before.point.value, point.value)
                start = before.point.start_ms if value is not point.value else point.start_ms
                point = Raw(point.labels, value, start)
            if not self._keep(series, point, one.time_ns):
                reject("series_limit", family.name)


def _key(point: Raw) -> Labels:
    return tuple(sorted(point.labels.items()))


def _added(before: Value, more: Value) -> Value:
    """The sum; only the latter where they cannot be added, which is a reset."""
    if isinstance(before, float) and isinstance(more, float):
        return before + more
    if isinstance(before, Histogram) and isinstance(more, Histogram):
        bounds = [bound for bound, _ in before.buckets]
        if bounds == [bound for bound, _ in more.buckets]:
            counts = [a + b for (_, a), (_, b) in zip(before.buckets, more.buckets, strict=True)]
            buckets = tuple(zip(bounds, counts, strict=True))
            return msgspec.structs.replace(
                more, buckets=buckets, sum=before.sum + more.sum, count=before.count + more.count
            )
    return more
