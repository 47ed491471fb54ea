"""Endpoints as the native data plane uses them: who is next, who is kept off, what was counted."""

from __future__ import annotations

import random
from collections import Counter
from typing import TYPE_CHECKING

from retinue_server.ambassador.core.spec import Balancer
from retinue_server.ambassador.engine import EndpointCounts, EndpointHealth

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from retinue_server.ambassador.core.spec import Endpoint, OutlierDetection

_LONGEST_EJECTION_S = 300.0


class Backend:
    """One endpoint."""

    def __init__(self, endpoint: Endpoint) -> None:
        self.endpoint = endpoint
        self.active = 0
        """Connections, or requests, that it has now."""
        self.counts = EndpointCounts()
        self.failures = 0
        """In a row."""
        self.ejections = 0
        self.ejected_until = float("-inf")
        self.current = 0
        """Of smooth weighted round robin."""

    @property
    def address(self) -> str:
        """Where it is."""
        return self.endpoint.address

    def is_ejected(self, now: float) -> bool:
        """Whether it is kept off."""
        return now < self.ejected_until


class Backends:
    """Those of one upstream; on the event loop only."""

    def __init__(self, now: Callable[[], float], changed: Callable[[], None]) -> None:
        self._now, self._changed = now, changed
        self._known: dict[str, Backend] = {}
        self._order: list[Backend] = []
        self._balancer = Balancer.ROUND_ROBIN
        self._outliers: OutlierDetection | None = None
        self.ejections = 0
        self.gone: Counter[str] = Counter()
        """What was counted of endpoints that are there no more, for totals that only grow."""

    def update(self, endpoints: Sequence[Endpoint], balancer: Balancer, outliers: OutlierDetection | None) -> None:
        """These from now on; who stays keeps what is known of it."""
        known = {}
        for endpoint in endpoints:
            backend = self._known.get(endpoint.address) or Backend(endpoint)
            backend.endpoint = endpoint
            known[endpoint.address] = backend
        self._known, self._order = known, list(known.values())
        self._balancer, self._outliers = balancer, outliers

    @property
    def all(self) -> Sequence[Backend]:
        """In their order."""
        return self._order

    def usable(self) -> list[Backend]:
        """Those that are not kept off."""
        now = self._now()
        return [one for one in self._order if not one.is_ejected(now)]

    def choose(self, tried: Sequence[Backend] = ()) -> Backend | None:
        """Who is next, by weight; None if nobody is left."""
        found = [one for one in self.usable() if one not in tried]
        if not found:
            return None
        if self._balancer is Balancer.LEAST_REQUEST:
            return self._least(found)
        if self._balancer is Balancer.RANDOM:
            return random.choices(found, [one.endpoint.weight for one in found])[0]  # noqa: S311 - spreads load
        return _next(found)

    def _least(self, found: list[Backend]) -> Backend:
        """The better of two that are drawn by weight."""
        drawn = random.choices(found, [one.endpoint.weight for one in found], k=2)  # noqa: S311 - spreads load
        return min(drawn, key=lambda one: one.active / one.endpoint.weight)

    # Outliers

    def succeeded(self, backend: Backend) -> None:
        """It answered."""
        backend.failures = 0
        if backend.ejections and self._now() > backend.ejected_until + _LONGEST_EJECTION_S:
            backend.ejections = 0

    def failed(self, backend: Backend) -> None:
        """It did not; after enough failures in a row it is kept off, if so many may be."""
        backend.counts.errors += 1
        backend.failures += 1
        said = self._outliers
        if said is None or backend.failures < said.consecutive_failures or backend.is_ejected(self._now()):
            return
        ejected = sum(one.is_ejected(self._now()) for one in self._order)
        if ejected and (ejected + 1) * 100 > said.max_ejection_percent * len(self._order):
            return
        backend.ejections += 1
        backend.failures = 0
        backend.ejected_until = self._now() + min(said.base_ejection_s * backend.ejections, _LONGEST_EJECTION_S)
        self.ejections += 1
        self._changed()

    def health(self) -> list[EndpointHealth]:
        """As they are used."""
        now = self._now()
        return [
            EndpointHealth(
                one.address, not one.is_ejected(now), "it is kept off after failures" if one.is_ejected(now) else ""
            )
            for one in self._order
        ]

    def counts(self) -> dict[str, EndpointCounts]:
        """Of each."""
        now = self._now()
        for one in self._order:
            one.counts.active_connections, one.counts.healthy = one.active, not one.is_ejected(now)
        return {one.address: one.counts for one in self._order}


def _next(found: Sequence[Backend]) -> Backend:
    """Smooth weighted round robin, as nginx has it: by weight, and never the heavy ones in a row."""
    total = 0
    for one in found:
        one.current += one.endpoint.weight
        total += one.endpoint.weight
    best = max(found, key=lambda one: one.current)
    best.current -= total
    return best
