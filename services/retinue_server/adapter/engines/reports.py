"""What apps tell of themselves: by ReportMetrics, and by OTLP."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from retinue_server.adapter.core.packs import Reject
from retinue_server.adapter.core.points import RawFamily

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from retinue_server.adapter.core.points import Labels, Raw, Type
    from retinue_server.adapter.core.spec import Spec

_STALE_INTERVALS = 5


class Reports:
    """The latest of each series."""

    def __init__(self, spec: Spec, clock: Callable[[], float] = time.monotonic) -> None:
        self._spec, self._clock = spec, clock
        self.address = spec.endpoint
        self.reject = Reject()
        self._latest: dict[tuple[str, Type, str], tuple[str, dict[Labels, tuple[Raw, float]]]] = {}
        self._size = 0

    def put(self, families: Iterable[RawFamily]) -> int:
        """Takes them in; how many were too many."""
        now, left = self._clock(), 0
        for family in families:
            _, series = self._latest.setdefault((family.name, family.type, family.unit), (family.help, {}))
            for point in family.points:
                key = tuple(sorted(point.labels.items()))
                if key not in series:
                    if self._size >= self._spec.limits.max_series:
                        left += 1
                        continue
                    self._size += 1
                series[key] = point, now
        return left

    def drain(self) -> list[RawFamily]:
        """Everything that is not too old."""
        too_old = self._clock() - _STALE_INTERVALS * self._spec.interval_s
        found = []
        for (name, kind, unit), (text, series) in list(self._latest.items()):
            fresh = {key: (point, at) for key, (point, at) in series.items() if at >= too_old}
            self._size -= len(series) - len(fresh)
            if not fresh:
                del self._latest[name, kind, unit]
                continue
            self._latest[name, kind, unit] = text, fresh
            found.append(RawFamily(name, kind, [point for point, _ in fresh.values()], unit, text))
        return found

    async def close(self) -> None:
        """Nothing is open."""
