"""Time: a monotonic clock for everything that counts, the wall clock for people, and timers."""

from __future__ import annotations

import asyncio
import os
import time
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable


class Timer(Protocol):
    """Something that will happen."""

    def cancel(self) -> None:
        """It will not; also after it has."""


class Clock(Protocol):
    """Where time comes from; tests give their own."""

    def now(self) -> float:
        """Monotonic seconds."""

    def wall_ms(self) -> int:
        """Milliseconds since the epoch, for people."""

    def at(self, when: float, do: Callable[[], None]) -> Timer:
        """Does it once the clock shows `when`."""

    def soon(self, do: Callable[[], None]) -> object:
        """Does it after whatever is due now; other threads that want the processor get it first."""


class LoopClock:
    """The clock of the event loop's timers; to be made while it runs."""

    def __init__(self) -> None:
        loop = asyncio.get_running_loop()
        self.now = time.monotonic  # not loop.time: uvloop's shows the millisecond in which the turn began
        self.at = loop.call_at
        self._soon = loop.call_soon

    def wall_ms(self) -> int:
        return time.time_ns() // 1_000_000

    def soon(self, do: Callable[[], None]) -> object:
        os.sched_yield()  # gRPC's thread may have to share a processor with the loop
        return self._soon(do)
