"""Turns: calls are begun in bursts, and between two bursts whoever else waits for the event loop gets it.

Bursts are cheap: a call begun by itself wakes a thread of gRPC, and costs half as much again. But gRPC needs some turns
of the loop to take up one request, and while all of them are busy with calls, requests wait where nobody counts or
refuses them. So after a burst the loop goes round until nobody has come for some turns.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from retinue_server.scattergather.core.clock import Clock

    Begin = Callable[[int], int]
    """Begins so many calls at most, and says how many; fewer if there are no more."""

_BURST = 64
"""Calls: some milliseconds."""
_QUIET_TURNS = 8
"""gRPC needs about five to take up a request that waits."""
_LONGEST_S = 0.02
"""Between two bursts, however many come."""


class Turns:
    """Of one root. Requests get them in the order of their coming: half a request is of use to nobody."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._waiting: deque[Begin] = deque()
        self._left = _BURST
        self._burst_at = float("-inf")
        self._quiet = 0
        """Turns since somebody came."""
        self._going_round = False

    def add(self, begin: Begin) -> None:
        """Begins the calls of a request when it is its turn, which may be now."""
        self._waiting.append(begin)
        self.came()
        if not self._going_round:
            self._go()

    def came(self) -> None:
        """Somebody has, who may not have been added."""
        self._quiet = 0

    def _go(self) -> None:
        now = self._clock.now()
        if self._quiet >= _QUIET_TURNS or now - self._burst_at > _LONGEST_S:
            self._left, self._burst_at = _BURST, now
        if self._left:
            self._burst()
        self._quiet += 1
        self._going_round = bool(self._waiting)
        if self._waiting:
            self._clock.soon(self._go)

    def _burst(self) -> None:
        while self._left and self._waiting:
            begun = self._waiting[0](self._left)
            if begun < self._left:
                self._waiting.popleft()
            self._left -= begun
        self._quiet = 0
