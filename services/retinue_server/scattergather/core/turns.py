"""Turns: calls are begun in bursts, and between two bursts whoever else waits for the event loop gets it.

Bursts are cheap: a call begun by itself wakes a thread of gRPC, and costs half as much again. But gRPC needs about five
turns of the loop to take up one request, and between them that thread; while all turns are full of calls, requests wait
where nobody counts or refuses them. So after a burst the loop goes round until nobody has come for a while.
"""

from __future__ import annotations

import logging
from collections import deque
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from retinue_server.scattergather.core.clock import Clock

    Begin = Callable[[int], int]
    """Begins so many calls at most, and says how many; fewer if there are no more."""

log = logging.getLogger(__name__)

_BURST = 64
"""Calls: some milliseconds."""
_QUIET_TURNS, _QUIET_S, _QUIET_CROWDED_S = 10, 0.00025, 0.001
"""For how long nobody must have come. The longer while there are too many: who is refused must not wait for it."""
_CROWDED_S = 1.0
"""How long there are too many, after somebody was refused."""
_LONGEST_S = 0.02
"""Between two bursts, however many come."""


class Turns:
    """Of one root. Requests get them in the order of their coming: half a request is of use to nobody."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._waiting: deque[Begin] = deque()
        self._left = _BURST
        self._burst_at = self._refused_at = self._came_at = float("-inf")
        self._quiet = 0
        """Turns since somebody came, or calls were begun."""
        self._going_round = False

    def add(self, begin: Begin) -> None:
        """Begins the calls of a request when it is its turn, which may be now."""
        self._waiting.append(begin)
        self._came()
        if not self._going_round:
            self._go()

    def refused(self) -> None:
        """Somebody came and was not added."""
        self._came()
        self._refused_at = self._came_at

    def _came(self) -> None:
        self._quiet, self._came_at = 0, self._clock.now()

    def _go(self) -> None:
        now = self._clock.now()
        if self._is_quiet(now) or now - self._burst_at > _LONGEST_S:
            self._left, self._burst_at = _BURST, now
        if self._left:
            self._burst()
        self._quiet += 1
        self._going_round = bool(self._waiting)
        if self._waiting:
            self._clock.soon(self._go)

    def _is_quiet(self, now: float) -> bool:
        long = _QUIET_CROWDED_S if now - self._refused_at < _CROWDED_S else _QUIET_S
        return self._quiet >= _QUIET_TURNS and now - self._came_at >= long

    def _burst(self) -> None:
        while self._left and self._waiting:
            begin = self._waiting.popleft()
            begun = self._begun(begin)
            if begun == self._left:
                self._waiting.appendleft(begin)
            self._left -= begun
        self._came()

    def _begun(self, begin: Begin) -> int:
        """A request that breaks ends by its deadline; it must not take the others along."""
        try:
            return begin(self._left)
        except Exception:
            log.exception("cannot begin the calls of a request")
            return 0
